# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's frames, both ways, in a file that tcpdump and Wireshark read.

Called where `p.pcap.fd` is not negative. Records are collected and written at
the end of a turn. Whatever becomes of the file, the guest goes on: what a slow
reader of a pipe does not take is left out, and an error ends the capture.
"""

from libc.stdint cimport uint32_t

from godwit.dataplane.plane cimport Plane
from godwit.dataplane.sys cimport iovec

# Capture into a descriptor, which is ours from then on. 0, or a negative error number.
cdef int pcap_open(Plane *p, int fd) noexcept nogil
# One frame: `size` bytes after `skip` of iov.
cdef void pcap_frame(Plane *p, const iovec *iov, int count, size_t skip, uint32_t size) noexcept nogil
cdef void pcap_flush(Plane *p) noexcept nogil
cdef void pcap_close(Plane *p) noexcept nogil
