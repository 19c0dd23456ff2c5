"""selective_scan's Triton kernels: interpreted against the float64 reference, and compiled for an H100."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_selective_scan import make
from zoo.ops import dispatch
from zoo.ops.selective_scan import selective_scan

kernels = pytest.importorskip("zoo.ops.selective_scan.kernels")

NAMES = ["out", "state", "u", "delta", "A", "B", "C", "D", "initial_state"]
# By the result's dtype. Float32 was measured at 6e-7 at worst. The rounding of the result is all that the others lose,
# and the interpreter truncates to bfloat16.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}
DOCUMENTS = [0, 0, 1, 8, 8, 9, 25, 28, 28]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks and chunks in few tokens: interpreted, a token takes milliseconds."""
    monkeypatch.setattr(kernels, "INTERVAL", 8)
    with poisoned_memory():
        yield


def run(
    backend: str, tensors: list[Tensor | None], cu_seqlens: Tensor | None = None, through: str = "both"
) -> list[Tensor]:
    """out, state, and the gradients of all tensors given, through out, state, or both."""
    device = "cpu" if backend == "reference" else DEVICE
    leaves = [x if x is None else x.detach().to(device).requires_grad_() for x in tensors]
    *arguments, initial_state = leaves
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device)
    with dispatch.backend(backend):
        out, state = selective_scan(*arguments, initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens)
    weights = torch.Generator().manual_seed(1)
    # Rounded to what bfloat16 has, so that every backend is given the same.
    outputs = [
        (x, torch.randn(x.shape, dtype=torch.float64, generator=weights).bfloat16().to(x))
        for x, name in ((out, "out"), (state, "state"))
        if through in (name, "both")
    ]
    given = [x for x in leaves if x is not None]
    results, weights_of = zip(*outputs, strict=True)
    grads = torch.autograd.grad(results, given, weights_of, allow_unused=True)
    return [out, state, *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(given, grads, strict=True))]


def check(tensors: list[Tensor], cu_seqlens: Tensor | None = None, given: bool = True, through: str = "both") -> None:
    """The kernels against the reference in float64 on the same, already rounded inputs."""
    arguments: list[Tensor | None] = [*tensors] if given else [*tensors[:5], None, None]
    exact = [x if x is None else x.double() for x in arguments]
    expected = run("reference", exact, cu_seqlens, through)
    for name, x, y in zip(NAMES, run("triton", arguments, cu_seqlens, through), expected, strict=False):
        assert relative_error(x, y) < TOLERANCE[x.dtype], name


