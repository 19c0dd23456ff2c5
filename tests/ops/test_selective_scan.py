"""selective_scan: both backends against each other, against transformers, and against their own contract."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.helpers import relative_error
from zoo.ops import dispatch
from zoo.ops.selective_scan import chunked, selective_scan

# The worst relative error of an output or a gradient; float32 was measured at 5e-7.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
DOCUMENTS = [0, 0, 1, 64, 64, 65, 128, 190, 300, 300]


def make(batch: int, length: int, channels: int = 5, state: int = 3, rows: int | None = None) -> list[Tensor]:
    """u, delta, A, B, C, D, initial_state in float64; decays from none to complete."""
    torch.manual_seed(length)
    u, B, C = (torch.randn(batch, length, n, dtype=torch.float64) for n in (channels, state, state))
    delta = torch.rand(batch, length, channels, dtype=torch.float64)
    A = -8 * torch.rand(channels, state, dtype=torch.float64) ** 3
    D = torch.randn(channels, dtype=torch.float64)
    return [u, delta, A, B, C, D, torch.randn(rows or batch, channels, state, dtype=torch.float64)]


def run(
    backend: str, tensors: list[Tensor], dtype: torch.dtype, cu_seqlens: Tensor | None, given: bool
) -> list[Tensor]:
    """out, state, and the gradients of everything through both; without D and initial state unless `given`."""
    count = 7 if given else 5
    leaves = [x.to(dtype).requires_grad_() for x in tensors[:count]]
    *arguments, initial_state = leaves if given else [*leaves, None]
    with dispatch.backend(backend):
        out, state = selective_scan(*arguments, initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens)
    weights = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, dtype=torch.float64, generator=weights).to(dtype) for y in (out, state)]
    return [out, state, *torch.autograd.grad([out, state], leaves, grads)]


def check(tensors: list[Tensor], dtype: torch.dtype, cu_seqlens: Tensor | None, given: bool) -> None:
    expected = run("reference", tensors, torch.float64, cu_seqlens, given)
    names = ["out", "state", "u", "delta", "A", "B", "C", "D", "initial_state"]
    for name, x, y in zip(names, run("torch", tensors, dtype, cu_seqlens, given), expected, strict=False):
        assert relative_error(x, y) < TOLERANCE[dtype], name


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 300])
def test_torch_equals_reference(length: int, dtype: torch.dtype, given: bool) -> None:
    check(make(2, length), dtype, None, given)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bounds", [[0, 1], [0, 64], [0, 300], [0, 0, 1, 1], DOCUMENTS, list(range(71))])
def test_documents_equal_reference(bounds: list[int], dtype: torch.dtype, given: bool) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    check(make(1, bounds[-1], rows=len(bounds) - 1), dtype, cu_seqlens, given)


@pytest.mark.parametrize(("channels", "state"), [(1, 3), (4, 1), (1, 1), (4, 3)])
def test_gradients_of_the_state_are_nobody_elses(channels: int, state: int) -> None:
    """With documents, one state or one channel, or a state read transposed: what arrives stays as it is."""
    u, delta, A, B, C, *_ = make(1, 70, channels, state)
    cu_seqlens = torch.tensor([0, 20, 20, 70], dtype=torch.int32)
    found = []
    for name in ("torch", "reference"):
        leaves = [x.clone().requires_grad_() for x in (u, delta, A, B, C)]
        with dispatch.backend(name):
            _, last = selective_scan(*leaves, return_state=True, cu_seqlens=cu_seqlens)
        given = torch.ones(3, state, channels, dtype=torch.float64)
        found.append(torch.autograd.grad(last.mT, leaves[:4], given))
        assert given.eq(1).all()
    for mine, theirs in zip(*found, strict=True):
        assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_documents_equal_each_document_alone(backend: str) -> None:
    u, delta, A, B, C, D, initial_state = make(1, 300, rows=len(DOCUMENTS) - 1)
    with dispatch.backend(backend):
        cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
        out, state = selective_scan(
            u, delta, A, B, C, D, initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens
        )
        for i, (start, stop) in enumerate(pairwise(DOCUMENTS)):
            if start == stop:
                assert torch.equal(state[i], initial_state[i])
                continue
            part = [x[:, start:stop] for x in (u, delta, B, C)]
            alone, end = selective_scan(
                *part[:2], A, *part[2:], D, initial_state=initial_state[i : i + 1], return_state=True
            )
            assert relative_error(out[:, start:stop], alone) < 1e-13
            assert relative_error(state[i : i + 1], end) < 1e-13


def test_chunks_and_single_tokens_continue_the_state() -> None:
    u, delta, A, B, C, D, state = make(2, 150)
    expected, end = selective_scan(u, delta, A, B, C, D, initial_state=state, return_state=True)
    outs, start = [], 0
    for size in (70, 1, 1, 64, 13, 1):
        part = [x[:, start : start + size] for x in (u, delta, B, C)]
        out, state = selective_scan(*part[:2], A, *part[2:], D, initial_state=state, return_state=True)
        outs.append(out)
        start += size
    assert relative_error(torch.cat(outs, 1), expected) < 1e-13
    assert relative_error(state, end) < 1e-13


@pytest.mark.parametrize("delta_scale", [0.0, 1e-3, 5.0, 50.0])
def test_extreme_decays(delta_scale: float) -> None:
    """No decay at all, and decays that underflow float32."""
    tensors = make(1, 200, channels=32, state=16)
    tensors[1] = tensors[1] * delta_scale
    tensors[2] = -torch.arange(1, 17, dtype=torch.float64).repeat(32, 1)
    expected = run("reference", tensors, torch.float64, None, True)
    for x, y in zip(run("torch", tensors, torch.float32, None, True), expected, strict=True):
        assert relative_error(x, y) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bfloat16_keeps_float32_states(backend: str) -> None:
    tensors = make(2, 200)
    half = [tensors[i].bfloat16() for i in (0, 1, 3, 4)]
    A, D, initial_state = (tensors[i].float() for i in (2, 5, 6))
    with dispatch.backend(backend):
        out, state = selective_scan(*half[:2], A, *half[2:], D, initial_state=initial_state, return_state=True)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact = [x.double() for x in half]
    with dispatch.backend("reference"):
        expected, end = selective_scan(
            *exact[:2], A.double(), *exact[2:], D.double(), initial_state=initial_state.double(), return_state=True
        )
    assert relative_error(out, expected) < 4e-3  # the rounding of out alone
    assert relative_error(state, end) < 1e-6


def test_gradcheck_of_the_reference() -> None:
    leaves = [x.requires_grad_() for x in make(1, 5, channels=2, state=2, rows=3)]
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*x[:6], initial_state=x[6], return_state=True, cu_seqlens=cu_seqlens)

    with dispatch.backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)


def test_equals_transformers_mamba() -> None:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=16, state_size=8, time_step_rank=4, use_bias=True, vocab_size=8)
    mixer = MambaMixer(config, layer_idx=0).double().eval()
    for parameter in (mixer.D, mixer.dt_proj.bias, mixer.conv1d.bias):
        torch.nn.init.normal_(parameter)
    torch.nn.init.uniform_(mixer.A_log, -2.0, 2.0)
    x = torch.randn(2, 100, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = mixer(x)  # on a CPU: the plain recurrence
        u, gate = mixer.in_proj(x).chunk(2, -1)
        u = mixer.act(mixer.conv1d(u.transpose(1, 2))[..., :100].transpose(1, 2))
        step, B, C = mixer.x_proj(u).split([4, 8, 8], -1)
        delta = torch.nn.functional.softplus(mixer.dt_proj(step))
        out = selective_scan(u, delta, -torch.exp(mixer.A_log), B, C, mixer.D)
        out = mixer.out_proj(out * mixer.act(gate))
    # transformers rounds A, D and the decays to float32 whatever the input's dtype.
    assert relative_error(out, expected) < 1e-6


def test_flops_of_the_reference() -> None:
    tensors = make(2, 10)
    with dispatch.backend("reference"), FlopCounterMode(display=False) as counter:
        selective_scan(*tensors[:6])
    assert counter.get_total_flops() == 2 * 10 * 4 * 5 * 3


def test_training_keeps_one_state_per_chunk_and_inference_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [x.requires_grad_() for x in make(1, 1024, channels=8, state=16)]

    def saved_bytes(length: int) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        u, delta, A, B, C, D, _ = tensors
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            selective_scan(
                u[:, :length].clone(), delta[:, :length].clone(), A, B[:, :length].clone(), C[:, :length].clone(), D
            )
        return sum(storages.values())

    short, long = saved_bytes(512), saved_bytes(1024)
    assert short < long <= 2 * short
    per_token = 8 * (2 * 8 + 2 * 16) + 8 * 8 * 16 / chunked.CHUNK
    assert long < 1.1 * 1024 * per_token

    kept: list[int] = []
    forward = chunked._forward

    def spy(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = forward(*arguments)
        kept.append(results[2].shape[0])
        return results

    monkeypatch.setattr(chunked, "_forward", spy)
    selective_scan(*tensors[:6])
    with torch.no_grad():
        selective_scan(*tensors[:6])
    selective_scan(*(x.detach() for x in tensors[:6]))
    assert kept == [1024 // chunked.CHUNK, 0, 0]


@pytest.mark.parametrize("length", [1, 100])
def test_compiles_without_graph_breaks(length: int) -> None:
    def loss(*x: Tensor) -> Tensor:
        out, state = selective_scan(*x[:6], initial_state=x[6], return_state=True)
        return (out.square().sum() + state.sin().sum()) / length

    tensors = make(2, length)
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for x, y in zip(*results, strict=True):
        assert relative_error(x, y) < 1e-13


def test_operator_contracts() -> None:
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    tensors = [x.requires_grad_() for x in make(1, 70, rows=3)]
    cu_seqlens = torch.tensor([0, 5, 5, 70], dtype=torch.int32)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked._forward, (*tensors[:5], tensors[6], cu_seqlens, True), test_utils=utils)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(2, 3)}, "u must be"),
        ({"u": torch.ones(2, 0, 5)}, "at least one token"),
        ({"delta": torch.ones(2, 10, 1)}, "delta must be"),
        ({"A": torch.ones(3, 5)}, "A must be"),
        ({"B": torch.ones(2, 10, 1)}, "B must be"),
        ({"C": torch.ones(2, 9, 3)}, "C must be"),
        ({"D": torch.ones(3)}, "D must be"),
        ({"initial_state": torch.ones(2, 3, 5)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32)}, "batch of 1"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    names = ["u", "delta", "A", "B", "C", "D", "initial_state"]
    arguments = dict(zip(names, make(2, 10), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)
