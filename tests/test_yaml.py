"""Reading YAML: what is allowed comes out right (what is refused stands in test_config.py)."""

from __future__ import annotations

import re

import pytest
import yaml as pyyaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.yaml import MAX_ALIASED_NODES, YamlError, load_text


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a: 1", {"a": 1}),
        ("a: 0", {"a": 0}),
        ("a: -3", {"a": -3}),
        ("a: 1_000", {"a": 1000}),
        ("a: 0x10", {"a": 16}),
        ("a: 1e-5", {"a": 1e-5}),
        ("a: 1E6", {"a": 1e6}),
        ("a: 1.0e7", {"a": 1e7}),
        ("a: .5", {"a": 0.5}),
        ("a: 1e5x", {"a": "1e5x"}),
        ("a: '010'", {"a": "010"}),
        ("a: true\nb: off\nc: ~\nd:", {"a": True, "b": False, "c": None, "d": None}),
        ("a: '2024-01-01'", {"a": "2024-01-01"}),
        ("'5': x", {"5": "x"}),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("---\na: 1\n...\n", {"a": 1}),
        ("﻿a: 1", {"a": 1}),
        ('{"a": [1, 2.5, null, "x"]}', {"a": [1, 2.5, None, "x"]}),
        ("", None),
    ],
)
def test_plain_data(text: str, data: object) -> None:
    assert load_text(text) == data


def test_the_alias_limit_counts_copies_only() -> None:
    long = "a: [" + "1, " * 5000 + "1]\nb: &b [2]\nc: *b\n"
    assert load_text(long)["c"] == [2]
    copies = "a: &a 1\nb: [" + ", ".join(["*a"] * MAX_ALIASED_NODES) + "]"
    assert len(load_text(copies)["b"]) == MAX_ALIASED_NODES
    with pytest.raises(YamlError, match="aliases expand to more than 1000 nodes"):
        load_text(copies[:-1] + ", *a]")


# PyYAML writes the text 1e5 as it is, and that is a number here, as it is to everybody who writes 1e5.
TEXT = st.text(max_size=10).filter(lambda text: not re.fullmatch(r"[-+]?[0-9._]+[eE][-+]?[0-9_]+", text))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_what_pyyaml_writes_is_read_back(data: object) -> None:
    assert load_text(pyyaml.safe_dump(data)) == data


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=30) | st.text("ab:[]{}-&*!%@|>\n '\"#,.0x_e\\u", max_size=30))
def test_any_text_is_data_or_one_line(text: str) -> None:
    try:
        load_text(text)
    except YamlError as error:
        assert "\n" not in str(error)
