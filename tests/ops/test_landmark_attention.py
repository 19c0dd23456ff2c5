"""landmark_attention: both backends against each other, against the paper's own formula, and against their contract."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.helpers import Largest, poisoned_memory, relative_error
from zoo.ops import backend, backends, landmark_attention, softmax_attention
from zoo.ops.landmark_attention import chosen, chunked

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}
DOCUMENTS = [0, 0, 1, 65, 65, 66, 150, 150]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few queries and pairs, so that short sequences have several."""
    monkeypatch.setattr(chunked, "MAX_LOGITS", 2**11)
    for name, most in (("MAX_LOGITS", 2**9), ("MAX_READ", 2**12), ("MAX_PART", 2**12), ("MAX_LIST", 8)):
        monkeypatch.setattr(chosen, name, most)


def make(batch: int, length: int, key_length: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (5, 3)):
    torch.manual_seed(length)
    shapes = [(length, heads[0], dims[0]), (key_length, heads[1], dims[0]), (key_length, heads[1], dims[1])]
    # Rounded to bfloat16 so that every precision starts from the same numbers.
    return [torch.randn(batch, *shape).bfloat16().double() for shape in shapes]


def every(block: int, batch: int, length: int) -> Tensor:
    """`[batch, length]`, a landmark after every `block` tokens."""
    return ((torch.arange(length) + 1) % (block + 1) == 0).expand(batch, length)