def rounded(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """u, delta, B and C in `dtype`, the others in float32."""
    return [x.to(dtype) if i in (0, 1, 3, 4) else x.float() for i, x in enumerate(tensors)]


@pytest.mark.parametrize(
    ("length", "given"), [(1, True), (1, False), (2, True), (7, True), (8, True), (8, False), (9, True), (18, False)]
)
def test_lengths_around_a_chunk(length: int, given: bool) -> None:
    check(rounded(make(2, length), torch.float32), given=given)


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_chunks_of_several_blocks(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk for a row, and chunks of 3 and of 2 blocks; lengths with and without a whole last stride."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(rounded(make(1, 40), torch.float32))
    check(rounded(make(1, 29, channels=33), torch.float32), given=False)


@pytest.mark.parametrize(("channels", "state"), [(3, 1), (35, 5), (32, 16), (50, 16), (7, 20), (5, 64), (3, 130)])
def test_channels_and_states(channels: int, state: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that fit and tiles that do not; several of them in one program."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    check(rounded(make(1, 10, channels, state), torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    check(rounded(make(2, 20), dtype))
    tensors = rounded(make(1, 9), dtype)
    tensors[1] = tensors[1].float()  # a step size straight from a float32 softplus
    check(tensors)


@pytest.mark.parametrize("through", ["out", "state"])
def test_gradients_through_one_result_alone(through: str) -> None:
    check(rounded(make(1, 19), torch.float32), through=through)


@pytest.mark.parametrize("programs", [3, 2112])
@pytest.mark.parametrize(("bounds", "given"), [(DOCUMENTS, True), (DOCUMENTS, False), ([0, 0, 1, 1], True)])
def test_documents(bounds: list[int], given: bool, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    tensors = rounded(make(1, bounds[-1], rows=len(bounds) - 1), torch.float32)
    check(tensors, torch.tensor(bounds, dtype=torch.int32), given)


def test_documents_equal_each_document_alone() -> None:
    tensors = rounded(make(1, DOCUMENTS[-1], rows=len(DOCUMENTS) - 1), torch.float32)
    u, delta, A, B, C, D, initial_state = (x.to(DEVICE) for x in tensors)
    leaves = [x.requires_grad_() for x in (u, delta, B, C, initial_state)]
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32, device=DEVICE)

    def grads(out: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.sin().sum() + state.square().sum(), leaves)

    with dispatch.backend("triton"):
        out, state = selective_scan(
            u, delta, A, B, C, D, initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens
        )
        packed = grads(out, state)
        for i, (start, stop) in enumerate(pairwise(DOCUMENTS)):
            if start == stop:
                assert torch.equal(state[i], initial_state[i])
                assert torch.equal(packed[4][i], 2 * state[i])
                continue
            part = [x[:, start:stop] for x in (u, delta, B, C)]
            alone, end = selective_scan(
                *part[:2], A, *part[2:], D, initial_state=initial_state[i : i + 1], return_state=True
            )
            assert relative_error(out[:, start:stop], alone) < 1e-6
            assert relative_error(state[i : i + 1], end) < 1e-6
            expected = grads(alone, end)
            for x, y in zip(packed[:4], expected, strict=False):
                assert relative_error(x[:, start:stop], y[:, start:stop]) < 1e-6
            assert relative_error(packed[4][i], expected[4][i]) < 1e-6


@pytest.mark.parametrize("decay", [30.0, 1e-7])
def test_extreme_decays(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to exp(-30) a token, whose products underflow, and almost none at all; steps of zero among them."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    tensors = rounded(make(1, 30, channels=32, state=4), torch.float32)
    tensors[1][:, ::5] = 0
    tensors[2] = -decay * torch.tensor([0.1, 0.4, 0.7, 1.0]).repeat(32, 1)
    check(tensors)


def test_chunks_and_single_tokens_continue_the_state() -> None:
    u, delta, A, B, C, D, state = (x.to(DEVICE) for x in rounded(make(2, 24, channels=33), torch.float32))
    with dispatch.backend("triton"):
        expected, end = selective_scan(u, delta, A, B, C, D, initial_state=state, return_state=True)
        outs, start = [], 0
        for size in (13, 1, 1, 8, 1):
            part = [x[:, start : start + size] for x in (u, delta, B, C)]
            out, state = selective_scan(*part[:2], A, *part[2:], D, initial_state=state, return_state=True)
            outs.append(out)
            start += size
    assert relative_error(torch.cat(outs, 1), expected) < 1e-6
    assert relative_error(state, end) < 1e-6


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_without_gradients(dtype: torch.dtype, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_forward", None)  # its own kernel, not an operator
    tensors = rounded(make(3, 1, channels=70, state=5), dtype)
    *arguments, initial_state = tensors if given else [*tensors[:5], None, None]
    results = []
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        moved = [x if x is None else x.to(device) for x in arguments]
        if backend == "reference":
            moved = [x if x is None else x.double() for x in moved]
        state = None if initial_state is None else initial_state.to(moved[2])
        with dispatch.backend(backend):
            results.append(selective_scan(*moved, initial_state=state, return_state=True))
    for x, y in zip(*results, strict=True):
        assert relative_error(x, y) < TOLERANCE[x.dtype]
    assert results[0][0].dtype == dtype and results[0][1].dtype == torch.float32


def test_inference_keeps_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    tensors = rounded(make(1, 33), torch.float32)
    *moved, state = (x.to(DEVICE) for x in tensors)
    out, end, kept = kernels._forward(*moved, state, None, False)
    assert kept.numel() == 0
    assert kernels._forward(*moved, state, None, True)[2].shape[0] == 5
    expected = run("reference", [x.double() for x in tensors])
    assert relative_error(out, expected[0]) < TOLERANCE[torch.float32]
    assert relative_error(end, expected[1]) < TOLERANCE[torch.float32]


def test_nothing_is_written_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor made for the kernels lies between two of NaN, which stay so."""
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    made = []
    new_empty = Tensor.new_empty

    def guarded(self: Tensor, *size: int, **kwargs: Any) -> Tensor:
        if kwargs:  # the interpreter's own
            return new_empty(self, *size, **kwargs)
        count = math.prod(size)
        margin = max(4096, count)
        room = new_empty(self, 2 * margin + count).fill_(math.nan)
        made.append((room[:margin], room[margin + count :]))
        return room[margin : margin + count].view(size)

    cu_seqlens = torch.tensor([0, 1, 1, 28, 29, 29], dtype=torch.int32, device=DEVICE)
    leaves = [x.to(DEVICE).requires_grad_() for x in rounded(make(1, 29, 35, 5, rows=5), torch.float32)]
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", guarded)
        out, state, _ = kernels._forward(*leaves, cu_seqlens, True)
        torch.autograd.grad(out.sum() + state.sum(), leaves)
    assert len(made) > 8
    assert all(side.isnan().all() for sides in made for side in sides)


def test_inputs_that_are_not_contiguous() -> None:
    tensors = rounded(make(2, 9, channels=6, state=4), torch.float32)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors[:5]]
    strided += [tensors[5].repeat_interleave(2)[::2], tensors[6].transpose(0, 2).contiguous().transpose(0, 2)]
    assert not any(x.is_contiguous() for x in strided)
    for x, y in zip(run("triton", [*strided]), run("triton", [*tensors]), strict=True):
        assert torch.equal(x, y)
    leaves = [x.to(DEVICE).requires_grad_() for x in tensors]
    with dispatch.backend("triton"):
        (grad,) = torch.autograd.grad(selective_scan(*leaves[:6]).sum(), leaves[:1])  # the gradient of out is expanded
        (expected,) = torch.autograd.grad(
            selective_scan(*leaves[:6]).mul(torch.ones(2, 9, 6, device=DEVICE)).sum(), leaves[:1]
        )
    assert torch.equal(grad, expected)


def test_offsets_beyond_31_bits() -> None:
    """On a GPU with more than 2^31 elements; interpreted, the same on few."""
    length, channels = (2**20 + 3, 2080) if DEVICE == "cuda" else (27, 5)
    generator = torch.Generator(DEVICE).manual_seed(0)
    u, B, C = (
        torch.randn(1, length, n, device=DEVICE, dtype=torch.bfloat16, generator=generator) for n in (channels, 4, 4)
    )
    delta = torch.rand(1, length, channels, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    A = -torch.rand(channels, 4, device=DEVICE, generator=generator)
    with dispatch.backend("triton"):
        out, end = selective_scan(u, delta, A, B, C, return_state=True)
        _, state = selective_scan(*(x[:, :-17] for x in (u, delta)), A, B[:, :-17], C[:, :-17], return_state=True)
    with dispatch.backend("reference"):
        last = [x[:, -17:].double() for x in (u, delta, B, C)]
        expected, state = selective_scan(
            *last[:2], A.double(), *last[2:], initial_state=state.double(), return_state=True
        )
    assert relative_error(out[:, -17:], expected) < TOLERANCE[torch.bfloat16]
    assert relative_error(end, state) < TOLERANCE[torch.float32]


def test_float64_is_refused() -> None:
    tensors = [x.to(DEVICE) for x in make(1, 3)]
    with dispatch.backend("triton"), pytest.raises(ValueError, match="float64 inputs"):
        selective_scan(*tensors[:6])
    assert kernels._refuses(*rounded(make(1, 3), torch.float16), None) is None


@pytest.mark.parametrize("length", [1, 9])
def test_compiles_without_graph_breaks(length: int) -> None:
    def loss(*x: Tensor) -> Tensor:
        out, state = selective_scan(*x[:6], initial_state=x[6], return_state=True)
        return out.square().sum() + state.sin().sum()

    tensors = [x.to(DEVICE) for x in rounded(make(1, length), torch.float32)]
    results = []
    with dispatch.backend("triton"):
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in tensors]
            results.append(torch.autograd.grad(function(*leaves), leaves))
            with torch.no_grad():
                results[-1] = (*results[-1], function(*tensors))
    for x, y in zip(*results, strict=True):
        assert relative_error(x, y) < 1e-6


def test_operator_contracts() -> None:
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    tensors = [x.to(DEVICE).requires_grad_() for x in rounded(make(1, 11, rows=3), torch.float32)]
    cu_seqlens = torch.tensor([0, 5, 5, 11], dtype=torch.int32, device=DEVICE)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._forward, (*tensors, cu_seqlens, True), test_utils=utils)
    torch.library.opcheck(kernels._forward, (*tensors[:5], None, None, None, True), test_utils=utils)


def compile_training() -> None:
    """A call as of Jamba's layers, and a decoding step. aot.py runs it in a process of its own."""
    u, delta = (torch.rand(1, 512, 8192, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    A, D = -torch.rand(8192, 16), torch.rand(8192)
    B, C = (torch.rand(1, 512, 16, dtype=torch.bfloat16) for _ in range(2))
    out, _ = kernels.selective_scan(u, delta, A, B, C, D, None, None)
    out.sum().backward()
    with torch.no_grad():
        kernels.selective_scan(u[:, :1], delta[:, :1], A, B[:, :1], C[:, :1], D, torch.rand(1, 8192, 16), None)


def test_compiled_for_hopper() -> None:
    """Registers hold everything, warps share nothing to speak of: so it is in the layouts that the tiles are for."""
    compiled = {kernel.name: kernel for kernel in aot.in_a_process(__name__, "compile_training")}
    assert len(compiled) == 6  # the scan over chunks is one kernel in both directions
    for kernel in compiled.values():
        assert kernel.shared <= 1024, kernel
        assert kernel.spilled <= 128, kernel
    assert compiled["_output_kernel"].registers <= 128
