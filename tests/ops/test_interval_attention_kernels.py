"""interval_attention's Triton kernels: interpreted against the float64 reference, and compiled for an H100."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_interval_attention import make
from tests.ops.test_linear_attention_kernels import interpreter  # noqa: F401  (a fixture)
from zoo.ops import backend, interval_attention

kernels = pytest.importorskip("zoo.ops.interval_attention.kernels")

# Float32 was measured at 4e-7 at worst; bfloat16 rounds the probabilities and the results.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("out", "lse", "q", "k", "v")


def run(name: str, tensors: list[Tensor], dtype: torch.dtype, through: tuple[int, ...] = (0, 1), **options: Any):
    """out, exp(lse) (0 for an empty row) and the gradients of q, k and v through those of them in `through`."""
    device = "cpu" if name == "reference" else DEVICE
    leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in tensors[:3]]
    with backend(name):
        out, lse = interval_attention(*leaves, *(x.to(device) for x in tensors[3:]), return_lse=True, **options)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    results = [out, lse.exp()]
    generator = torch.Generator().manual_seed(1)
    # Rounded to what bfloat16 has, so that every backend is given the same.
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in results]
    grads = torch.autograd.grad([results[i] for i in through], leaves, [weights[i] for i in through], allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]
    return dict(zip(NAMES, [*results, *grads], strict=True))


def check(tensors: list[Tensor], dtype: torch.dtype = torch.float32, tolerance: float | None = None, **options: Any):
    expected = run("reference", tensors, torch.float64, **options)
    with poisoned_memory():
        got = run("triton", tensors, dtype, **options)
    scale = max(x.norm().item() for x in expected.values())
    for name, ref in expected.items():
        # A query that sees one key has no gradient but rounding: then compare with the rest.
        small = ref.norm() <= 1e-12 * scale
        error = got[name].norm().item() / max(scale, 1e-300) if small else relative_error(got[name], ref)
        assert error < (tolerance or TOLERANCE[dtype]), (name, error)


@pytest.mark.parametrize("key_length", [1, 31, 32, 33, 67])
@pytest.mark.parametrize("length", [1, 31, 33])
def test_equals_reference(length: int, key_length: int) -> None:
    check(make(2, length, key_length, (2, 1)))


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("dims", [(8, 40), (80, 33)])
def test_heads_and_dims(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    check(make(1, 40, 50, heads, dims), scale=0.7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (64, 64)])
def test_lower_precision(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    check(make(1, 70, 60, (2, 1), dims), dtype)


@pytest.mark.parametrize("dims", [(64, 64), (200, 256)])
def test_tiles_of_bfloat16(dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32 numbers, so that the bound is sharp."""
    monkeypatch.setattr(kernels, "FLOAT32", kernels.TENSOR_CORE)
    check(make(1, 150, 140, (2, 1), dims))