def at_random(share: float, batch: int, length: int, seed: int = 0) -> Tensor:
    """Landmarks anywhere: at the start, side by side, other ones in each row."""
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def run(name: str, tensors: list[Tensor], is_landmark: Tensor, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """out, and the gradients of q, k and v."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    with backend(name):
        out = landmark_attention(*leaves, is_landmark, **options)
    assert out.dtype == dtype
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def check(tensors: list[Tensor], is_landmark: Tensor, *dtypes: torch.dtype, **options: Any) -> None:
    expected = run("reference", tensors, is_landmark, torch.float64, **options)
    scale = max(x.norm().item() for x in expected) or 1.0  # a lone landmark sees nothing
    for dtype in dtypes or (torch.float64, torch.float32):
        with poisoned_memory():
            got = run("torch", tensors, is_landmark, dtype, **options)
        for name, x, y in zip(("out", "q", "k", "v"), got, expected, strict=True):
            # A query that sees one key has no gradient but rounding: then compare with the rest.
            error = relative_error(x, y) if y.norm() > 1e-9 * scale else x.norm().item() / scale
            assert error < TOLERANCE[dtype], (name, dtype, error)


@pytest.mark.parametrize("block", [1, 3, 16, 50, 500])
@pytest.mark.parametrize("length", [1, 2, 17, 63, 64, 65, 127, 129, 300])
def test_torch_equals_reference(length: int, block: int) -> None:
    check(make(2, length, length), every(block, 2, length))


TOP_K = pytest.mark.parametrize("top_k", [None, 2], ids=["all", "two"])


@TOP_K
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 31, 130])
def test_blocks_of_any_sizes(length: int, share: float, top_k: int | None) -> None:
    check(make(3, length, length), at_random(share, 3, length), top_k=top_k)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 3, 16, 50])
@pytest.mark.parametrize("length", [1, 2, 17, 64, 65, 129])
def test_the_best_blocks(length: int, block: int, top_k: int) -> None:
    check(make(2, length, length), every(block, 2, length), top_k=top_k)


@pytest.mark.parametrize("top_k", [43, 500])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_all_blocks_are_the_best_ones(name: str, top_k: int) -> None:
    """There are 43 at most."""
    tensors, is_landmark = make(2, 130, 130), at_random(0.3, 2, 130)
    expected = run(name, tensors, is_landmark, torch.float64)
    for x, y in zip(run(name, tensors, is_landmark, torch.float64, top_k=top_k), expected, strict=True):
        assert relative_error(x, y) < 1e-14
    fewer = run(name, tensors, is_landmark, torch.float64, top_k=3)
    assert relative_error(fewer[0], expected[0]) > 1e-2


def test_the_best_blocks_are_those_of_the_largest_logits() -> None:
    """A key that says which block it is, and a query that says which it wants."""
    is_landmark = every(4, 1, 80)
    q, k, v = torch.zeros(1, 80, 2, 16).double(), torch.zeros(1, 80, 1, 16).double(), torch.zeros(1, 80, 1, 16).double()
    for block in range(15):
        k[0, block * 5 + 4, 0, block] = 1.0
        v[0, block * 5 : block * 5 + 4, 0, block] = 1.0
    q[0, 79, 0, [3, 8]], q[0, 79, 1, [0, 14]] = 1000.0, 1000.0
    for name in ("reference", "torch"):
        with backend(name):
            out = landmark_attention(q, k, v, is_landmark, top_k=2)[0, 79]
        assert out[0].nonzero()[:, 0].tolist() == [3, 8] and out[1].nonzero()[:, 0].tolist() == [0, 14]


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_of_equal_logits_the_latest_block_is_read(name: str) -> None:
    """Equal but for rounding, and unequal by more than a step."""
    q, k, v = torch.ones(1, 40, 1, 4), torch.ones(1, 40, 1, 4), torch.zeros(1, 40, 1, 8)
    for block in range(8):
        v[0, block * 5 : block * 5 + 4, 0, block] = 1.0
    k[0, 4::5] *= 1 + 1e-6 * torch.tensor([7.0, 1, 6, 2, 5, 0, 4, 3])[:, None, None]
    k[0, 9] *= 1.05
    with backend(name):
        out = landmark_attention(q, k, v, every(4, 1, 40), top_k=3)[0, 38, 0]
    assert out.nonzero()[:, 0].tolist() == [1, 5, 6, 7]


def test_many_rows_of_one_query_are_not_compared_with_each_other() -> None:
    q, k, v = make(64, 1, 400, (2, 2))
    blocks = chosen._Blocks(q, every(4, 64, 400), None, None)
    size, spans = blocks._tiles(2)
    assert size * sum(stop - first for first, stop in spans) <= 4 * 64 * 79 + 64 * 64
    check([q, k, v], every(4, 64, 400), torch.float64, top_k=2)


def test_blocks_that_are_not_read_change_nothing() -> None:
    """Not even NaN in their keys; and they get no gradient."""
    q, k, v = make(1, 41, 41, (1, 1))
    q, is_landmark = q[:, -1:], every(4, 1, 41)
    expected, *_, grad_v = run("torch", [q, k, v], is_landmark, torch.float64, top_k=2)
    read = []
    for block in range(8):
        keys = slice(block * 5, block * 5 + 4)
        poisoned = k.clone()
        poisoned[:, keys] = torch.nan
        read.append(not torch.equal(landmark_attention(q, poisoned, v, is_landmark, top_k=2), expected))
        assert read[-1] == bool(grad_v[:, keys].any())
    assert sum(read) == 2


def test_one_long_block_among_short_ones() -> None:
    """The long one lies in several pieces."""
    is_landmark = every(1, 1, 200).clone()
    is_landmark[:, 40:160] = False
    check(make(1, 200, 200), is_landmark)
    layout = chunked._Layout(torch.zeros(1, 200, 1, 1), torch.zeros(1, 200, 1, 1), is_landmark[0], 1.0)
    assert len(layout.position) <= 2 * 200 and layout.piece_block.bincount().max() > 1


@TOP_K
@pytest.mark.parametrize("dims", [(8, 8), (8, 3), (3, 8)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)])
def test_heads_and_dimensions(heads: tuple[int, int], dims: tuple[int, int], top_k: int | None) -> None:
    check(make(2, 70, 70, heads, dims), every(8, 2, 70), scale=0.9, top_k=top_k)


@TOP_K
@pytest.mark.parametrize("block", [1, 7, 30])
@pytest.mark.parametrize(("length", "key_length"), [(1, 40), (1, 48), (7, 40), (70, 75)])
def test_fewer_queries_than_keys(length: int, key_length: int, block: int, top_k: int | None) -> None:
    tensors, is_landmark = make(2, length, key_length), every(block, 2, key_length)
    check(tensors, is_landmark, top_k=top_k)
    q = torch.cat([torch.zeros(2, key_length - length, 4, 5).double(), tensors[0]], 1)
    whole = landmark_attention(q, *tensors[1:], is_landmark, top_k=top_k)
    assert relative_error(landmark_attention(*tensors, is_landmark, top_k=top_k), whole[:, -length:]) < 1e-13


@TOP_K
@pytest.mark.parametrize("bounds", [[0, 1], DOCUMENTS, list(range(70))])
def test_documents(bounds: list[int], top_k: int | None) -> None:
    """Equal the reference, and each alone."""
    tensors, is_landmark = make(1, bounds[-1], bounds[-1]), at_random(0.2, 1, bounds[-1])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    check(tensors, is_landmark, cu_seqlens=cu_seqlens, top_k=top_k)
    out = landmark_attention(*tensors, is_landmark, cu_seqlens=cu_seqlens, top_k=top_k)
    for start, stop in pairwise(bounds):
        if start < stop:
            alone = landmark_attention(*(x[:, start:stop] for x in tensors), is_landmark[:, start:stop], top_k=top_k)
            assert torch.allclose(out[:, start:stop], alone, rtol=1e-13, atol=1e-13)


@TOP_K
@pytest.mark.parametrize("kind", ["left", "right", "between"])
@pytest.mark.parametrize(("length", "key_length"), [(1, 30), (33, 100), (100, 100)])
def test_padding(length: int, key_length: int, kind: str, top_k: int | None) -> None:
    """Equals the reference, and each row without its padding; garbage there changes nothing, and gets no gradient."""
    index, real = torch.arange(key_length), torch.tensor([[key_length], [key_length // 2], [0]])
    mask = {
        "left": index >= key_length - real,
        "right": index < real,
        "between": torch.rand(3, key_length, generator=torch.Generator().manual_seed(0)) > 0.4,
    }[kind]
    mask[0, -1] = True
    tensors, is_landmark = make(3, length, key_length), at_random(0.2, 3, key_length)
    for x in tensors:
        x[~mask[:, -x.shape[1] :]] *= 1e4
    check(tensors, is_landmark, key_mask=mask, top_k=top_k)
    out, *grads = run("torch", tensors, is_landmark, torch.float64, key_mask=mask, top_k=top_k)
    for x in (out, *grads):
        assert not x[~mask[:, -x.shape[1] :]].any()
    for row in range(3):
        q_real, k_real = mask[row, -length:], mask[row]
        if q_real.any():
            q, k, v = tensors[0][row, q_real], tensors[1][row, k_real], tensors[2][row, k_real]
            alone = landmark_attention(q[None], k[None], v[None], is_landmark[row, k_real][None], top_k=top_k)
            assert torch.allclose(out[row, q_real], alone[0], rtol=1e-12, atol=1e-12)


@TOP_K
def test_bfloat16(top_k: int | None) -> None:
    check(make(2, 300, 300, dims=(32, 24)), every(20, 2, 300), torch.bfloat16, top_k=top_k)


def paper(q: Tensor, k: Tensor, v: Tensor, is_landmark: Tensor) -> Tensor:
    """Section 3.1 as it is written, with whole matrices: every key has a group, a softmax runs within each group, and a
    token's weight is multiplied by its landmark's."""
    length = q.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    owner = torch.full((length,), length)  # p_j: the landmark of token j's block
    for landmark in is_landmark[0].nonzero()[:, 0].flip(0).tolist():
        owner[: landmark + 1] = landmark
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    group = torch.where(owner[j] != j, owner[j], owner[i])
    group = torch.where((owner[j] == j) & (owner[i] == j), -1, group).masked_fill(j > i, -1)
    weights = torch.zeros_like(logits)
    for each in group.unique().tolist():
        if each >= 0:
            part = logits.masked_fill(group != each, -torch.inf).softmax(-1).nan_to_num(0)
            weights = weights + part
    of_landmark = weights.gather(-1, owner.clamp(max=length - 1).expand_as(weights))
    weights = torch.where(owner[j] == owner[i], weights, weights * of_landmark).masked_fill(is_landmark[0], 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("block", [2, 7, 40])
@pytest.mark.parametrize("length", [2, 31, 96])
def test_equals_the_paper_s_formula(length: int, block: int, name: str) -> None:
    is_landmark = every(block, 2, length)
    tensors = [x.requires_grad_() for x in make(2, length, length)]
    expected = paper(*tensors, is_landmark)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    with backend(name):
        out = landmark_attention(*tensors, is_landmark)
    assert relative_error(out, expected) < 1e-12
    for x, y in zip(*(torch.autograd.grad(each, tensors, weights) for each in (out, expected)), strict=True):
        assert relative_error(x, y) < 1e-11


@TOP_K
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_rows_sum_to_one(name: str, top_k: int | None) -> None:
    q, k, _ = make(2, 150, 150)
    with backend(name):
        out = landmark_attention(q, k, torch.ones(2, 150, 2, 1).double(), every(9, 2, 150), top_k=top_k)
    assert (out - 1).abs().max() < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_without_landmarks_it_is_plain_attention(name: str) -> None:
    tensors = make(2, 80, 80)
    with backend(name):
        out = landmark_attention(*tensors, torch.zeros(2, 80, dtype=torch.bool))
    assert relative_error(out, softmax_attention(*tensors)) < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_values_of_landmarks_and_a_landmark_s_own_key_count_nowhere(name: str) -> None:
    q, k, v = make(1, 24, 24)
    is_landmark = every(5, 1, 24)
    with backend(name):
        before = landmark_attention(q, k, v, is_landmark)
        changed = landmark_attention(q, k, torch.where(is_landmark[..., None, None], 1e3, v), is_landmark)
        assert torch.equal(before, changed)
        k[:, 11] += 1  # the second landmark
        after = landmark_attention(q, k, v, is_landmark)
    assert torch.equal(before[:, :12], after[:, :12])  # its own query, too
    assert ((before - after)[:, 12:].norm(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_landmark_without_a_block_stands_for_nothing(name: str) -> None:
    q, k, v = make(1, 12, 12)
    is_landmark = torch.zeros(1, 12, dtype=torch.bool)
    is_landmark[:, [0, 1, 6, 7]] = True
    kept = [2, 3, 4, 5, 6, 8, 9, 10, 11]
    with backend(name):
        out = landmark_attention(q, k, v, is_landmark)
        expected = landmark_attention(q[:, kept], k[:, kept], v[:, kept], is_landmark[:, kept])
    assert not out[:, :2].any() and torch.allclose(out[:, kept], expected, rtol=1e-13, atol=1e-13)


@TOP_K
def test_logits_of_any_size(top_k: int | None) -> None:
    """A block whose logits are a thousand below another's still has a softmax within."""
    q, k, v = make(1, 100, 100)
    q[..., 0], k[:, :40, :, 0], k[:, 60:, :, 0] = 1.0, -3000.0, 3000.0
    k[:, 9::10, :, 0] = 0.0  # the landmarks do not tell
    expected = run("reference", [q, k, v], every(9, 1, 100), torch.float64, top_k=top_k)
    for x, y in zip(run("torch", [q, k, v], every(9, 1, 100), torch.float64, top_k=top_k), expected, strict=True):
        assert relative_error(x, y) < 1e-9
    assert all(x.isfinite().all() for x in run("torch", [q, k, v], every(9, 1, 100), torch.float32, top_k=top_k))


@TOP_K
def test_gradcheck(top_k: int | None) -> None:
    tensors, is_landmark = [x.requires_grad_() for x in make(1, 17, 17)], every(3, 1, 17)
    for name in ("reference", "torch"):
        with backend(name):
            assert torch.autograd.gradcheck(
                lambda *x: landmark_attention(*x, is_landmark, top_k=top_k), tensors, fast_mode=True
            )


def test_flops_of_the_reference_are_those_of_visible_pairs() -> None:
    q, k, v = make(1, 23, 23)
    with FlopCounterMode(display=False) as counter, backend("reference"):
        landmark_attention(q, k, v, every(4, 1, 23))
    logits = sum(t + 1 - (t % 5 == 4) for t in range(23))
    values = sum(t + 1 - (t + 1) // 5 for t in range(23))
    assert counter.get_total_flops() == 2 * 4 * (5 * logits + 3 * values)


@TOP_K
def test_memory_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch, top_k: int | None) -> None:
    """No tensor anywhere is as large as the length squared."""
    monkeypatch.undo()
    tensors = [x.float().requires_grad_() for x in make(1, 4096, 4096, (2, 1), (8, 8))]
    with Largest() as largest:
        landmark_attention(*tensors, every(63, 1, 4096), top_k=top_k).sum().backward()
    assert largest.numbers <= 2 * (chunked.MAX_LOGITS if top_k is None else chosen.MAX_PART)


@TOP_K
def test_compiles_without_a_break(top_k: int | None) -> None:
    tensors = [x.float().requires_grad_() for x in make(1, 40, 40)]
    is_landmark = every(7, 1, 40)

    def function(*tensors: Tensor) -> Tensor:
        return landmark_attention(*tensors, is_landmark, top_k=top_k).square()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(*(torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, function)), strict=True):
        assert relative_error(x, y) < 1e-6


