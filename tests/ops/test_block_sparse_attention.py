"""zoo/ops/block_sparse_attention: chunked PyTorch against the reference, that against SDPA and fla."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.ops.helpers import Largest, poisoned_memory, relative_error
from zoo.ops import backend, block_sparse_attention
from zoo.ops.block_sparse_attention import chunked
from zoo.ops.block_sparse_attention.places import Places

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DOCUMENTS = [0, 0, 1, 24, 24, 25, 61, 93, 93]
NAMES = ("q", "k", "v", "out", "lse")
BACKENDS = ("reference", "torch")


def make(batch: int, length: int, key_length: int, heads=(4, 2), dims=(5, 3), size: int = 8, blocks: int = 4):
    """q, k, v and block_indices: from -1 to beyond the end, with repetitions, and a query without any block."""
    torch.manual_seed(length + key_length)
    shapes = [(length, heads[0], dims[0]), (key_length, heads[1], dims[0]), (key_length, heads[1], dims[1])]
    indices = torch.randint(-1, key_length // size + 2, (batch, length, heads[1], blocks))
    if length > 1:
        indices[:, length // 2] = -1
    else:
        indices[..., 0] = (key_length - 1) // size
    # Rounded to bfloat16 so that every precision starts from the same numbers.
    return [torch.randn(batch, *shape).bfloat16().double() for shape in shapes], indices


def run(name: str, tensors: list[Tensor], indices: Tensor, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """out, exp(lse) (0 for an empty row) and the gradients of q, k and v through both."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    with backend(name), poisoned_memory():
        out, lse = block_sparse_attention(*leaves, indices, return_lse=True, **options)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    results = [out, lse.exp()]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in results]
    return dict(
        zip(["q", "k", "v", "out", "lse"], (*torch.autograd.grad(results, leaves, weights), *results), strict=True)
    )


