"""softmax_attention: both backends against each other, against torch's own attention, and against their contract."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.helpers import relative_error
from zoo.ops import dispatch
from zoo.ops.softmax_attention import chunked, softmax_attention

# The worst relative error of an output or a gradient; float32 was measured at 3e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
LENGTHS = [1, 2, 31, 64, 65, 127]
LIMITS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 7},
    {"window": 7, "num_sinks": 3},
    {"softcap": 0.7, "scale": 1.3},
    {"window": 7, "num_sinks": 3, "softcap": 2.0},
    {"window": 100, "num_sinks": 4},
    {"window": 1000, "num_sinks": 2},
]
DOCUMENTS = [0, 0, 1, 65, 65, 66, 150, 150]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 queries or a little more, so that short sequences have several."""
    monkeypatch.setattr(chunked, "MAX_LOGITS", 2**12)


def make(batch: int, length: int, key_length: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (5, 3)):
    torch.manual_seed(length)
    shapes = [(length, heads[0], dims[0]), (key_length, heads[1], dims[0]), (key_length, heads[1], dims[1])]
    return [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]


def run(backend: str, tensors: list[Tensor], dtype: torch.dtype, return_lse: bool, **options: Any) -> list[Tensor]:
    """out, and the gradients of q, k and v; with `return_lse` also exp(lse), and the gradients go through it too."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    with dispatch.backend(backend):
        result = softmax_attention(*leaves, return_lse=return_lse, **options)
    # exp(-inf) = 0 is where an empty row is compared.
    results = [result[0], result[1].exp()] if return_lse else [result]
    weights = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, dtype=torch.float64, generator=weights).to(dtype) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


def check(tensors: list[Tensor], dtype: torch.dtype = torch.float64, return_lse: bool = True, **options: Any) -> None:
    expected = run("reference", tensors, torch.float64, return_lse, **options)
    scale = max(x.norm().item() for x in expected)
    for x, y in zip(run("torch", tensors, dtype, return_lse, **options), expected, strict=True):
        # A query that sees one key has no gradient but rounding: then compare with the rest.
        error = relative_error(x, y) if y.norm() > 1e-12 * scale else x.norm().item() / scale
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("length", [*LENGTHS, 300])
def test_torch_equals_reference(length: int, limits: dict[str, Any]) -> None:
    check(make(2, length, length), **limits)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(("length", "key_length"), [(1, 40), (7, 40), (70, 75)])
def test_fewer_queries_than_keys(length: int, key_length: int, limits: dict[str, Any]) -> None:
    check(make(2, length, key_length), **limits)


@pytest.mark.parametrize("dims", [(8, 8), (8, 3), (3, 8)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9}, {"scale": 2.0}, {"softcap": 1.5}])
@pytest.mark.parametrize("length", [1, 30, 70])
def test_without_lse(length: int, options: dict[str, Any], heads: tuple[int, int], dims: tuple[int, int]) -> None:
    check(make(2, length, 70, heads, dims), return_lse=False, **options)


@pytest.mark.parametrize("limits", [*LIMITS, {"causal": False}])
@pytest.mark.parametrize("bounds", [[0, 1], DOCUMENTS, list(range(0, 70))])
def test_documents_equal_reference(bounds: list[int], limits: dict[str, Any]) -> None:
    check(make(1, bounds[-1], bounds[-1]), cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **limits)


@pytest.mark.parametrize("limits", LIMITS)
def test_documents_equal_each_document_alone(limits: dict[str, Any]) -> None:
    tensors = make(1, 150, 150)
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
    out, lse = softmax_attention(*tensors, cu_seqlens=cu_seqlens, return_lse=True, **limits)
    for start, stop in pairwise(DOCUMENTS):
        if start < stop:
            alone = softmax_attention(*(x[:, start:stop] for x in tensors), return_lse=True, **limits)
            assert relative_error(out[:, start:stop], alone[0]) < 1e-13
            assert relative_error(lse[:, start:stop], alone[1]) < 1e-13


def padding(kind: str, key_length: int) -> Tensor:
    index = torch.arange(key_length)
    if kind == "interior":
        mask = torch.rand(3, key_length, generator=torch.Generator().manual_seed(0)) > 0.4
        mask[0, -1] = True
        return mask
    real = torch.tensor([[key_length], [key_length // 2], [0]])  # the last row has no key at all
    return index < real if kind == "right" else index >= key_length - real


@pytest.mark.parametrize("limits", [*LIMITS, {"causal": False}])
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize(("length", "key_length"), [(1, 30), (33, 100), (100, 100)])
def test_key_mask_equals_reference(length: int, key_length: int, kind: str, limits: dict[str, Any]) -> None:
    check(make(3, length, key_length), key_mask=padding(kind, key_length), **limits)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
def test_padded_rows_equal_each_row_alone(kind: str, limits: dict[str, Any], backend: str) -> None:
    tensors = [x.requires_grad_() for x in make(3, 60, 60)]
    mask = padding(kind, 60)
    with dispatch.backend(backend):
        out, lse = softmax_attention(*tensors, key_mask=mask, return_lse=True, **limits)
        for row in range(3):
            real = mask[row]
            assert (out[row, ~real] == 0).all() and lse[row, ~real].isneginf().all()
            if real.any():
                alone = softmax_attention(*(x[row : row + 1, real] for x in tensors), return_lse=True, **limits)
                assert relative_error(out[row, real], alone[0][0]) < 1e-13
                assert relative_error(lse[row, real], alone[1][0]) < 1e-13
    # A NaN gradient for the -inf of an empty row, as merging two of them gives, must not spread.
    grad_lse = torch.ones_like(lse).masked_fill(lse.isneginf(), torch.nan if backend == "torch" else 0.0)
    for grad in torch.autograd.grad([out, lse], tensors, [torch.ones_like(out), grad_lse]):
        assert grad.isfinite().all() and (grad[~mask] == 0).all() and grad[0, mask[0]].any()


@pytest.mark.parametrize("options", [{}, {"window": 50, "num_sinks": 4}, {"softcap": 1.5}])
def test_float32(options: dict[str, Any]) -> None:
    check(make(2, 130, 130, dims=(16, 16)), torch.float32, **options)
    check(make(2, 130, 130, dims=(16, 16)), torch.float32, return_lse=False, **options)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"cu_seqlens": torch.tensor([0, 60, 130], dtype=torch.int32)}])
def test_bfloat16_keeps_a_float32_lse(options: dict[str, Any]) -> None:
    half = [x.bfloat16() for x in make(1, 130, 130, dims=(16, 16))]
    out, lse = softmax_attention(*half, return_lse=True, **options)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    with dispatch.backend("reference"):
        expected = softmax_attention(*(x.double() for x in half), return_lse=True, **options)
    assert relative_error(out, expected[0]) < 3e-3  # the rounding of out alone
    assert relative_error(lse, expected[1]) < 1e-6
    assert relative_error(softmax_attention(*half, **options), expected[0]) < 1e-2


def test_equals_torch_with_an_explicit_mask() -> None:
    q, k, v = make(1, 90, 90, heads=(2, 2))
    own, key = torch.arange(90)[:, None], torch.arange(90)[None]
    document, start = (key >= 40) * 1, torch.where(own >= 40, 40, 0)
    mask = (key <= own) & (document == document.T) & ((own - key < 6) | (key - start < 2))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    cu_seqlens = torch.tensor([0, 40, 90], dtype=torch.int32)
    for backend in ("reference", "torch"):
        with dispatch.backend(backend):
            out = softmax_attention(q, k, v, window=6, num_sinks=2, cu_seqlens=cu_seqlens)
        assert relative_error(out, expected.transpose(1, 2)) < 1e-13


def test_softcap_equals_flex_attention() -> None:
    q, k, v = make(2, 40, 40, heads=(2, 2), dims=(8, 8))

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j <= i, 0.8 * torch.tanh(score / 0.8), -torch.inf)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        expected = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=capped, scale=1.7).transpose(1, 2)
    for backend in ("reference", "torch"):
        with dispatch.backend(backend):
            out = softmax_attention(q, k, v, scale=1.7, softcap=0.8)
        assert relative_error(out, expected) < 1e-13


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_gradcheck_of_the_reference(softcap: float | None) -> None:
    leaves = [x.requires_grad_() for x in make(1, 5, 5, heads=(2, 1), dims=(2, 2))]
    cu_seqlens = torch.tensor([0, 1, 1, 5], dtype=torch.int32)

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_attention(*x, window=2, num_sinks=1, softcap=softcap, cu_seqlens=cu_seqlens, return_lse=True)

    with dispatch.backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)


def test_flops_of_the_reference() -> None:
    tensors = make(2, 10, 10)
    with dispatch.backend("reference"), FlopCounterMode(display=False) as counter:
        softmax_attention(*tensors, window=3)
    visible = 1 + 2 + 8 * 3
    assert counter.get_total_flops() == 2 * visible * 2 * (5 + 3) * 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 20, "num_sinks": 2},
        {"softcap": 1.0},
        {"return_lse": True},
        {"key_mask": True},
        {"cu_seqlens": True},
    ],
)
@pytest.mark.parametrize("dims", [(8, 8), (8, 4)])
def test_saved_memory_is_linear_in_the_length(options: dict[str, Any], dims: tuple[int, int]) -> None:
    def saved_bytes(length: int) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        given = dict(options)
        if "key_mask" in given:
            given["key_mask"] = torch.ones(1, length, dtype=torch.bool)
        if "cu_seqlens" in given:
            given["cu_seqlens"] = torch.tensor([0, length // 2, length], dtype=torch.int32)
        leaves = [x.requires_grad_() for x in make(1, length, length, dims=dims)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            softmax_attention(*leaves, **given)
        return sum(storages.values())

    # One float64 [T, T] alone would be 8 * T * T.
    assert 0 < saved_bytes(1024) <= 2.01 * saved_bytes(512) < 8 * 512 * 512


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (40, {}),
        (40, {"causal": False}),
        (40, {"window": 9, "num_sinks": 2}),
        (10, {"window": 9}),
        (10, {}),
        (1, {}),
        (40, {"softcap": 0.5}),
    ],
)
@pytest.mark.parametrize("return_lse", [True, False])
def test_compiles_without_graph_breaks(length: int, options: dict[str, Any], return_lse: bool) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = softmax_attention(q, k, v, return_lse=return_lse, **options)
        return result[0].square().sum() + result[1].sin().sum() if return_lse else result.square().sum()

    tensors = make(2, length, 40, dims=(8, 8))
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for x, y in zip(*results, strict=True):
        assert relative_error(x, y) < 1e-13


def test_operator_contracts() -> None:
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    tensors = [x.requires_grad_() for x in make(2, 40, 50)]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*tensors, 0.3, 0.8, True, 9, 2, None, padding("interior", 50)[:2], True)
    torch.library.opcheck(chunked._forward, arguments, test_utils=utils)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 10, 4)}, "q, k and v must be"),
        ({"q": torch.ones(2, 11, 4, 5)}, "q must have 1 to 10 tokens"),
        ({"q": torch.ones(2, 0, 4, 5)}, "q must have 1 to 10 tokens"),
        ({"q": torch.ones(2, 10, 3, 5)}, "multiple of k's kv_heads"),
        ({"k": torch.ones(2, 10, 2, 6)}, "k must have"),
        ({"v": torch.ones(2, 9, 2, 3)}, "v must have"),
        ({"window": 0}, "window must be"),
        ({"window": 3, "causal": False}, "needs causal"),
        ({"num_sinks": -1}, "num_sinks must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"key_mask": torch.ones(2, 10)}, "key_mask must be bool"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, "key_mask must be bool"),
        ({"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32)}, "batch of 1"),
        (
            {"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32), "key_mask": torch.ones(2, 10, dtype=torch.bool)},
            "exclude each other",
        ),
        ({"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32), "q": torch.ones(2, 9, 4, 5)}, "as many queries"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = dict(zip("qkv", make(2, 10, 10), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        softmax_attention(**arguments)


def test_compiled_for_any_length():
    """The second length makes dynamo treat it as unknown."""
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="eager")
    for length in (40, 41, 7):
        q, k, v = (torch.randn(2, length, heads, 8) for heads in (4, 2, 2))
        assert relative_error(compiled(q, k, v), softmax_attention(q, k, v)) < 1e-6
