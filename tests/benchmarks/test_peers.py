"""What the peers are called with: the same values, and the same results."""

import pytest
import torch

from benchmarks import peers
from benchmarks.inputs import Case, Shape, make_inputs
from benchmarks.ops import on_backend
from benchmarks.rows import PEERS, Options
from tests.ops.helpers import DEVICE, relative_error

OPTIONS = Options(device=DEVICE, quick=True)
CASES = [
    Case("linear_attention", "per head", 4, 16),
    Case("linear_attention", "per token", 4, 16),
    Case("selective_scan", None, 1, 32),
    Case("causal_conv1d", None, 1, 32),
    Case("gated_rms_norm", "gate first", 1, 32),
    Case("gated_rms_norm", "norm first", 1, 32),
    Case("softmax_attention", None, 4, 16),
    Case("block_sparse_attention", None, 16, 16),
]
DENSE = ("block_sparse_attention", "sdpa")  # what a user would take instead, not the same


@pytest.mark.parametrize("decode", [False, True], ids=["sequence", "decode"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.variant}")
def test_every_peer_computes_what_ours_computes(case, decode):
    torch.manual_seed(0)
    keys = 40 if case.op == "softmax_attention" else 0
    shape = Shape(2, 1, decode=True, keys=keys) if decode else Shape(2, 40)
    inputs = make_inputs(case, shape, "float32", OPTIONS)
    found = peers.find(case.op, OPTIONS)
    assert found, "an op without a peer"
    for name, build in found.items():
        told = {key: x for key, x in inputs.fixed.items() if isinstance(x, torch.Tensor)}
        call = build(inputs.tensors | told, case.variant, decode)
        if call is None or (case.op, name) == DENSE:
            continue
        out = call.function(**call.tensors)  # first: it may write over its own copy of the state, never over ours
        expected = on_backend("reference", case.op, inputs.fixed, **inputs.tensors)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert relative_error(out, expected) < 1e-5, name


def test_only_the_peers_asked_for_and_those_that_can_run_here():
    assert peers.find("softmax_attention", Options(peers=())) == {}
    assert peers.find("softmax_attention", Options(peers=PEERS)).keys() == {"sdpa"}
    on_cpu = peers.find("linear_attention", Options(device="cpu"))
    assert on_cpu.keys() == {"transformers"}


def test_mamba_ssm_is_not_asked_where_it_is_wrong(monkeypatch):
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    names += tuple(f"mamba_ssm.ops.triton.{name}" for name in ("selective_state_update", "ssd_combined"))
    for name in names:
        module = type(torch)(name)
        module.selective_state_update = module.mamba_chunk_scan_combined = lambda *_: None
        monkeypatch.setitem(__import__("sys").modules, name, module)
    build = peers._builders["linear_attention", "mamba_ssm"]
    tensors = {
        "q": torch.zeros(1, 1, 1, 1).expand(1, peers.WRONG_FROM, 1, 1),
        "v": torch.zeros(1, 1, 1, 1).expand(1, peers.WRONG_FROM, 1, 1),
        "log_decay": -torch.ones(1),
    }
    assert build(tensors, "per head", False) is None
    short = {name: t[:, :100] if t.dim() > 1 else t for name, t in tensors.items()}
    assert build(short | {"k": short["q"]}, "per head", False) is not None
