"""softmax_attention's Triton kernels: interpreted against the float64 reference, and what they are told of patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_linear_attention_kernels import interpreter  # noqa: F401  (a fixture)
from tests.ops.test_pattern import PATTERNS
from tests.ops.test_softmax_attention import DOCUMENTS, LIMITS, make, padding
from zoo.ops import dispatch
from zoo.ops.softmax_attention import Pattern, softmax_attention

kernels = pytest.importorskip("zoo.ops.softmax_attention.kernels")
computed = pytest.importorskip("zoo.ops.interval_attention.kernels")

# Float32 was measured at 7e-7 at worst; bfloat16 rounds the probabilities and the results.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BOTH = Pattern(window=4, num_sinks=3, stride=4, random_blocks=2, block_size=8)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of different sizes, several in few tokens, and far keys whose queries are shared out."""
    monkeypatch.setattr(computed, "FLOAT32", {256: computed._Tiles((32, 32), (16, 32), (32, 64), 1)})
    monkeypatch.setattr(computed, "MIN_TILES", 2)


def run(name: str, tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """out, exp(lse) (0 for an empty row) and the gradients of q, k and v through both."""
    device = "cpu" if name == "reference" else DEVICE
    leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in tensors]
    options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
    with dispatch.backend(name):
        out, lse = softmax_attention(*leaves, return_lse=True, **options)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    results = [out, lse.exp()]
    generator = torch.Generator().manual_seed(1)
    # Rounded to what bfloat16 has, so that every backend is given the same.
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, weights)]


def check(tensors: list[Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    tensors = [x.bfloat16().double() for x in tensors]
    expected = run("reference", tensors, torch.float64, **options)
    with poisoned_memory():
        got = run("triton", tensors, dtype, **options)
    scale = max(x.norm().item() for x in expected)
    for x, ref in zip(got, expected, strict=True):
        # A query that sees one key has no gradient but rounding: then compare with the rest.
        error = relative_error(x, ref) if ref.norm() > 1e-12 * scale else x.norm().item() / scale
        assert error < TOLERANCE[dtype], [relative_error(*pair) for pair in zip(got, expected, strict=True)]


@pytest.mark.parametrize("limits", [*LIMITS, {"causal": False}])
@pytest.mark.parametrize("length", [1, 75])
def test_equals_reference(length: int, limits: dict[str, Any]) -> None:
    check(make(1, length, length, (4, 2)), **limits)


@pytest.mark.parametrize("limits", [{}, LIMITS[3], {"causal": False}])
@pytest.mark.parametrize("length", [1, 33])
def test_fewer_queries_than_keys(length: int, limits: dict[str, Any]) -> None:
    check(make(2, length, 40, (2, 1)), **limits)


@pytest.mark.parametrize("limits", [{}, LIMITS[2], LIMITS[3], {"causal": False}])
def test_documents(limits: dict[str, Any]) -> None:
    check(make(1, 80, 80, (2, 1)), cu_seqlens=torch.tensor([0, 0, 1, 40, 40, 41, 80, 80], dtype=torch.int32), **limits)


@pytest.mark.parametrize("limits", [{}, LIMITS[2], LIMITS[3], {"causal": False}])
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
def test_key_mask(kind: str, limits: dict[str, Any]) -> None:
    check(make(3, 33, 45, (1, 1)), key_mask=padding(kind, 45), **limits)


@pytest.mark.parametrize("pattern", [*PATTERNS, BOTH], ids=str)
def test_patterns(pattern: Pattern) -> None:
    length = 40 if pattern.random_blocks else 70  # each of their blocks has tiles of its own
    check(make(1, length, length, (2, 1)), pattern=pattern, softcap=0.8)


def test_a_stride_that_the_text_does_not_reach() -> None:
    check(make(1, 20, 20, (2, 1)), pattern=Pattern(8, stride=100))
    check(make(2, 9, 9, (1, 1)), pattern=Pattern(2, stride=11), key_mask=padding("left", 9)[:2])


@pytest.mark.parametrize("pattern", [PATTERNS[2], BOTH], ids=str)
def test_patterns_of_padded_rows_and_documents(pattern: Pattern) -> None:
    check(make(1, 7, 60, (2, 1)), pattern=pattern)
    check(make(3, 20, 30, (1, 1)), pattern=pattern, key_mask=padding("interior", 30))
    check(make(1, 60, 60, (1, 1)), pattern=pattern, cu_seqlens=torch.tensor([0, 0, 1, 34, 34, 60], dtype=torch.int32))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 40, "num_sinks": 4}, {"softcap": 1.5}])
