# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine with its memory and rings."""

from godwit.dataplane._base cimport EngineBase
from godwit.dataplane.card cimport StreamCard
from godwit.dataplane.virtqueue cimport Queue

cdef class RingEngine(EngineBase):
    cdef StreamCard card
    cdef Queue *queue(self, int index) except NULL
    cdef _remap(self)
    cdef _unwatch_kick(self, Queue *q)
