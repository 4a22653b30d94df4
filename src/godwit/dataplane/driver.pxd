# SPDX-License-Identifier: GPL-2.0-or-later
"""Split virtqueues, the driver's side (virtio 1.3, section 2.7).

Used where this project is the guest's network card itself: in front of a
stream socket (``card.pyx``), and in the laboratory, in front of a TAP device.
Memory barriers as in ``virtqueue.pyx``, the device's side.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from godwit.dataplane.sys cimport fence, load16_acquire, store16_release, write

cdef extern from "<linux/virtio_ring.h>" nogil:
    cdef struct vring_desc:
        uint64_t addr
        uint32_t len
        uint16_t flags
        uint16_t next
    cdef struct vring_used_elem:
        uint32_t id
        uint32_t len
    enum:
        VRING_DESC_F_NEXT
        VRING_DESC_F_WRITE
        VRING_DESC_F_INDIRECT
        VRING_USED_F_NO_NOTIFY
        VRING_AVAIL_F_NO_INTERRUPT

cdef struct Ring:
    uint32_t num
    vring_desc *desc
    uint16_t *avail           # flags, index, ring, used_event
    uint16_t *used            # flags, index, then:
    vring_used_elem *elems    # and after those avail_event
    uint16_t made             # our shadow of the available index
    uint16_t seen             # used entries taken
    int kick
    int call


cdef inline void ring_init(Ring *ring, uintptr_t desc, uintptr_t avail, uintptr_t used, uint32_t num) noexcept nogil:
    """An empty ring. Its eventfds are not touched."""
    ring.num = num
    ring.desc = <vring_desc *>desc
    ring.avail = <uint16_t *>avail
    ring.used = <uint16_t *>used
    ring.elems = <vring_used_elem *>(used + 4)
    ring.made = 0
    ring.seen = 0
    memset(ring.desc, 0, num * sizeof(vring_desc))
    memset(ring.avail, 0, 6 + 2 * num)
    memset(ring.used, 0, 6 + num * sizeof(vring_used_elem))


cdef inline void ring_put(Ring *ring, uint16_t head) noexcept nogil:
    """Add a chain, which the device sees after `ring_show`."""
    ring.avail[2 + (ring.made & (ring.num - 1))] = head
    ring.made += 1


cdef inline void ring_show(Ring *ring) noexcept nogil:
    store16_release(&ring.avail[1], ring.made)


cdef inline uint16_t ring_used(Ring *ring) noexcept nogil:
    """The device's index: entries up to it may be read."""
    return load16_acquire(&ring.used[1])


cdef inline bint ring_wants_kick(Ring *ring, uint16_t before, bint event_idx) noexcept nogil:
    """2.7.10: whether to notify of what was made available since `before`."""
    cdef uint16_t event
    fence()
    if not event_idx:
        return not load16_acquire(&ring.used[0]) & VRING_USED_F_NO_NOTIFY
    event = load16_acquire(&ring.elems[ring.num])
    return <uint16_t>(ring.made - event - 1) < <uint16_t>(ring.made - before)


cdef inline void ring_quiet(Ring *ring, bint event_idx) noexcept nogil:
    # With the event index nothing is needed: the event last asked for is past.
    if not event_idx:
        ring.avail[0] = VRING_AVAIL_F_NO_INTERRUPT


cdef inline bint ring_listen(Ring *ring, bint event_idx) noexcept nogil:
    """Ask to be called at the next used entry; False if there is one already."""
    if event_idx:
        store16_release(&ring.avail[2 + ring.num], ring.seen)
    else:
        store16_release(&ring.avail[0], 0)
    fence()
    return load16_acquire(&ring.used[1]) == ring.seen


cdef inline void ring_signal(int fd) noexcept nogil:
    """Notify through an eventfd."""
    cdef uint64_t one = 1
    write(fd, &one, sizeof(one))
