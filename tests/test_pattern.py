"""The pattern grammar against an independent expansion, and every way to get it wrong."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.pattern import MAX_LAYERS, PatternError, parse, shortest_period, spell

NAMES = st.sampled_from(["a", "softmax", "mamba_moe", "x-1.b", "_y"])
# A pattern as a tree: a name, or (a list of trees, how often).
TREES = st.recursive(
    NAMES, lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 4)), max_leaves=8
)
SPACES = st.sampled_from(["", " ", "  ", "\t", "\n"])


def written(tree: object, draw: st.DrawFn) -> str:
    if isinstance(tree, str):
        return tree
    parts, times = tree
    text = draw(st.sampled_from([" ", "  ", "\n"])).join(written(part, draw) for part in parts)
    text = f"({draw(SPACES)}{text}{draw(SPACES)})" if len(parts) > 1 or not isinstance(parts[0], str) else text
    return text if times == 1 else f"{text}{draw(SPACES)}*{draw(SPACES)}{times}"


def expanded(tree: object) -> list[str]:
    return [tree] if isinstance(tree, str) else [name for part in tree[0] for name in expanded(part)] * tree[1]


@settings(max_examples=200, deadline=None)
@given(st.lists(TREES, min_size=1, max_size=4), st.data())
def test_a_pattern_is_its_expansion(trees: list, data: st.DataObject) -> None:
    text = " ".join(written(tree, data.draw) for tree in trees)
    names = [name for tree in trees for name in expanded(tree)]
    assert parse(text) == names
    assert parse(names) == names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", "a"),
        ("  a  ", "a"),
        ("a*1", "a"),
        ("a*3 b", "a a a b"),
        ("a * 2 b", "a a b"),
        ("(a b)*2", "a b a b"),
        ("(a*2 b)*2 c", "a a b a a b c"),
        ("((a))", "a"),
        ("((a b)*2 c)*2", "a b a b c a b a b c"),
        ("a(b)c", "a b c"),
        ("a*002", "a a"),
    ],
)
def test_examples(pattern: str, names: str) -> None:
    assert parse(pattern) == names.split()


def test_minimax() -> None:
    layers = parse("(lightning*7 softmax)*10")
    assert len(layers) == 80
    assert [i for i, name in enumerate(layers) if name == "softmax"] == list(range(7, 80, 8))


MISTAKES = [
    ("", 0, "a block name is missing before the end"),
    ("   ", 0, "a block name is missing before the end"),
    ("*2", 0, "a block name is missing before '*'"),
    ("a*", 2, "'*' needs a number from 1, got nothing"),
    ("a*0", 2, "'*' needs a number from 1, got '0'"),
    ("a*b", 2, "'*' needs a number from 1, got 'b'"),
    ("a**2", 2, "'*' needs a number from 1, got '*'"),
    ("a*(2)", 2, "'*' needs a number from 1, got '('"),
    ("a*9999999999", 2, "'*' needs a number from 1, got '9999999999'"),
    ("a*2*3", 3, "unexpected '*'; remove it"),
    ("a 3", 2, "unexpected '3'; remove it"),
    ("3", 0, "a block name is missing before '3'"),
    ("(a b", 0, "this parenthesis is never closed"),
    ("a (b (c)", 2, "this parenthesis is never closed"),
    ("a b)", 3, "unexpected ')'; remove it"),
    ("()", 1, "a block name is missing before ')'"),
    ("a ()*2", 3, "a block name is missing before ')'"),
    ("a, b", 1, "unexpected ','; use block names, *, ( and )"),
    ("a + b", 2, "unexpected '+'; use block names, *, ( and )"),
    ("a*-1", 2, "unexpected '-'; use block names, *, ( and )"),
    ("a*1.5", 3, "unexpected '.'; use block names, *, ( and )"),
    ("aé", 1, "unexpected 'é'; use block names, *, ( and )"),
    ("a*٣", 2, "unexpected '٣'; use block names, *, ( and )"),
    ("[a]", 0, "unexpected '['; use block names, *, ( and )"),
    ("a*10001", 2, "more than 10000 layers"),
    ("(a*101)*100", 8, "more than 10000 layers"),
    ("a*9000 b*1001", 7, "more than 10000 layers"),
    ("(" * 51 + "a" + ")" * 51, 50, "parentheses nest deeper than 50"),
]


@pytest.mark.parametrize(("pattern", "column", "problem"), MISTAKES)
def test_mistakes(pattern: str, column: int, problem: str) -> None:
    with pytest.raises(PatternError) as error:
        parse(pattern)
    line, shown, caret = str(error.value).split("\n")
    assert line == problem
    assert shown[2:] == pattern[: column + 20]
    assert caret == "  " + " " * column + "^"


def test_a_long_pattern_is_cut_around_the_mistake() -> None:
    pattern = "a " * 500 + "+ " + "b " * 500
    with pytest.raises(PatternError) as error:
        parse(pattern)
    _, shown, caret = str(error.value).split("\n")
    assert len(shown) < 100
    assert shown[caret.index("^")] == "+"


def test_lines_and_tabs_stay_on_one_line() -> None:
    with pytest.raises(PatternError) as error:
        parse("a\n\tb*0")
    _, shown, caret = str(error.value).split("\n")
    assert shown == "  a  b*0"
    assert shown[caret.index("^")] == "0"


def test_limits_are_inclusive() -> None:
    assert len(parse("(a*100)*100")) == MAX_LAYERS
    assert parse("(" * 50 + "a" + ")" * 50) == ["a"]
    with pytest.raises(PatternError, match="10001 layers; at most 10000"):
        parse(["a"] * (MAX_LAYERS + 1))
    with pytest.raises(PatternError, match="the pattern is empty"):
        parse([])


@settings(max_examples=300, deadline=None)
@given(st.text("ab*()0123 \n-+é", max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(PatternError):
        assert 1 <= len(parse(text)) <= MAX_LAYERS


def test_long_texts_are_refused() -> None:
    for text in ("a " * 20_000, "(" * 20_000, "a*1 " * 20_000, "(a)*1" * 20_000, "a" * 20_000 + "*"):
        with pytest.raises(PatternError):
            parse(text)


@pytest.mark.parametrize(
    ("names", "period"),
    [("a", 1), ("aaa", 1), ("ab", 2), ("abab", 2), ("aba", 3), ("aabaab", 3), ("aabaaba", 7), ("abcabc" * 50, 3)],
)
def test_shortest_period(names: str, period: int) -> None:
    assert shortest_period(list(names)) == period


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ("a", "a"),
        ("aaa", "a*3"),
        ("aab", "a*2 b"),
        ("abab", "(a b)*2"),
        ("aabaab", "(a*2 b)*2"),
        ("aabaa", "a*2 b a*2"),
        ("abababa", "a b a b a b a"),
        ("aabb", "a*2 b*2"),
    ],
)
def test_spell(names: str, pattern: str) -> None:
    assert spell(list(names)) == pattern and parse(pattern) == list(names)


@given(st.lists(st.sampled_from(["a", "b", "lightning"]), min_size=1, max_size=40))
def test_what_is_spelled_parses_back(names: list[str]) -> None:
    assert parse(spell(names)) == names
