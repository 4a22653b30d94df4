# SPDX-License-Identifier: GPL-2.0-or-later
"""What the control socket writes is read by others: by Python's JSON, and by Prometheus's own parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from godwit.daemon.texts import Family, exposition, to_json

# Also halves of pairs, as they stand for bytes of a path that are no UTF-8.
TEXT = st.text(st.characters(), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)


@given(VALUES)
def test_json_is_what_it_was(value: Any) -> None:
    text = to_json(value)
    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text) == value


def test_a_path_that_is_no_utf8() -> None:
    assert json.loads(to_json("/tmp/\udcff\U0001f426")) == "/tmp/\udcff\U0001f426"


def test_what_has_no_form() -> None:
    assert to_json([float("nan"), float("inf")]) == "[null, null]"
    with pytest.raises(TypeError, match="object has no form in JSON"):
        to_json({"what": object()})


@given(
    st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True), st.text(max_size=20), max_size=3),
    st.integers(0, 1 << 64) | st.floats(allow_nan=False),
    st.text(st.characters(exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", codec="utf-8"), max_size=40),
)
def test_prometheus_reads_what_was_meant(labels: dict[str, str], value: float, words: str) -> None:
    # The parser that reads it here splits lines where Prometheus does not.
    labels = {name: "".join(text.splitlines()) + ("\n" if "\n" in text else "") for name, text in labels.items()}
    text = "".join(exposition([Family("godwit_some", "gauge", words, [(labels, value)])]))
    [family] = text_string_to_metric_families(text)
    [sample] = family.samples
    assert (family.name, family.type) == ("godwit_some", "gauge")
    assert (sample.name, sample.labels, float(sample.value)) == ("godwit_some", labels, float(value))


def test_a_family_without_samples_is_left_out() -> None:
    assert list(exposition([Family("godwit_none", "gauge", "None.", [])])) == []
