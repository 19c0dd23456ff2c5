"""zoo/ops/landmark_attention/kernels.py: outputs and gradients against the float64 reference, and what the compiler
makes of the kernels."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_landmark_attention import DOCUMENTS, at_random, every, make
from tests.ops.test_linear_attention_kernels import interpreter  # noqa: F401  (a fixture for every test)
from zoo.ops import backend, landmark_attention
from zoo.ops.landmark_attention import chosen

kernels = pytest.importorskip("zoo.ops.landmark_attention.kernels")

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2, torch.float16: 5e-3}
NAMES = ("q", "k", "v")


def run(name: str, tensors: list[Tensor], is_landmark: Tensor, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """out, and the gradients of q, k and v."""
    device = "cpu" if name == "reference" else DEVICE
    leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in tensors]
    options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
    with backend(name):
        out = landmark_attention(*leaves, is_landmark.to(device), **options)
    assert out.dtype == dtype
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def check(tensors: list[Tensor], is_landmark: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    expected = run("reference", tensors, is_landmark, torch.float64, **options)
    with poisoned_memory():
        got = run("triton", tensors, is_landmark, dtype, **options)
    scale = max(x.norm().item() for x in expected) or 1.0
    for name, x, y in zip(("out", *NAMES), got, expected, strict=True):
        # A query that sees one key has no gradient but rounding: then compare with the rest.
        error = relative_error(x, y) if y.norm() > 1e-9 * scale else x.norm().item() / scale
        assert error < TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(dtype: torch.dtype) -> None:
    check(make(1, 90, 90, (2, 1), (16, 24)), every(12, 1, 90), dtype)


@pytest.mark.parametrize("block", [1, 15, 16, 17, 31, 32, 40, 80])
def test_blocks(block: int) -> None:
    """Shorter than a tile, as long, longer, and several tiles long; more than a group of them."""
    check(make(1, 83, 83, (1, 1), (8, 8)), every(block, 1, 83))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_lengths(length: int) -> None:
    check(make(1, length, length, (1, 1)), every(5, 1, length))


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_blocks_of_any_sizes_in_several_rows(share: float) -> None:
    check(make(2, 61, 61, (2, 2)), at_random(share, 2, 61))


@pytest.mark.parametrize("dims", [(5, 40), (40, 3), (17, 64)])
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)])
def test_heads_and_dimensions(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    check(make(1, 40, 40, heads, dims), every(9, 1, 40), scale=0.7)


@pytest.mark.parametrize(("length", "key_length"), [(1, 40), (1, 36), (21, 70)])
def test_fewer_queries_than_keys(length: int, key_length: int) -> None:
    check(make(2, length, key_length, (2, 1)), every(8, 2, key_length))


def test_documents() -> None:
    """Empty ones, and one of a single token, among them."""
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
    check(make(1, 150, 150, (1, 1)), at_random(0.2, 1, 150), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("kind", ["left", "right", "between"])
def test_padding(kind: str) -> None:
    """Garbage there changes nothing, and gets no gradient."""
    index, real = torch.arange(60), torch.tensor([[60], [30], [0]])
    mask = {
        "left": index >= 60 - real,
        "right": index < real,
        "between": torch.rand(3, 60, generator=torch.Generator().manual_seed(0)) > 0.4,
    }[kind]
    tensors, is_landmark = make(3, 60, 60, (1, 1)), at_random(0.2, 3, 60)
    for x in tensors:
        x[~mask] *= 1e4
    check(tensors, is_landmark, key_mask=mask)
    for x in run("triton", tensors, is_landmark, torch.float32, key_mask=mask):
        assert not x.cpu()[~mask].any()


def test_padded_rows_with_fewer_queries() -> None:
    mask = torch.rand(3, 60, generator=torch.Generator().manual_seed(0)) > 0.4
    check(make(3, 20, 60, (2, 1)), at_random(0.2, 3, 60), key_mask=mask)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("block", [40, 70])
def test_tiles_of_wgmma(block: int, top_k: int | None) -> None:
    check(make(1, 150, 150, (2, 1), (40, 64)), every(block, 1, 150), torch.bfloat16, top_k=top_k)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block", [1, 12, 32, 40])
def test_the_best_blocks(block: int, dtype: torch.dtype) -> None:
    """Of blocks that are a tile, and of some that are longer, which are left to PyTorch."""
    check(make(1, 110, 110, (4, 2), (16, 24)), every(block, 1, 110), dtype, top_k=2)


def test_the_best_blocks_of_any_sizes_in_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some heads at a time, lists of several tiles, and of less than one."""
    monkeypatch.setattr(chosen, "MAX_READ", 2**12)
    check(make(2, 90, 90, (2, 2), (5, 3)), at_random(0.2, 2, 90), top_k=3)
    monkeypatch.setattr(chosen, "MAX_LIST", 4)
    check(make(2, 60, 60, (2, 1), (5, 3)), at_random(0.2, 2, 60), top_k=1, scale=0.7)


def test_the_best_blocks_of_padded_rows_and_documents() -> None:
    mask = torch.rand(3, 60, generator=torch.Generator().manual_seed(0)) > 0.4
    check(make(3, 20, 60, (2, 1)), at_random(0.2, 3, 60), key_mask=mask, top_k=2)
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
    check(make(1, 150, 150, (1, 1)), at_random(0.2, 1, 150), cu_seqlens=cu_seqlens, top_k=2)


@pytest.mark.parametrize("block", [9, 40])
@torch.no_grad()
def test_rows_sum_to_one(block: int) -> None:
    q, k, _ = (x.to(DEVICE).float() for x in make(1, 100, 100, (2, 1)))
    with backend("triton"):
        for top_k in (None, 2):
            ones, is_landmark = torch.ones(1, 100, 1, 1, device=DEVICE), every(block, 1, 100).to(DEVICE)
            assert (landmark_attention(q, k, ones, is_landmark, top_k=top_k) - 1).abs().max() < 1e-6


