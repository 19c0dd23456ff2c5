"""zoo/ops/interval_attention: chunks of queries against the reference; that against SDPA and flash-linear-attention."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.ops.helpers import Largest, poisoned_memory, relative_error
from zoo.ops import backend, interval_attention
from zoo.ops.interval_attention import chunked

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAMES = ("q", "k", "v", "out", "lse")
BACKENDS = ("reference", "torch")


@pytest.fixture(autouse=True, params=[2**19, 500], ids=["one chunk", "many"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_LOGITS", request.param)


def make(batch: int, length: int, key_length: int, heads=(4, 2), dims=(5, 3)) -> list[Tensor]:
    """q, k, v, first and stop; some intervals are empty, the first and last queries' too."""
    torch.manual_seed(length)
    shapes = [(length, heads[0], dims[0]), (key_length, heads[1], dims[0]), (key_length, heads[1], dims[1])]
    tensors = [torch.randn(batch, *shape).bfloat16().double() for shape in shapes]
    first, stop = torch.randint(0, key_length + 1, (2, batch, length))
    return [*tensors, first, stop]


def run(name: str, tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """out, exp(lse) (0 for an empty row) and the gradients of q, k and v through both."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
    with backend(name), poisoned_memory():
        out, lse = interval_attention(*leaves, *tensors[3:], return_lse=True, **options)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    results = [out, lse.exp()]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in results]
    return dict(
        zip(["q", "k", "v", "out", "lse"], (*torch.autograd.grad(results, leaves, weights), *results), strict=True)
    )


def check(tensors: list[Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> None:
    expected = run("reference", tensors, torch.float64, **options)
    scale = max(x.norm().item() for x in expected.values())
    for name, x in run("torch", tensors, dtype, **options).items():
        ref = expected[name]
        error = relative_error(x, ref) if ref.norm() > 1e-12 * scale else x.norm().item() / max(scale, 1e-300)
        assert error < TOLERANCE[dtype], name


@pytest.mark.parametrize("name", BACKENDS)
def test_there_are_no_keys_beyond_the_ends(name: str) -> None:
    *tensors, first, stop = make(1, 9, 6)
    wide = torch.where(first == 0, -3, first), torch.where(stop == 6, 8, stop)
    for x, y in zip(
        run(name, [*tensors, *wide], torch.float64).values(),
        run(name, [*tensors, first, stop], torch.float64).values(),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("key_length", [1, 2, 17, 64])
@pytest.mark.parametrize("length", [1, 2, 31, 127, 128, 129, 260])
def test_torch_equals_reference(length: int, key_length: int) -> None:
    check(make(2, length, key_length))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dims", [(8, 8), (3, 8)])
def test_heads_and_dims(heads, dims) -> None:
    check(make(2, 40, 20, heads, dims), scale=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    check(make(2, 100, 30), dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_key_at_all(name: str) -> None:
    *leaves, first, stop = make(2, 5, 0)
    leaves = [x.requires_grad_() for x in leaves]
    with backend(name):
        out, lse = interval_attention(*leaves, first, stop, return_lse=True)
    assert out.shape == (2, 5, 4, 3) and not out.any() and (lse == -torch.inf).all()
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not grads[0].any() and grads[1].shape == leaves[1].shape


@pytest.mark.parametrize("name", BACKENDS)
def test_causal_intervals_are_dense_attention(name: str) -> None:
    q, k, v, _, _ = make(2, 50, 50, dims=(8, 8))
    stop = torch.arange(1, 51).expand(2, -1)
    with backend(name):
        out = interval_attention(q, k, v, torch.zeros_like(stop), stop)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert relative_error(out, dense.transpose(1, 2)) < 1e-14


@pytest.mark.parametrize("name", BACKENDS)
def test_equals_flash_linear_attention(name: str) -> None:
    naive = pytest.importorskip("fla.ops.nsa.naive").naive_nsa_compression
    q, k, v, _, _ = make(2, 70, 8, dims=(8, 8))
    stop = ((torch.arange(70) + 1) // 8).expand(2, -1)
    with backend(name):
        out, lse = interval_attention(q, k, v, torch.zeros_like(stop), stop, return_lse=True)
    theirs, their_lse = naive(q, k, v, 8, 8**-0.5)
    assert relative_error(out, theirs) < 1e-6 and relative_error(lse.exp(), their_lse.exp()) < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(name: str) -> None:
    *tensors, first, stop = make(1, 7, 5, (2, 1), (3, 2))
    leaves = [x.requires_grad_() for x in tensors]
    with backend(name):
        assert torch.autograd.gradcheck(lambda *x: interval_attention(*x, first, stop), leaves)


def test_an_empty_row_has_no_nan_gradient() -> None:
    """Merging two empty rows gives a NaN gradient for their -inf, which must not spread to rows beside them."""
    *tensors, first, _ = make(1, 6, 5)
    leaves = [x.requires_grad_() for x in tensors]
    first, stop = torch.zeros_like(first), torch.tensor([[0, 2, 0, 5, 0, 1]])
    out, lse = interval_attention(*leaves, first, stop, return_lse=True)
    grad_lse = torch.ones_like(lse)
    expected = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), grad_lse], retain_graph=True)
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, torch.nan)
    for got, wanted in zip(
        torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), grad_lse]), expected, strict=True
    ):
        assert torch.equal(got, wanted) and wanted.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 9, 4)}, "q, k and v must be"),
        ({"k": (2, 5, 2, 4)}, "k must have q's batch"),
        ({"v": (1, 4, 2, 4)}, "v must have k's"),
        ({"q": (1, 9, 3, 4)}, "multiple of k's kv_heads"),
        ({"first": (1, 8)}, "first must be whole numbers"),
        ({"stop": (2, 9)}, "stop must be whole numbers"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    shapes = {"q": (1, 9, 4, 4), "k": (1, 5, 2, 4), "v": (1, 5, 2, 4), "first": (1, 9), "stop": (1, 9)}
    tensors = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    for name in ("first", "stop"):
        tensors[name] = tensors[name].long()
    with pytest.raises(ValueError, match=message):
        interval_attention(**tensors)


def test_memory_is_linear() -> None:
    """Nothing as long as queries times keys is made, forward or backward."""
    length, heads = 4096, 2
    q, k, v, _, stop = (x.float() for x in make(1, length, length // 4, (heads, 1), (4, 4)))
    stop = (torch.arange(length)[None] + 1) // 4
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with Largest() as largest:
        interval_attention(*leaves, torch.zeros_like(stop), stop).sum().backward()
    assert largest.numbers <= max(chunked.MAX_LOGITS, length * heads * 4)


def test_queries_whose_keys_lie_far_apart_do_not_share_them() -> None:
    """Rows laid end to end, of one query each: the work is that of so many rows, not of its square."""
    queries, own = 64, 1000
    rows, keys = torch.randn(1, queries, 1, 1), torch.randn(1, queries * own, 1)
    first = torch.arange(0, queries * own, own)[None]
    parts = list(chunked.chunks(rows, keys, first, first + own))
    assert [i for part in parts for i in range(queries)[part.queries]] == list(range(queries))
    assert all(part.logits.numel() <= max(own, chunked.MAX_LOGITS) for part in parts)
    assert sum(part.logits.numel() for part in parts) <= chunked.MAX_WASTE * queries * own
