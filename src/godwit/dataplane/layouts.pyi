# SPDX-License-Identifier: GPL-2.0-or-later
"""How TCP flows and their sockets lie in streams: the quick way in and out for very many.

Records are those of the streams: a *flow* is 112 bytes (``godwit.net.records.FLOW``), or where ``native`` 122
(``godwit.net.native.FLOW``); a *socket* is 52 bytes (``records.SOCKET``) with its send queue and its receive queue
behind it. *Sound* is what keeps all of the rules declared there; a record of state 0 is a socket that was lost.
"""

from godwit.dataplane.state import Side

def odd_flows(records: bytes, native: bool) -> list[int]:
    """Which of them are not surely sound, by their place: to be looked at by their declaration."""

def ends(records: bytes, native: bool) -> list[Side]:
    """The host's side of each of these sound flows."""

def sound_sockets(data: bytes, at: int, most: int) -> tuple[int, int]:
    """How many sound sockets, or lost ones, lie there whole with their queues, at most so many; and where they end."""

def entries(sockets: bytes, kind: int, flags: int, first: int) -> bytes:
    """Entries of that type (native stream) for sound sockets, of the flows with the numbers from ``first`` on."""

def sockets_of(data: bytes, at: int, kind: int) -> tuple[int, int, int, bytes]:
    """The other way: where the sound entries end, the first number, how many follow it, and their sockets."""