def test_operators_are_registered_right() -> None:
    tensors = [x.requires_grad_() for x in make(1, 20, 20)]
    arguments = (*tensors, every(5, 1, 20), 0.4, None, None)
    torch.library.opcheck(chunked._forward, arguments)
    torch.library.opcheck(chosen._forward, (*arguments, 2, False))


def test_backends() -> None:
    assert backends("landmark_attention") == ("reference", "torch", "triton")


def test_mistakes_are_named() -> None:
    q, k, v = make(2, 8, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
    for arguments, options, message in [
        ((q[0], k, v, mask), {}, "q, k and v must be"),
        ((q, k[:, :, :, :4], v, mask), {}, "k must have q's batch 2 and head_dim 5"),
        ((q, k, v[:, :7], mask), {}, "v must have k's"),
        ((q[:, :, :3], k, v, mask), {}, "q's 3 heads must be a multiple"),
        ((q, k[:, :5], v[:, :5], mask), {}, "q must have 1 to 5 tokens"),
        ((q, k, v, mask[:, :7]), {}, "is_landmark must be bool"),
        ((q, k, v, mask.long()), {}, "is_landmark must be bool"),
        ((q, k, v, mask), {"key_mask": mask.long()}, "key_mask must be bool"),
        ((q, k, v, mask), {"key_mask": mask, "cu_seqlens": cu_seqlens}, "exclude each other"),
        ((q[:1, :7], k[:1], v[:1], mask[:1]), {"cu_seqlens": cu_seqlens}, "as many queries as keys"),
        ((q, k, v, mask), {"cu_seqlens": cu_seqlens}, "batch of 1"),
        ((q, k, v, mask), {"top_k": 0}, "top_k must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            landmark_attention(*arguments, **options)


@TOP_K
def test_no_real_token_at_all(top_k: int | None) -> None:
    x, mask = torch.randn(1, 3, 2, 8, requires_grad=True), torch.zeros(1, 3, dtype=torch.bool)
    with backend("torch"):
        out = landmark_attention(x, x, x, mask, key_mask=mask, top_k=top_k)
    assert not out.any() and not torch.autograd.grad(out.sum(), x)[0].any()