def check(tensors: list[Tensor], indices: Tensor, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    expected = run("reference", tensors, indices, torch.float64, **options)
    scale = max(x.norm().item() for x in expected.values())
    for name, x in run("torch", tensors, indices, dtype, **options).items():
        # A query that sees one key has no gradient but rounding: then compare with the rest.
        ref = expected[name]
        error = relative_error(x, ref) if ref.norm() > 1e-12 * scale else x.norm().item() / scale
        assert error < TOLERANCE[dtype], name


@pytest.mark.parametrize("size", [1, 3, 8, 64])
@pytest.mark.parametrize("length", [1, 2, 7, 31, 63, 64, 65, 130])
def test_torch_equals_reference(length: int, size: int) -> None:
    check(*make(2, length, length, size=size), block_size=size)


@pytest.mark.parametrize(("length", "key_length"), [(1, 40), (7, 40), (70, 75)])
def test_fewer_queries_than_keys(length: int, key_length: int) -> None:
    check(*make(2, length, key_length), block_size=8)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dims", [(8, 8), (3, 8)])
def test_heads_and_dims(heads, dims) -> None:
    check(*make(2, 40, 40, heads, dims), block_size=8, scale=0.7)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("few", [False, True])
def test_operator_contracts(heads: tuple[int, int], few: bool) -> None:
    """Fake shapes, strides, aliasing and the autograd registration, as torch.library checks them, of tensors that lie
    transposed in memory."""
    tensors, indices = make(2, 1 if few else 20, 20, heads)
    tensors = [x.float().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    rest = indices, 8, 0.5, None, None
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked._operator, (*tensors, *rest), test_utils=utils)
    q, k, v = (x.detach() for x in tensors)
    out, lse, blocks = chunked._operator(q, k, v, *rest)
    arguments = (out, lse, q, k, v, blocks, out, lse, *rest[1:])
    torch.library.opcheck(chunked._backward_operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    check(*make(2, 100, 100), dtype, block_size=8)
    check(*make(1, 93, 93), dtype, block_size=8, cu_seqlens=torch.tensor(DOCUMENTS, dtype=torch.int32))


@pytest.mark.parametrize("bounds", [[0, 1], DOCUMENTS, list(range(30))])
def test_documents(bounds: list[int]) -> None:
    tensors, indices = make(1, bounds[-1], bounds[-1])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    check(tensors, indices, block_size=8, cu_seqlens=cu_seqlens)
    whole = run("torch", tensors, indices, torch.float64, block_size=8, cu_seqlens=cu_seqlens)["out"]
    for start, stop in pairwise(bounds):
        if start < stop:
            own = [x[:, start:stop] for x in tensors], indices[:, start:stop]
            alone = block_sparse_attention(*own[0], own[1], block_size=8)
            assert torch.allclose(whole[:, start:stop], alone, rtol=1e-12, atol=1e-12)


def padding(kind: str, key_length: int) -> Tensor:
    index = torch.arange(key_length)
    if kind == "interior":
        mask = torch.rand(3, key_length, generator=torch.Generator().manual_seed(0)) > 0.4
        mask[0, -1] = True
        return mask
    real = torch.tensor([[key_length], [key_length // 2], [0]])  # the last row has no key at all
    return index < real if kind == "right" else index >= key_length - real


@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize(("length", "key_length"), [(1, 30), (1, 200), (33, 100), (60, 60)])
def test_padded_rows(kind: str, length: int, key_length: int) -> None:
    tensors, indices = make(3, length, key_length)
    mask = padding(kind, key_length)
    check(tensors, indices, block_size=8, key_mask=mask)
    results = run("torch", tensors, indices, torch.float64, block_size=8, key_mask=mask)
    assert not results["out"][~mask[:, key_length - length :]].any()
    assert not results["k"][~mask].any() and not results["v"][~mask].any()
    if length == key_length:
        for row in range(3):
            real = mask[row]
            if real.any():
                own = [x[row : row + 1, real] for x in tensors]
                alone = block_sparse_attention(*own, indices[row : row + 1, real], block_size=8)
                assert torch.allclose(results["out"][row, real], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [1, 300])
def test_few_blocks_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_LOGITS", most)
    tensors, indices = make(3, 60, 60)
    mask = torch.arange(60) >= torch.tensor([[0], [11], [40]])
    check(tensors, indices, block_size=8, key_mask=mask)
    tensors, indices = make(1, 93, 93)
    check(tensors, indices, block_size=8, cu_seqlens=torch.tensor(DOCUMENTS, dtype=torch.int32))


def test_what_goes_together() -> None:
    """No query twice, and at most as many empty places as queries."""
    (q, k, _), indices = make(1, 93, 93)
    places = Places(q, k, 8, torch.tensor(DOCUMENTS, dtype=torch.int32), None)
    blocks = places.blocks(indices)
    batches, none = list(chunked._batches(places, blocks, 2)), blocks.numel()
    real = [batch.choices[batch.choices < none] for batch in batches]
    assert torch.cat(real).sort().values.equal((blocks.flatten() >= 0).nonzero()[:, 0])
    assert max(len(batch.choices) for batch in batches) > 2
    for batch, choices in zip(batches, real, strict=True):
        rows = batch.rows[batch.choices < none]
        assert len(rows.unique()) == len(rows) and 2 * len(choices) >= batch.choices.numel()


@pytest.mark.parametrize("length", [1, 30])
def test_nan_in_padding_stays_there(length: int) -> None:
    tensors, indices = make(2, length, 30)
    mask = torch.arange(30) >= torch.tensor([[0], [11]])
    poisoned = [x.masked_fill(~mask[:, -x.shape[1] :, None, None], torch.nan) for x in tensors]
    expected = run("torch", tensors, indices, torch.float64, block_size=8, key_mask=mask)
    for name, x in run("torch", poisoned, indices, torch.float64, block_size=8, key_mask=mask).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("name", BACKENDS)
def test_all_blocks_are_dense_attention(name: str) -> None:
    """In any order, each twice, with some beyond the end: torch's own attention."""
    (q, k, v), _ = make(2, 50, 50, dims=(8, 8))
    blocks = torch.cat([torch.randperm(9) - 1, torch.randperm(9) - 1]).expand(2, 50, 2, -1)
    with backend(name):
        out = block_sparse_attention(q, k, v, blocks, block_size=8)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert relative_error(out, dense.transpose(1, 2)) < 1e-14


@pytest.mark.parametrize("name", BACKENDS)
def test_equals_flash_linear_attention(name: str) -> None:
    naive = pytest.importorskip("fla.ops.nsa.naive").naive_nsa_selection
    (q, k, v), _ = make(2, 70, 70, dims=(8, 8))
    # Theirs counts a block as often as it is named, and an empty row is NaN.
    own = torch.arange(70)[None, :, None, None] // 8
    indices = torch.cat([own, own - 1, own - 3], -1).expand(2, -1, 2, -1).clone()
    indices[:, :, 1, 2] = -1
    indices = indices.clamp(min=-1)
    with backend(name):
        out = block_sparse_attention(q, k, v, indices, block_size=8)
    theirs = naive(q, k, v, indices, 8)
    assert relative_error(out, theirs) < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(name: str) -> None:
    (q, k, v), indices = make(1, 9, 9, (2, 1), (3, 2), size=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(*tensors, indices, block_size=2, return_lse=True)
        return out, lse.exp()

    with backend(name):
        assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_empty_row_gives_zero_and_no_nan(name: str) -> None:
    (q, k, v), indices = make(1, 8, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with backend(name):
        out, lse = block_sparse_attention(*leaves, torch.full_like(indices, -1), block_size=8, return_lse=True)
        none = block_sparse_attention(*leaves, indices[..., :0], block_size=8)
    assert not out.any() and not none.any() and (lse == -torch.inf).all()
    if name == "torch":
        for gradient in torch.autograd.grad(
            [out, lse], leaves, [torch.ones_like(out), torch.full_like(lse, torch.nan)]
        ):
            assert not gradient.any()


def test_only_out_or_only_lse_is_differentiated() -> None:
    (q, k, v), indices = make(1, 30, 30)
    for i in range(2):
        grads = {}
        for name in BACKENDS:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            with backend(name):
                result = block_sparse_attention(*leaves, indices, block_size=8, return_lse=True)[i]
            result.masked_fill(result == -torch.inf, 0).square().sum().backward()
            grads[name] = [leaves[0].grad, leaves[1].grad]
        for got, expected in zip(grads["torch"], grads["reference"], strict=True):
            assert relative_error(got, expected) < 1e-12


def test_memory_is_linear() -> None:
    """Nothing as long as queries times keys is made, forward or backward."""
    (q, k, v), _ = make(1, 4096, 4096, (2, 1), (4, 4), size=16)
    indices = torch.arange(4096)[None, :, None, None] // 16
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    with Largest() as largest:
        block_sparse_attention(*leaves, indices, block_size=16).sum().backward()
    assert largest.numbers <= 4 * 4096 * 2 * 4, largest.numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 9, 4)}, "q, k and v must be"),
        ({"k": (2, 9, 2, 4)}, "k must have q's batch"),
        ({"v": (1, 8, 2, 4)}, "v must have k's"),
        ({"q": (1, 9, 3, 4), "block_indices": (1, 9, 2, 2)}, "multiple of k's kv_heads"),
        ({"q": (1, 10, 4, 4)}, "as many as k at most"),
        ({"block_indices": (1, 9, 4, 2)}, "block_indices must be whole numbers"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"key_mask": (1, 8)}, "key_mask must be bool"),
        ({"key_mask": (1, 9), "cu_seqlens": [0, 9]}, "exclude each other"),
        ({"q": (1, 8, 4, 4), "block_indices": (1, 8, 2, 2), "cu_seqlens": [0, 9]}, "as many queries as keys"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    shapes = {"q": (1, 9, 4, 4), "k": (1, 9, 2, 4), "v": (1, 9, 2, 4), "block_indices": (1, 9, 2, 2)}
    options = {"block_size": 3} | {key: change[key] for key in change if key not in shapes}
    tensors = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    tensors["block_indices"] = tensors["block_indices"].long()
    if "key_mask" in options:
        options["key_mask"] = torch.ones(options["key_mask"], dtype=torch.bool)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**tensors, **options)
