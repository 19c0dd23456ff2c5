"""The adapter of flash-linear-attention: what is wrong is one line, and a layer with its interface keeps the contract.

The library's own layers need a GPU; here stands one with the same interface (fla/layers/gla.py), written in torch.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.blocks.helpers import build_part, model_config, random_input
from zoo.blocks import SequenceContext, fla
from zoo.models.streaming import obstacle
from zoo.schema import FieldError


class RunningSum(nn.Module):
    """y_t = W sum_(j <= t) x_j, with a convolution state of the last token for good measure."""

    def __init__(self, hidden_size: int = 8, gain: float = 1.0, layer_idx: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        if gain <= 0:
            raise AssertionError("gain must be positive")
        self.gain, self.layer_idx, self.hidden_size = gain, layer_idx, hidden_size
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.constant_(self.proj.weight, 0.25)  # otherwise than a Linear's own
        self.A_log = nn.Parameter(torch.full((hidden_size,), 0.5))

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, use_cache: bool = False, **kwargs: Any):
        last = None
        if past_key_values is not None and len(past_key_values) > self.layer_idx:
            last = past_key_values[self.layer_idx]
            assert past_key_values.get_seq_length() > 0
        sums = hidden_states.cumsum(1)
        cu_seqlens = kwargs.get("cu_seqlens")
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
            parts = [hidden_states[:, a:b].cumsum(1) for a, b in pairwise(bounds)]
            sums = torch.cat(parts, 1)
        if last is not None:
            sums = sums + last["recurrent_state"] + 0 * last["conv_state"][0]
        if use_cache:
            past_key_values.update(
                layer_idx=self.layer_idx, recurrent_state=sums[:, -1:], conv_state=(hidden_states[:, -1:], None),
                attn_state=(hidden_states,), offset=hidden_states.shape[1],
            )  # fmt: skip
        return self.gain * self.proj(sums) * self.A_log.exp(), None, past_key_values


class Bare(nn.Module):
    """It returns y alone, wants no layer_idx and keeps nothing."""

    def __init__(self, hidden_size: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.proj(hidden_states)


class Odd(RunningSum):
    """It keeps a state that is no tensor."""

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, use_cache: bool = False, **kwargs: Any):
        if use_cache:
            past_key_values.update(recurrent_state=object(), offset=hidden_states.shape[1])
        return hidden_states, None, past_key_values


class Dense(RunningSum):
    """It knows nothing of documents."""

    def forward(self, hidden_states: Tensor, **kwargs: Any):
        return self.proj(hidden_states), None, None


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("fla.layers")
    for cls, module in ((RunningSum, "running"), (Dense, "dense"), (Bare, "bare"), (Odd, "odd")):
        monkeypatch.setattr(cls, "__module__", f"fla.layers.{module}")
        setattr(package, cls.__name__, cls)
    package.__all__ = ["RunningSum", "Dense", "Bare", "Odd"]
    monkeypatch.setitem(sys.modules, "fla.layers", package)
    monkeypatch.setattr(fla, "check_device", lambda layer, device: None)


def build(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_part(model_config(hidden_size=8, num_layers=2, mixer={"kind": "fla", **fields}))


@pytest.mark.parametrize("name", ["running", "RunningSum"])
def test_by_the_name_of_the_module_or_the_class(library: None, name: str) -> None:
    mixer, x = build(layer=name, gain=2.0), random_input(2, 5, 8)
    expected = 2.0 * mixer.layer.proj(x.cumsum(1)) * torch.exp(torch.tensor(0.5))
    assert torch.allclose(mixer(x, SequenceContext.of(x)), expected, atol=1e-5)
    assert mixer.num_params() == 72 and mixer.flops(2, 5) == 2 * 2 * 5 * 64


def test_decoding_padding_and_packing(library: None) -> None:
    mixer, x = build(layer="running"), random_input(2, 9, 8)
    whole = mixer(x, SequenceContext.of(x))
    state = mixer.new_state(2, x.device, x.dtype)
    for rows in ([0, 1], [1, 0]):  # again after a reset, and with the rows the other way round
        parts = [mixer(part, SequenceContext.of(part), state) for part in x[rows].split([4, 3, 1, 1], 1)]
        assert torch.allclose(torch.cat(parts, 1), whole[rows], atol=1e-5)
        assert state.length() == 9 and state["attn_state.0"].shape == (2, 9, 8)
        assert state.nbytes() == sum(tensor.nbytes for tensor in state.tensors.values()) > 0
        state.reset()
    mixer(x, SequenceContext.of(x), state)
    state.reorder(torch.tensor([1, 0]))
    assert torch.allclose(state["recurrent_state"], x.flip(0).sum(1, keepdim=True), atol=1e-5)
    assert state["seen"].tolist() == [9, 9]
    fresh = mixer.new_state(2, x.device, x.dtype)
    fresh.load(state.tensors)
    after = mixer(x[:, :1], SequenceContext.of(x[:, :1]), fresh)
    assert torch.allclose(after, mixer(torch.cat([x.flip(0), x[:, :1]], 1), SequenceContext.of(x))[:, -1:], atol=1e-5)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    padded = mixer(x, SequenceContext.of(x, padding_mask=mask))
    alone = mixer(x[1:, 4:], SequenceContext.of(x[1:, 4:]))
    assert torch.allclose(padded[1:, 4:], alone, atol=1e-5) and (padded[1, :4] == 0).all()
    with pytest.raises(ValueError, match="cannot continue a state with padding"):
        mixer(x, SequenceContext.of(x, padding_mask=mask), mixer.new_state(2, x.device, x.dtype))
    with pytest.raises(ValueError, match="takes neither padding nor packed documents"):
        build(layer="dense")(x, SequenceContext.of(x, padding_mask=mask))


def test_a_layer_that_returns_y_alone(library: None) -> None:
    mixer, x = build(layer="bare"), random_input(2, 5, 8)
    assert torch.equal(mixer(x, SequenceContext.of(x)), mixer.layer.proj(x))
    with pytest.raises(ValueError, match="fla's bare keeps no state; give it whole texts"):
        mixer(x, SequenceContext.of(x), mixer.new_state(2, x.device, x.dtype))


def test_a_state_that_is_no_tensor_is_named(library: None) -> None:
    mixer, x = build(layer="odd"), random_input(2, 5, 8)
    with pytest.raises(ValueError, match=r"recurrent_state of this fla layer is no tensor \(object\)"):
        mixer(x, SequenceContext.of(x), mixer.new_state(2, x.device, x.dtype))


def test_parts_of_a_state_keep_their_places() -> None:
    state, x = fla.FlaState(), torch.ones(2, 1)
    seen = torch.tensor([3, 3])
    state.remember(seen, {"conv_state": (None, x, None), "recurrent_state": x})
    before, last = state.recalled()["conv_state"]
    assert before is None and torch.equal(last, x) and state.length() == 3
    state.remember(seen, {"conv_state": (x,)})
    assert len(state.recalled()["conv_state"]) == 1 and torch.equal(state.recalled()["recurrent_state"], x)


def test_a_meta_model_materialises(library: None) -> None:
    """As the layer itself fills its parameters, whoever goes through the modules, from either end."""
    config = {
        "vocab_size": 11,
        "hidden_size": 8,
        "pattern": "f",
        "blocks": {"f": {"mixer": {"kind": "fla", "layer": "running"}}},
    }
    torch.manual_seed(0)
    model = zoo.build(config)
    assert (model.model.layers[0].mixer.layer.A_log == 0.5).all()
    assert (model.model.layers[0].mixer.layer.proj.weight == 0.25).all()
    for module in (*model.modules(), *reversed(list(model.modules()))):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert (model.model.layers[0].mixer.layer.proj.weight == 0.25).all()
    assert "is not known to the zoo" in str(obstacle(model))
    again = zoo.load_config(model.config.to_mapping())
    assert again.layers[0].mixer.config == model.config.layers[0].mixer.config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "blocks.b.mixer.layer: is missing; give a layer of fla.layers, such as gla"),
        ({"layer": 3}, "blocks.b.mixer.layer: must be a text, got 3"),
        ({"layer": "runing"}, "blocks.b.mixer.layer: unknown layer 'runing'; did you mean 'running'?"),
        (
            {"layer": "running", "gian": 1.0},
            "blocks.b.mixer.gian: is no argument of fla's running; did you mean 'gain'?",
        ),
        ({"layer": "running", "hidden_size": 4}, "blocks.b.mixer.hidden_size: is the model's; remove it"),
    ],
)
def test_mistakes_are_one_line(library: None, fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        build(**fields)
    assert str(raised.value).endswith(message) and "\n" not in str(raised.value)


def test_defaults_may_hold_one(library: None) -> None:
    block = {"b": {"mixer": {"kind": "fla", "layer": "running"}}}
    config = {"vocab_size": 8, "hidden_size": 8, "pattern": "b", "blocks": block}
    config = zoo.load_config(config | {"defaults": {"mixer": {"kind": "fla", "gain": 3.0}}})
    assert config.layers[0].mixer.config.arguments == {"gain": 3.0}


def test_arguments_the_layer_refuses(library: None) -> None:
    message = r"mixer.layer: fla's running cannot be built \(AssertionError: gain must be positive\); change its"
    with pytest.raises(ValueError, match=message):
        build(layer="running", gain=-1.0)


def test_without_the_library_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.layers", None)
    with pytest.raises(FieldError, match=r"^layer: needs flash-linear-attention \(.*; pip install") as raised:
        fla.layer_class("gla")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="fla's gla runs kernels that need a GPU, got a tensor on the CPU"):
        fla.check_device("gla", torch.device("cpu"))
    fla.check_device("gla", torch.device("cuda", 0))
