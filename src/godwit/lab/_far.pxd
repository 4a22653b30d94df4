# SPDX-License-Identifier: GPL-2.0-or-later
"""The far end of an ideal network: a frame comes back from whom it went to, and two services are there.

**discard** (RFC 863, port 9) throws away what it gets, over UDP, and over TCP,
where it acknowledges everything. It keeps no state: what there is to say follows
from each segment.

**chargen** (RFC 864, port 19, over TCP) sends as much as the guest's window takes, until
the guest sends its FIN. Nothing is written but headers: the data is what lies in
the guest's buffers. On the way between two rings nothing is lost; should the
guest lose something all the same, and say so three times, it is sent again from
there on.

Neither has a timer. Nothing here touches a ring: headers go in and out.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    VNET_HLEN = 12          # struct virtio_net_hdr_v1
    AT_NUM_BUFFERS = 10
    AT_IP = VNET_HLEN + 14
    FAR_HEADERS = AT_IP + 40 + 60   # as much of a frame as is looked at: IPv6 and TCP with options
    MAX_SOURCES = 64

cdef struct Source:
    bint open
    bint v6
    uint8_t shift           # of the guest's window
    uint16_t mss            # bytes of data in a segment
    uint32_t next           # sequence number of what is sent next
    uint32_t acked          # up to here the guest has it
    uint32_t edge           # up to here it has room
    int repeats             # of the same acknowledgement
    uint8_t headers[AT_IP + 40 + 20]    # of a segment to the guest

cdef struct Far:
    Source sources[MAX_SOURCES]
    int turn                # the source that is next

cdef enum:
    NOT_OURS = -1

# Take a frame of `size` bytes, the first `looked` of which are in `headers`,
# virtio header included. The answer's headers take their place; how many bytes
# the answer has, 0 if there is none. NOT_OURS: it is for nobody, or everybody.
# `services`: whether the guest takes segments larger than its MTU, and without checksum.
cdef int far_hear(Far *far, uint8_t *headers, uint32_t looked, uint32_t size, bint services,
                  uint32_t *answer) noexcept nogil
# A source that has something to send now, or NULL; how many bytes of data.
cdef Source *far_due(Far *far, uint32_t *payload) noexcept nogil
# Write the headers of its next segment; how many bytes they have.
cdef uint32_t far_say(Source *source, uint32_t payload, uint8_t *headers) noexcept nogil
