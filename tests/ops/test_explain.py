"""zoo.ops.explain: the choice of a backend and its reasons, without running anything."""

import pytest
import torch

from zoo import ops
from zoo.ops import dispatch, measured
from zoo.ops.explain import OPS

SHAPES = {
    "block_sparse_attention": {
        "q": (1, 4096, 4, 64),
        "k": (1, 4096, 2, 64),
        "v": (1, 4096, 2, 64),
        "block_indices": (1, 4096, 2, 16),
    },
    "causal_conv1d": {"x": (1, 4096, 64), "weight": (64, 4)},
    "delta_rule": {"q": (1, 4096, 2, 64), "k": (1, 4096, 2, 64), "v": (1, 4096, 4, 64), "beta": (1, 4096, 4)},
    "gated_rms_norm": {"x": (1, 4096, 64), "gate": (1, 4096, 64), "weight": (64,)},
    "infini_attention": {"q": (1, 4096, 4, 64), "k": (1, 4096, 2, 64), "v": (1, 4096, 2, 64), "gate": (4,)},
    "landmark_attention": {
        "q": (1, 4096, 4, 64),
        "k": (1, 4096, 2, 64),
        "v": (1, 4096, 2, 64),
        "is_landmark": (1, 4096),
    },
    "interval_attention": {
        "q": (1, 4096, 4, 64),
        "k": (1, 255, 2, 64),
        "v": (1, 255, 2, 64),
        "first": (1, 4096),
        "stop": (1, 4096),
    },
    "linear_attention": {"q": (1, 4096, 2, 64), "k": (1, 4096, 2, 64), "v": (1, 4096, 4, 64), "log_decay": (4,)},
    "select_blocks": {"q": (1, 4096, 4, 64), "k": (1, 255, 2, 64), "first": (1, 4096), "position": (1, 4096)},
    "selective_scan": {
        "u": (1, 4096, 64),
        "delta": (1, 4096, 64),
        "A": (64, 16),
        "B": (1, 4096, 16),
        "C": (1, 4096, 16),
        "D": (64,),
    },
    "softmax_attention": {"q": (1, 4096, 4, 64), "k": (1, 4096, 2, 64), "v": (1, 4096, 2, 64)},
}


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_on_torch_here(op):
    choice = ops.explain(op, SHAPES[op], torch.bfloat16, "cpu")
    assert choice.backend == "torch" and str(choice) == "torch: the only one that serves this call on cpu"


def test_a_backend_asked_for():
    with ops.backend("reference"):
        choice = ops.explain("causal_conv1d", SHAPES["causal_conv1d"], torch.float32, "cpu")
    assert choice.backend == "reference" and choice.reason == 'asked for with zoo.ops.backend("reference")'


def test_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(measured, "rows", lambda: ())
    monkeypatch.setattr(dispatch, "_installed", lambda package: package in ("triton", "torch"))
    measured.by_length.cache_clear()
    choice = ops.explain("selective_scan", SHAPES["selective_scan"], torch.bfloat16, "cuda")
    assert choice.backend == "triton" and "not measured" in choice.reason
    assert str(choice).splitlines()[1] == "not library: selective_scan_cuda is not installed"
    # The kernels have no float64; the chunked PyTorch runs on a GPU too.
    choice = ops.explain("selective_scan", SHAPES["selective_scan"], torch.float64, "cuda")
    assert choice.backend == "torch" and "float64" in choice.others["triton"]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="op 'scan' does not exist; choose one of "):
        ops.explain("scan", {}, torch.float32, "cpu")
    with pytest.raises(ValueError, match="weight must be"):
        ops.explain("causal_conv1d", {"x": (1, 8, 4), "weight": (5, 4)}, torch.float32, "cpu")
    # An error does not leave the ops explaining.
    assert ops.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2)).shape == (1, 3, 2)


def test_gradients_decide_too(monkeypatch):
    """What a library refuses only where gradients are wanted is refused by default, and for the GPU asked about."""
    pytest.importorskip("zoo.ops.linear_attention.library")  # registers what refuses
    library = pytest.importorskip("zoo.ops.linear_attention.simple_gla")
    monkeypatch.setattr(dispatch, "_cannot_run", lambda op, name, device_type: None)
    monkeypatch.setattr(dispatch, "_automatic", lambda op, device_type: ["library", "torch"])
    asked = []
    monkeypatch.setattr(library, "miscompiles", lambda device: asked.append(device) or True)
    shapes = {"q": (1, 128, 2, 16), "k": (1, 128, 2, 16), "v": (1, 128, 2, 16), "log_decay": (1, 128, 2)}
    training = ops.explain("linear_attention", shapes, torch.bfloat16, "cuda")
    assert training.backend == "torch" and asked[0].type == "cuda"
    assert ops.explain("linear_attention", shapes, torch.bfloat16, "cuda", requires_grad=False).backend == "library"
