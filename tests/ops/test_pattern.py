"""Attention under a Pattern: which keys are visible, by a definition written out here; the counts; both backends."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.helpers import relative_error
from tests.ops.test_softmax_attention import DOCUMENTS, check, make, padding
from zoo.ops import dispatch
from zoo.ops.softmax_attention import Pattern, patterned, softmax_attention

PATTERNS = [
    Pattern(window=3, dilation=4),
    Pattern(dilation=3),
    Pattern(window=4, dilation=2, num_sinks=5),
    Pattern(dilation=7, num_sinks=2),
    Pattern(window=5, stride=6),
    Pattern(window=2, stride=1),
    Pattern(window=5, num_sinks=9, stride=4),
    Pattern(window=3, random_blocks=2, block_size=4),
    Pattern(window=9, num_sinks=6, random_blocks=3, block_size=5, seed=11),
    Pattern(window=1, num_sinks=1, stride=9, random_blocks=1, block_size=8, seed=2),
]
LENGTHS = [1, 2, 31, 64, 65, 127, 300]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 queries, so that short sequences have several."""
    monkeypatch.setattr(patterned, "MAX_LOGITS", 2**10)


def sees(pattern: Pattern, t: int, j: int) -> bool:
    """Whether the query at t sees the key at j: the definition, one pair at a time."""
    if j > t:
        return False
    if (t - j) % pattern.dilation == 0 and (pattern.window is None or (t - j) // pattern.dilation < pattern.window):
        return True
    if j < pattern.num_sinks:
        return True
    if pattern.stride is not None and (j + 1) % pattern.stride == 0:
        return True
    drawn = pattern.chosen(torch.tensor([t // pattern.block_size])).flatten().tolist() if pattern.random_blocks else []
    return j // pattern.block_size in drawn


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 5, 37, 64, 90])
def test_visible_keys_and_their_count(pattern: Pattern, length: int) -> None:
    index = torch.arange(length)
    visible = pattern.visible(index[:, None], index)
    assert visible.tolist() == [[sees(pattern, t, j) for j in range(length)] for t in range(length)]
    assert pattern.visible_pairs(length) == int(visible.sum())
    for size in (1, 3, 16):
        for start in range(pattern.dilation):
            for own in index[start :: pattern.dilation].split(size):
                if own.numel():
                    assert pattern.keys(own).tolist() == visible[own].any(0).nonzero().flatten().tolist()
    if pattern.reach is not None:
        beyond = (index[:, None] - index >= pattern.reach) & (index >= pattern.num_sinks)
        assert not (visible & beyond).any()
    assert Pattern.of(pattern.numbers()) == pattern


def test_plain_counts_and_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for plain in (Pattern(), Pattern(window=4), Pattern(window=4, num_sinks=3)):
        index = torch.arange(30)
        assert plain.visible_pairs(30) == int(plain.visible(index[:, None], index).sum())
    pattern = PATTERNS[-1]
    whole = pattern.visible_pairs(5000)
    module = sys.modules[Pattern.__module__]
    monkeypatch.setattr(module, "AT_ONCE", 777)
    module._count.cache_clear()
    assert pattern.visible_pairs(5000) == whole


def test_random_blocks_are_different_earlier_ones_and_spread() -> None:
    blocks = torch.arange(2000)
    chosen = Pattern(window=1, random_blocks=3, seed=5).chosen(blocks)
    for block, row in zip(blocks.tolist(), chosen.T.tolist(), strict=True):
        drawn = [each for each in row if each >= 0]
        assert len(drawn) == len(set(drawn)) == min(3, block) and all(each < block for each in drawn)
    assert torch.equal(chosen[:, 700:900], Pattern(window=1, random_blocks=3, seed=5).chosen(blocks[700:900]))
    assert not torch.equal(chosen, Pattern(window=1, random_blocks=3, seed=6).chosen(blocks))
    relative = (chosen[:, 100:] + 0.5) / blocks[100:]
    assert abs(relative.mean() - 0.5) < 0.02 and abs(relative.var() - 1 / 12) < 0.01  # uniform


def test_the_draw_is_fixed_for_ever() -> None:
    """A trained model relies on it."""
    chosen = Pattern(window=1, random_blocks=2, seed=3).chosen(torch.tensor([1, 2, 5, 1000, 10**6]))
    assert chosen.T.tolist() == [[-1, 0], [0, 1], [1, 3], [953, 233], [243699, 721306]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_torch_equals_reference(length: int, pattern: Pattern) -> None:
    check(make(2, length, length), pattern=pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("length", "key_length"), [(1, 40), (7, 40), (70, 75)])
def test_fewer_queries_than_keys(length: int, key_length: int, pattern: Pattern) -> None:
    check(make(2, length, key_length), pattern=pattern)
    check(make(1, length, key_length), pattern=pattern, return_lse=False, softcap=0.8, scale=1.3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("bounds", [[0, 1], DOCUMENTS, list(range(0, 70))])
def test_documents_equal_reference(bounds: list[int], pattern: Pattern) -> None:
    check(make(1, bounds[-1], bounds[-1]), cu_seqlens=torch.tensor(bounds, dtype=torch.int32), pattern=pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_documents_equal_each_document_alone(pattern: Pattern) -> None:
    tensors = make(1, 150, 150)
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
    out, lse = softmax_attention(*tensors, cu_seqlens=cu_seqlens, return_lse=True, pattern=pattern)
    for start, stop in pairwise(DOCUMENTS):
        if start < stop:
            alone = softmax_attention(*(x[:, start:stop] for x in tensors), return_lse=True, pattern=pattern)
            assert relative_error(out[:, start:stop], alone[0]) < 1e-13
            assert relative_error(lse[:, start:stop], alone[1]) < 1e-13


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize(("length", "key_length"), [(1, 30), (33, 100), (100, 100)])
def test_key_mask_equals_reference(length: int, key_length: int, kind: str, pattern: Pattern) -> None:
    check(make(3, length, key_length), key_mask=padding(kind, key_length), pattern=pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_torch_with_an_explicit_mask(pattern: Pattern) -> None:
    q, k, v = make(2, 90, 90, heads=(2, 2))
    mask = torch.tensor([[sees(pattern, t, j) for j in range(90)] for t in range(90)])
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    for backend in ("reference", "torch"):
        with dispatch.backend(backend):
            assert relative_error(softmax_attention(q, k, v, pattern=pattern), expected) < 1e-13


@pytest.mark.parametrize("pattern", [PATTERNS[2], PATTERNS[-1]], ids=str)
def test_float32_and_bfloat16(pattern: Pattern) -> None:
    check(make(2, 130, 130, dims=(16, 16)), torch.float32, pattern=pattern)
    half = [x.bfloat16() for x in make(1, 130, 130, dims=(16, 16))]
    out, lse = softmax_attention(*half, return_lse=True, pattern=pattern)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    with dispatch.backend("reference"):
        expected = softmax_attention(*(x.double() for x in half), return_lse=True, pattern=pattern)
    assert relative_error(out, expected[0]) < 1e-2
    assert relative_error(lse, expected[1]) < 1e-6


def test_a_plain_pattern_is_the_window() -> None:
    tensors = make(2, 80, 80)
    plain = softmax_attention(*tensors, pattern=Pattern(window=9, num_sinks=2))
    assert torch.equal(plain, softmax_attention(*tensors, window=9, num_sinks=2))


def test_a_window_of_everything_is_full_attention() -> None:
    tensors = make(2, 80, 80)
    full = softmax_attention(*tensors)
    for pattern in (Pattern(window=80, stride=5), Pattern(window=1, stride=1), Pattern(num_sinks=80, dilation=9)):
        assert relative_error(softmax_attention(*tensors, pattern=pattern), full) < 1e-13


def test_flops_of_both_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference computes what is visible; the blocks of torch compute less than all pairs."""
    monkeypatch.setattr(patterned, "MAX_LOGITS", 2**20)
    for pattern in (Pattern(window=64, dilation=8), Pattern(window=32, random_blocks=1, block_size=32)):
        visible = pattern.visible_pairs(600)
        tensors = make(1, 600, 600)
        with FlopCounterMode(display=False) as counter, dispatch.backend("reference"):
            softmax_attention(*(x[:, :100] for x in tensors), pattern=pattern)
        assert counter.get_total_flops() == 2 * pattern.visible_pairs(100) * (5 + 3) * 4
        touched = 0
        for block in patterned._blocks(*tensors[:2], pattern, None, None):
            assert not block.hidden.all(0).any()  # no key that nobody sees
            touched += block.hidden.numel()
        assert visible <= touched < 4 * visible and touched < 600 * 600 / 2


@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[-1]], ids=str)
def test_saved_memory_is_linear_in_the_length(pattern: Pattern) -> None:
    def saved_bytes(length: int) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = [x.requires_grad_() for x in make(1, length, length)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            softmax_attention(*leaves, pattern=pattern)
        return sum(storages.values())

    assert 0 < saved_bytes(1024) <= 2.01 * saved_bytes(512) < 8 * 512 * 512


def test_compiles_without_graph_breaks() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = softmax_attention(q, k, v, return_lse=True, pattern=PATTERNS[-1])
        return out.square().sum() + lse.sin().sum()

    tensors = make(2, 40, 40, dims=(8, 8))
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for x, y in zip(*results, strict=True):
        assert relative_error(x, y) < 1e-13


def test_operator_contracts() -> None:
    tensors = [x.requires_grad_() for x in make(2, 40, 50)]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*tensors, 0.3, 0.8, PATTERNS[-1].numbers(), None, padding("interior", 50)[:2])
    torch.library.opcheck(patterned.forward, arguments, test_utils=utils)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dilation": 0}, "dilation must be at least 1"),
        ({"window": 0}, "window must be"),
        ({"num_sinks": -1}, "num_sinks"),
        ({"stride": 4}, "need a window"),
        ({"window": 4, "stride": 4, "dilation": 2}, "without dilation"),
    ],
)
def test_wrong_patterns(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern(**change)


@pytest.mark.parametrize("change", [{"window": 3}, {"num_sinks": 1}, {"causal": False}])
def test_a_pattern_stands_alone(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pattern holds window and num_sinks"):
        softmax_attention(*make(1, 10, 10), pattern=PATTERNS[0], **change)
