# SPDX-License-Identifier: GPL-2.0-or-later

from libc.stdint cimport uint8_t, uint32_t

from godwit.dataplane.sys cimport iovec


cdef int packet_payload(Packet *k, uint32_t skip, uint32_t size, iovec *out, int room) noexcept nogil:
    cdef int i, n = 0
    cdef size_t at = <size_t>k.skip + k.payload + skip, part
    for i in range(k.count):
        if size == 0:
            break
        part = k.iov[i].iov_len
        if at >= part:
            at -= part
            continue
        if n >= room:
            return -1
        part -= at
        if part > size:
            part = size
        out[n].iov_base = <uint8_t *>k.iov[i].iov_base + at
        out[n].iov_len = part
        at = 0
        size -= <uint32_t>part
        n += 1
    return n