def test_lower_precision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(make(1, 80, 80, (2, 1), (16, 16)), dtype, **options)


def visible(layout: Any, batch: int, length: int, key_length: int) -> Tensor:
    """`[batch, length, key_length]`: how often a query sees a key."""
    counts = torch.zeros(batch, length, key_length, dtype=torch.int64)
    keys = torch.arange(key_length)[None] if layout.keys is None else layout.keys
    for row in range(batch):
        first, stop = (x[:, row % x.shape[1], :, None] for x in (layout.first, layout.stop))
        own = keys[row % len(keys)]
        index = torch.arange(len(own))
        seen = (index >= first) & (index < stop)
        if layout.is_real is not None:
            seen &= layout.is_real[row % len(layout.is_real)]
        assert not seen[layout.near :, :, : layout.far[0]].any() and not seen[layout.near :, :, layout.far[1] :].any()
        placed = torch.zeros(seen.shape[1], key_length, dtype=torch.int64).index_add_(1, own, seen.long().sum(0))
        if layout.in_order:
            for begin, end in zip(first[: layout.near, :, 0], stop[: layout.near, :, 0], strict=True):
                some = begin < end
                assert (begin[some].diff() >= 0).all() and (end[some].diff() >= 0).all()
        if layout.outputs is not None:
            outputs = layout.outputs[row % len(layout.outputs)]
            queries = layout.queries[row % len(layout.queries)]
            sees = placed.any(1)
            assert sees.sum() == sees[outputs].sum()  # what stands nowhere sees nothing
            assert (queries[outputs] == torch.arange(length))[sees[outputs]].all()
            placed = placed[outputs]
        counts[row] = placed
    return counts


@pytest.mark.parametrize("pattern", [*PATTERNS, BOTH, Pattern(5, 3), Pattern(num_sinks=3, dilation=2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 8])
def test_intervals_are_what_the_pattern_says(tokens: int, pattern: Pattern) -> None:
    def expected(documents: list[Tensor], length: int, key_length: int) -> Tensor:
        seen = torch.zeros(key_length, key_length, dtype=torch.int64)
        for each in documents:
            rank = torch.arange(len(each))
            seen[each[:, None], each] = pattern.visible(rank[:, None], rank).long()
        return seen[key_length - length :]

    for length, key_length in [(1, 1), (1, 40), (7, 40), (70, 75), (90, 90)]:
        index = torch.arange(key_length)
        layout = kernels.laid_out(length, key_length, pattern, None, None, tokens, CPU)
        assert torch.equal(visible(layout, 1, length, key_length)[0], expected([index], length, key_length))
        for kind in ("left", "right", "interior"):
            mask = padding(kind, key_length)
            layout = kernels.laid_out(length, key_length, pattern, None, mask, tokens, CPU)
            rows = torch.stack([expected([index[real]], length, key_length) for real in mask])
            assert torch.equal(visible(layout, 3, length, key_length), rows)
    for bounds in ([0, 1], DOCUMENTS, list(range(70)), [0, 0, 90, 90]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        layout = kernels.laid_out(bounds[-1], bounds[-1], pattern, cu_seqlens, None, tokens, CPU)
        documents = list(torch.arange(bounds[-1]).tensor_split(cu_seqlens[1:-1].long()))
        assert torch.equal(visible(layout, 1, bounds[-1], bounds[-1])[0], expected(documents, bounds[-1], bounds[-1]))


@pytest.mark.parametrize("options", [{"window": 9, "num_sinks": 2}, {"pattern": PATTERNS[-1]}])
def test_compiles_into_one_graph(options: dict[str, Any]) -> None:
    leaves = [x.to(DEVICE).float().requires_grad_() for x in make(1, 40, 40, (2, 1))]

    def function(*leaves: Tensor) -> Tensor:
        with dispatch.backend("triton"):
            out, lse = softmax_attention(*leaves, return_lse=True, **options)
        return out.sin().sum() + lse.sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves), function(*leaves)
    assert relative_error(got, expected) < 1e-6
    assert max(map(relative_error, *(torch.autograd.grad(x, leaves) for x in (got, expected)))) < 1e-6
