# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from godwit.dataplane.plane cimport Plane
from godwit.dataplane.sys cimport (
    CLOCK_REALTIME,
    EAGAIN,
    EINTR,
    ENOMEM,
    clock_gettime,
    close,
    errno,
    ftruncate,
    iovec,
    timespec,
    write,
)

cdef enum:
    ROOM = 1 << 19          # bytes; several of the longest frames
    # draft-ietf-opsawg-pcap
    MAGIC_NANOSECONDS = 0xA1B23C4DU
    MAJOR = 2
    MINOR = 4
    SNAPLEN = 262144        # the most that its readers take; a frame is shorter
    LINKTYPE_ETHERNET = 1

cdef struct FileHeader:
    uint32_t magic
    uint16_t major
    uint16_t minor
    int32_t reserved1
    uint32_t reserved2
    uint32_t snaplen
    uint32_t linktype

cdef struct RecordHeader:
    uint32_t seconds
    uint32_t nanoseconds
    uint32_t captured
    uint32_t original


cdef int pcap_open(Plane *p, int fd) noexcept nogil:
    cdef FileHeader *h
    p.pcap.data = <uint8_t *>malloc(ROOM)
    if p.pcap.data == NULL:
        return -ENOMEM
    h = <FileHeader *>p.pcap.data
    h.magic = MAGIC_NANOSECONDS
    h.major = MAJOR
    h.minor = MINOR
    h.reserved1 = 0
    h.reserved2 = 0
    h.snaplen = SNAPLEN
    h.linktype = LINKTYPE_ETHERNET
    p.pcap.used = sizeof(FileHeader)
    p.pcap.written = 0
    p.pcap.whole = 0
    p.pcap.missed = 0
    p.pcap.error = 0
    p.pcap.fd = fd
    pcap_flush(p)
    return -p.pcap.error


cdef void fail(Plane *p, int error) noexcept nogil:
    """End the capture; the control thread finds the error."""
    cdef uint64_t one = 1
    ftruncate(p.pcap.fd, p.pcap.whole)  # half a record is an error to its readers; a pipe refuses
    close(p.pcap.fd)
    p.pcap.fd = -1
    p.pcap.used = 0
    p.pcap.error = error
    write(p.rare_event, &one, 8)


cdef void pcap_flush(Plane *p) noexcept nogil:
    cdef ssize_t n
    cdef uint32_t done = 0
    while done < p.pcap.used:
        n = write(p.pcap.fd, p.pcap.data + done, p.pcap.used - done)
        if n < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                p.pcap.written += done
                fail(p, errno)
                return
            break
        done += <uint32_t>n
    p.pcap.written += done
    p.pcap.used -= done
    if p.pcap.used == 0:
        p.pcap.whole = p.pcap.written
    elif done:
        memmove(p.pcap.data, p.pcap.data + done, p.pcap.used)


cdef void pcap_frame(Plane *p, const iovec *iov, int count, size_t skip, uint32_t size) noexcept nogil:
    cdef RecordHeader r
    cdef timespec now
    cdef uint32_t left = size
    cdef size_t part
    cdef int i
    if p.pcap.used + sizeof(r) + size > ROOM:
        pcap_flush(p)
        if p.pcap.fd < 0:
            return
        if p.pcap.used + sizeof(r) + size > ROOM:
            p.pcap.missed += 1
            return
    clock_gettime(CLOCK_REALTIME, &now)
    r.seconds = <uint32_t>now.tv_sec
    r.nanoseconds = <uint32_t>now.tv_nsec
    r.captured = r.original = size
    memcpy(p.pcap.data + p.pcap.used, &r, sizeof(r))
    p.pcap.used += sizeof(r)
    for i in range(count):
        if left == 0:
            break
        part = iov[i].iov_len
        if skip >= part:
            skip -= part
            continue
        part -= skip
        if part > left:
            part = left
        memcpy(p.pcap.data + p.pcap.used, <const uint8_t *>iov[i].iov_base + skip, part)
        p.pcap.used += <uint32_t>part
        left -= <uint32_t>part
        skip = 0


cdef void pcap_close(Plane *p) noexcept nogil:
    if p.pcap.fd >= 0:
        pcap_flush(p)
    if p.pcap.fd >= 0:
        close(p.pcap.fd)
        p.pcap.fd = -1
    free(p.pcap.data)
    p.pcap.data = NULL
