# ruff: noqa: E501  (a case of a table is one line)
"""Dataclasses from plain mappings: what is checked, and that nothing is converted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Lt

from zoo.schema import Count, FieldError, Positive, Probability, Size, check, expected, from_mapping, nearest, shown


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: Positive
    kind: Literal["soft", "hard"] = "soft"


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: Size
    inner: Inner | None = None
    inners: list[Inner] = field(default_factory=list)
    name: str | list[str] = "x"
    share: Probability = 0.5


def test_mappings_become_dataclasses() -> None:
    mapping = {"size": 3, "inner": {"rate": 1}, "inners": [{"rate": 2.5, "kind": "hard"}], "name": ["a", "b"]}
    assert from_mapping(Outer, mapping, "") == Outer(
        size=3, inner=Inner(rate=1.0), inners=[Inner(rate=2.5, kind="hard")], name=["a", "b"]
    )
    assert isinstance(from_mapping(Inner, {"rate": 1}, "").rate, float)
    assert from_mapping(Outer, {"size": 1, "inner": None}, "").inner is None


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "at.size: is missing; give a whole number >= 1"),
        ({"size": 1, "sise": 2}, "at.sise: unknown key; did you mean 'size'?"),
        ({"size": 0}, "at.size: must be a whole number >= 1, got 0"),
        ({"size": 1, "inner": {}}, "at.inner.rate: is missing; give a number > 0"),
        ({"size": 1, "inner": {"rate": 0}}, "at.inner.rate: must be a number > 0, got 0"),
        ({"size": 1, "inner": []}, "at.inner: must be a mapping, got []"),
        ({"size": 1, "inners": {}}, "at.inners: must be a list, each entry a mapping, got {}"),
        ({"size": 1, "inners": [{"rate": 1}, {"rate": "1"}]}, "at.inners[1].rate: must be a number, got '1'; remove the quotes"),
        ({"size": 1, "inners": [{"rate": 1, "kind": "herd"}]}, "at.inners[0].kind: must be one of soft, hard, got 'herd'; did you mean 'hard'?"),
        ({"size": 1, "share": 1.5}, "at.share: must be a number >= 0 and <= 1, got 1.5"),
        ({"size": 1, "name": 3}, "at.name: must be a text or a list, each entry a text, got 3"),
        ([1], "at: must be a mapping, got [1]"),
    ],
)  # fmt: skip
def test_mistakes(mapping: object, message: str) -> None:
    with pytest.raises(FieldError) as error:
        from_mapping(Outer, mapping, "at")
    assert str(error.value) == message


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], b"1", 1j])
def test_only_a_whole_number_is_a_whole_number(value: object) -> None:
    with pytest.raises(FieldError):
        check(int, value, "x")


def test_bounds() -> None:
    half_open = Annotated[int, Ge(0), Lt(3)]
    assert [check(half_open, value, "x") for value in (0, 2)] == [0, 2]
    for value in (-1, 3):
        with pytest.raises(FieldError, match=f"must be a whole number >= 0 and < 3, got {value}"):
            check(half_open, value, "x")
    assert check(Count, 2**31 - 1, "x") == 2**31 - 1
    with pytest.raises(FieldError, match="must be <= 2147483647, got 2147483648"):
        check(Count, 2**31, "x")


def test_a_path_grows_outwards() -> None:
    error = FieldError("num_heads", "is wrong").within("mixer").within("blocks.a")
    assert (error.path, str(error)) == ("blocks.a.mixer.num_heads", "blocks.a.mixer.num_heads: is wrong")


def test_expected_names_every_type_a_field_may_have() -> None:
    assert expected(Size | None) == "a whole number >= 1 or null"
    assert expected(bool) == "true or false"
    assert expected(dict) == "a mapping"
    for annotation in (tuple, dict[str, int], list[tuple], complex | None):
        with pytest.raises(TypeError, match="cannot be checked; use int, float, bool, str, dict or a dataclass"):
            expected(annotation)


def test_values_are_shown_as_yaml_spells_them_on_one_line() -> None:
    assert [shown(value) for value in (None, True, False, "a\nb", 1.5)] == ["null", "true", "false", "'a\\nb'", "1.5"]
    assert len(shown("x" * 10_000)) == 60
    assert shown([10**5000]) == "a number of thousands of digits"


def test_nearest() -> None:
    assert nearest("num_head", ["num_heads", "head_dim"]) == "did you mean 'num_heads'?"
    assert nearest("zzz", ["a", "b"]) == "known: a, b"
    assert nearest("zzz", []) == "remove it, there are no keys here"