def test_intervals_in_order() -> None:
    """As those of NSA's compressed blocks, which go another way back than others."""
    q, k, v, *_ = make(1, 150, 40, (2, 1))
    for first in (torch.zeros(150), (torch.arange(150) // 7 - 3).clamp_min(0)):
        stop = torch.arange(1, 151) // 4
        check([q, k, v, first.long()[None], stop[None]])


@pytest.mark.parametrize("through", [(0,), (1,)])
def test_one_result_alone(through: tuple[int, ...]) -> None:
    check(make(1, 40, 50), through=through)


def test_few_queries_share_out_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_KEYS", 16)
    for length in (1, 40):
        check(make(1, length, 100, (2, 1)))


def test_no_key_and_no_row() -> None:
    *leaves, first, stop = (x.to(DEVICE) for x in make(2, 5, 0))
    leaves = [x.float().requires_grad_() for x in leaves]
    with backend("triton"), poisoned_memory():
        out, lse = interval_attention(*leaves, first, stop, return_lse=True)
        assert out.shape == (2, 5, 4, 3) and not out.any() and lse.isneginf().all()
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert not grads[0].any() and grads[1].shape == leaves[1].shape
        nothing = interval_attention(*(x[:0] for x in leaves), first[:0], stop[:0])
        assert nothing.shape == (0, 5, 4, 3)


def test_a_nan_gradient_of_an_empty_row_does_not_spread() -> None:
    *tensors, first, _ = (x.to(DEVICE) for x in make(1, 6, 5))
    leaves = [x.float().requires_grad_() for x in tensors]
    stop = torch.tensor([[0, 2, 0, 5, 0, 1]], device=DEVICE)
    with backend("triton"):
        out, lse = interval_attention(*leaves, torch.zeros_like(first), stop, return_lse=True)
    weights = [torch.ones_like(out), torch.ones_like(lse)]
    expected = torch.autograd.grad([out, lse], leaves, weights, retain_graph=True)
    weights[1] = weights[1].masked_fill(lse == -torch.inf, torch.nan)
    for got, wanted in zip(torch.autograd.grad([out, lse], leaves, weights), expected, strict=True):
        assert torch.equal(got, wanted) and wanted.any()


def test_strides() -> None:
    """q, k and v from one projection, heads before tokens, and an expanded gradient."""
    q, k, v, first, stop = make(2, 40, 40, (2, 2), (8, 8))
    results = {}
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        joint = torch.stack([x.transpose(1, 2) for x in (q, k, v)], -2).to(DEVICE, dtype).requires_grad_()
        with backend(name):
            out = interval_attention(*joint.transpose(1, 2).unbind(-2), first.to(DEVICE), stop.to(DEVICE))
        weight = torch.ones(1, 1, 1, 8, device=DEVICE, dtype=dtype).expand_as(out)
        results[name] = [out, *torch.autograd.grad(out, joint, weight)]
    assert max(map(relative_error, results["triton"], results["reference"])) < TOLERANCE[torch.float32]


@torch.no_grad()
def test_elements_beyond_int32() -> None:
    """Rows of the batch, tokens and heads 2^30 elements apart; only those used are ever touched."""
    *near, first, stop = make(4, 4, 4, (4, 4), (16, 16))
    for apart in range(3):
        shape = [1, 1, 1]
        shape[apart] = 4
        strides = [16, 16, 16]
        strides[apart] = 2**30
        far = []
        for x in near:
            view = torch.empty(3 * 2**30 + 16, dtype=torch.bfloat16, device=DEVICE).as_strided(
                (*shape, 16), (*strides, 1)
            )
            far.append(view.copy_(x[: shape[0], : shape[1], : shape[2]]))
        begin, end = torch.zeros_like(first[: shape[0], : shape[1]]), torch.full_like(stop[: shape[0], : shape[1]], 4)
        with backend("reference"):
            expected = interval_attention(*far, begin, end)
        with backend("triton"):
            out = interval_attention(*far, begin, end)
        assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


def test_without_gradients_no_operator_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_operator", None)
    *tensors, first, stop = (x.to(DEVICE) for x in make(1, 20, 20))
    leaves = [x.float().requires_grad_() for x in tensors]
    with backend("triton"), torch.no_grad():
        interval_attention(*leaves, first, stop)
    with backend("triton"), pytest.raises(TypeError):
        interval_attention(*leaves, first, stop)


def test_a_second_run_gives_the_same_bits() -> None:
    tensors = make(1, 100, 90)
    results = [run("triton", tensors, torch.bfloat16) for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in NAMES)


def test_operator_contracts() -> None:
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    *tensors, first, stop = (x.to(DEVICE) for x in make(1, 20, 30))
    leaves = [x.float().requires_grad_() for x in tensors]
    bounds = [x.int()[None] for x in (first, stop)]
    options = (0.4, 0.8, 1, [0, 0], False)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._operator, (*leaves, *bounds, None, *options), test_utils=utils)
    out, lse = kernels._forward(*leaves, *bounds, None, *options)
    saved = [x.detach() for x in (out, lse, *leaves)]
    arguments = (*saved, *bounds, None, *saved[:2], *options)
    torch.library.opcheck(kernels._backward_operator, arguments, test_utils=("test_faketensor",))


def test_compiles_into_one_graph() -> None:
    *tensors, first, stop = (x.to(DEVICE) for x in make(1, 30, 40))
    leaves = [x.float().requires_grad_() for x in tensors]

    def function(*leaves: Tensor) -> Tensor:
        with backend("triton"):
            out, lse = interval_attention(*leaves, first, stop, return_lse=True)
        return out.sin().sum() + lse.exp().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves), function(*leaves)
    assert relative_error(got, expected) < 1e-6
    assert max(map(relative_error, *(torch.autograd.grad(x, leaves) for x in (got, expected)))) < 1e-6


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((1, 3, 1, 16), torch.float64, "float64 inputs"), ((1, 3, 1, 272), torch.float32, "head dims above 256")],
)
def test_refusals(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    bounds = torch.zeros(1, 3, dtype=torch.long, device=DEVICE)
    with backend("triton"), pytest.raises(ValueError, match=f"{message}; use reference, torch, auto"):
        interval_attention(x, x, x, bounds, bounds)


@pytest.mark.parametrize(("asked", "precision"), [("highest", "ieee"), ("high", "tf32")])
def test_float32_is_multiplied_in_tf32_only_when_asked(asked: str, precision: str) -> None:
    """By torch's own switch; `highest` is its default."""
    *tensors, first, stop = make(1, 8, 8)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(asked)
        assert kernels._Call(*tensors, first[None], stop[None], None).options["PRECISION"] == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert before == "highest"


def launch() -> None:
    """The kernels of NSA's compressed tier, of the common head dims, with a soft cap, and in float32; and none of their
    products takes a computed tile on the left, see kernels.py."""
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def keep(*args: Any, **kwargs: Any) -> None:
        compiled.append(run(*args, **kwargs))

    JITFunction.run = keep
    for dims, dtype, softcap in (
        ((64, 64), torch.bfloat16, None),
        ((128, 128), torch.bfloat16, 30.0),
        ((256, 256), torch.bfloat16, None),
        ((32, 32), torch.bfloat16, None),
        ((64, 64), torch.float32, None),
        ((256, 256), torch.float32, None),
    ):
        q = torch.zeros(1, 128, 8, dims[0], dtype=dtype)
        k, v = torch.zeros(1, 128, 2, dims[0], dtype=dtype), torch.zeros(1, 128, 2, dims[1], dtype=dtype)
        bounds = torch.zeros(1, 1, 128, dtype=torch.int32)
        for monotone in (True, False):
            options = (0.1, softcap, 1, [0, 0], monotone)
            out, lse = kernels._forward(q, k, v, bounds, bounds, None, *options)
            kernels._backward(out, None, q, k, v, bounds, bounds, None, out, lse, *options)
    for kernel in compiled:
        for line in kernel.asm["ptx"].splitlines():
            # wgmma's operands: the result's registers in braces, then the left-hand one's in braces if it has any.
            assert "wgmma.mma_async" not in line or line.count("{") == 1, line


def test_compiles_for_an_h100() -> None:
    compiled = aot.in_a_process(__name__, "launch")
    assert {kernel.name for kernel in compiled} == {"_forward_kernel", "_query_kernel", "_span_kernel", "_key_kernel"}
    for kernel in compiled:
        # The sums of head dims above 64 and what they are multiplied from are more than the registers hold.
        # At worst those of dk at 256, for intervals in no order.
        assert kernel.shared <= aot.SHARED_LIMIT and kernel.spilled <= 1024, kernel
        assert kernel.spilled <= 64 or kernel.shared > 64 * 1024, kernel