def test_logits_of_any_size() -> None:
    q, k, v = make(1, 60, 60, (1, 1))
    q[..., 0], k[:, :30, :, 0], k[:, 40:, :, 0] = 1.0, -3000.0, 3000.0
    k[:, 9::10, :, 0] = 0.0
    assert all(x.isfinite().all() for x in run("triton", [q, k, v], every(9, 1, 60), torch.float32))
    k[..., 0] /= 100
    check([q, k, v], every(9, 1, 60), scale=1.0)


@pytest.mark.parametrize("wanted", range(3))
def test_one_input_alone_needs_a_gradient(wanted: int) -> None:
    gradients = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        device = "cpu" if name == "reference" else DEVICE
        inputs = [x.to(device, dtype) for x in make(1, 30, 30, (1, 1))]
        inputs[wanted].requires_grad_()
        with backend(name):
            out = landmark_attention(*inputs, every(7, 1, 30).to(device))
        gradients += torch.autograd.grad(out.square().sum(), inputs[wanted])
    assert relative_error(gradients[1], gradients[0]) < TOLERANCE[torch.float32]


def test_a_second_run_gives_the_same_bits() -> None:
    tensors = make(1, 70, 70, (2, 1))
    runs = [run("triton", tensors, every(9, 1, 70), torch.float32) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@torch.no_grad()
def test_views_into_a_larger_projection() -> None:
    q, k, v = (x.float() for x in make(2, 30, 30, (2, 2), (16, 16)))
    joint = torch.cat([q, k, v], -1).to(DEVICE)
    with backend("triton"):
        out = landmark_attention(*joint.split(16, -1), every(7, 2, 30).to(DEVICE))
        expected = landmark_attention(*(x.to(DEVICE) for x in (q, k, v)), every(7, 2, 30).to(DEVICE))
    assert torch.equal(out, expected)


def test_operator_contracts() -> None:
    inputs = [x.to(DEVICE).float().requires_grad_() for x in make(1, 20, 20, (2, 1))]
    arguments = (*inputs, every(5, 1, 20).to(DEVICE), 0.4, None, None)
    torch.library.opcheck(
        kernels._forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "top_k", "message"),
    [
        ((1, 3, 1, 16), torch.float64, None, "float64 inputs"),
        ((1, 3, 1, 272), torch.float32, 2, "head dims above 256"),
    ],
)
def test_refusals(shape: tuple[int, ...], dtype: torch.dtype, top_k: int | None, message: str) -> None:
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    with backend("triton"), pytest.raises(ValueError, match=f"{message}; use reference, torch, auto"):
        landmark_attention(x, x, x, torch.zeros(shape[:2], dtype=torch.bool, device=DEVICE), top_k=top_k)


def launch() -> None:
    """The paper's block in bfloat16 with the usual, the largest and small head dims, blocks longer and shorter than a
    tile, and float32. No product on wgmma has a dimension below 64 or takes a computed tile on the left (see
    linear_attention's kernels.py), nor has its program more than 4 warps; and how long blocks are compiles nothing."""
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def keep(*args: Any, **kwargs: Any) -> None:
        compiled.append(run(*args, **kwargs))

    JITFunction.run = keep
    for dtype, dim, block in (
        (torch.bfloat16, 128, 50),
        (torch.bfloat16, 64, 100),
        (torch.bfloat16, 128, 300),
        (torch.bfloat16, 256, 50),
        (torch.bfloat16, 32, 50),
        (torch.bfloat16, 128, 25),
        (torch.float32, 64, 50),
    ):
        q, k = torch.zeros(1, 400, 4, dim, dtype=dtype), torch.zeros(1, 400, 2, dim, dtype=dtype)
        arguments = every(block, 1, 400), 1.0, None, None
        out, lse = kernels._forward(q, k, k, *arguments)
        kernels._backward(out, q, k, k, arguments[0], out, lse, *arguments[1:])
        out, *saved = chosen._forward(q, k, k, *arguments, 2, True)
        chosen._backward(out, q, k, k, arguments[0], out, *saved, *arguments[1:], True)
    known = {kernel.hash for kernel in compiled}
    q, k = torch.zeros(1, 400, 4, 128, dtype=torch.bfloat16), torch.zeros(1, 400, 2, 128, dtype=torch.bfloat16)
    chosen._forward(q, k, k, every(40, 1, 400), 1.0, None, None, 2, True)
    assert {kernel.hash for kernel in compiled} == known
    on_wgmma = 0
    for kernel in compiled:
        for line in kernel.asm["ttgir"].splitlines():
            if "warp_group_dot " in line:
                dims = [int(x) for x in re.findall(r"(\d+)(?=x)", line.split(" : ")[-1])]
                assert len(dims) == 6 and min(dims) >= 64 and kernel.metadata.num_warps == 4, line
                on_wgmma += 1
        for line in kernel.asm["ptx"].splitlines():
            # wgmma's operands: the result's registers in braces, then the left-hand one's in braces if it has any.
            assert "wgmma.mma_async" not in line or line.count("{") == 1, line
    assert on_wgmma


def test_compiles_for_an_h100() -> None:
    compiled = aot.in_a_process(__name__, "launch")
    assert {kernel.name for kernel in compiled} == {
        "_forward_kernel", "_query_kernel", "_key_kernel", "_list_kernel", "_group_kernel"
    }  # fmt: skip
    for kernel in compiled:
        assert kernel.shared <= aot.SHARED_LIMIT and kernel.spilled <= 1600, kernel
