# SPDX-License-Identifier: GPL-2.0-or-later
"""See _tapguest.pyx."""

class Mover:
    def __init__(
        self,
        tap: int,
        *,
        num: int,
        rx_ring: tuple[int, int, int],
        rx_buffers: int,
        rx_gpa: int,
        rx_size: int,
        tx_ring: tuple[int, int, int],
        tx_frames: int,
        tx_gpa: int,
        tx_size: int,
        tx_tables: int,
        tx_tables_gpa: int,
        tx_chunk: int,
        tx_layout: int,
    ) -> None: ...
    def reset(self, rx_ring: tuple[int, int, int], tx_ring: tuple[int, int, int]) -> None: ...
    def attach(
        self,
        *,
        rx_kick: int,
        rx_call: int,
        tx_kick: int,
        tx_call: int,
        event_idx: bool,
        guest_csum: bool,
        guest_tso: bool,
    ) -> None: ...
    def detach(self) -> None: ...
    def used_index(self, queue: int) -> int: ...
    def available_index(self, queue: int) -> int: ...
    @property
    def failure(self) -> str | None: ...
    @property
    def counters(self) -> dict[str, int]: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def end(self) -> None: ...
    def start(self) -> None: ...
