# SPDX-License-Identifier: GPL-2.0-or-later
"""The documentation is current, and its table says what the code does."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from godwit.vhost_user import BaseDevice, Device, FrontendClient
from godwit.vhost_user.doc import BEGIN, END, main, request_table, update
from godwit.vhost_user.messages import ROWS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "vhost-user.md"


def test_the_table_is_current() -> None:
    text = DOCUMENT.read_text()
    assert update(text) == text, "run python -m godwit.vhost_user.doc docs/vhost-user.md"


def test_every_request_is_in_the_table() -> None:
    table = request_table()
    for row in ROWS:
        assert row.name in table


def test_update(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main([str(document)])
    assert document.read_text() == f"before\n{BEGIN}\n\n{request_table()}\n\n{END}\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        update(f"{END}{BEGIN}")


def test_every_handler_is_a_method_of_devices() -> None:
    handlers = [row.handler for row in ROWS if row.handler]
    assert len(set(handlers)) == len(handlers)
    methods = {name for name, _ in inspect.getmembers(Device, inspect.iscoroutinefunction)}
    assert methods == {*handlers, "disconnected"}
    for name in methods:
        ours = inspect.signature(getattr(BaseDevice, name))
        assert ours == inspect.signature(getattr(Device, name))


def test_every_supported_request_can_be_made_by_the_client() -> None:
    different = {"ADD_MEM_REG": "add_mem_region", "REM_MEM_REG": "remove_mem_region"}
    for row in ROWS:
        if row.supported:
            assert callable(getattr(FrontendClient, different.get(row.name, row.name.lower())))


def test_a_base_device_is_a_device() -> None:
    device: Device = BaseDevice()
    assert device.queues == 2
