"""Kinds: the ones there are, and the ones others add."""

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo import ConfigError, load_config
from zoo.blocks import (
    FeedForward,
    FeedForwardConfig,
    Mixer,
    MixerConfig,
    RouterStatistics,
    State,
    kind_of,
    kinds,
    register,
)
from zoo.blocks.attention import Attention, AttentionConfig
from zoo.schema import FieldError


@dataclass(frozen=True, kw_only=True)
class MeanConfig(MixerConfig):
    """A mixer for these tests."""

    span: int = 2


class Mean(Mixer):
    """A sum over all tokens so far."""

    def __init__(self, config, model, layer_idx):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.hidden_size))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x, context, state=None):
        y = x.cumsum(1) if state is None else x.cumsum(1) + state["sum"][:, None]
        if state is not None:
            state.update(sum=y[:, -1])
        return self.weight * y

    def new_state(self, batch_size, device, dtype):
        return State(sum=torch.zeros(batch_size, len(self.weight), device=device))


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(FeedForwardConfig):
    """A feed-forward for these tests, with a router that its config says nothing of."""


class Routed(FeedForward):
    def __init__(self, config, model, layer_idx):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.hidden_size, 2))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor, context):
        logits = x @ self.weight
        p = logits.softmax(-1)
        chosen = F.one_hot(p.argmax(-1), 2).float().sum((0, 1))
        tokens, z = torch.tensor(float(x[..., 0].numel())), logits.logsumexp(-1).square().sum()
        return x * p[..., :1], RouterStatistics(tokens, chosen, p.sum((0, 1)), z)


@pytest.fixture
def clean(monkeypatch):
    """Nothing registered here outlives the test."""
    from zoo.blocks import registry

    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))


def test_every_kind_is_listed_once():
    listed = [(kind.role, kind.name) for kind in kinds()]
    assert listed == sorted(listed, key=lambda key: (key[0] != "mixer", key[1]))
    assert len(set(listed)) == len(listed)
    built_in = {
        "mixer": {
            "attention",
            "gated_delta",
            "kda",
            "lightning",
            "mamba",
            "mamba2",
            "none",
            "parallel",
            "rglru",
            "short_conv",
        },
        "ffn": {"mlp", "moe", "none"},
    }
    for role, names in built_in.items():
        assert names <= {name for known, name in listed if known == role}


def test_a_kind_has_fields_with_types_and_one_line():
    for kind in kinds():
        assert kind.config_class.__doc__ and kind.config_class.__doc__.strip()
        assert issubclass(kind.config_class, MixerConfig if kind.role == "mixer" else FeedForwardConfig)


def test_registering_and_using_a_kind(clean):
    zoo.register("mean", MeanConfig, Mean)
    register("mean", MeanConfig, Mean)  # again, the same: no harm
    assert kind_of("mixer", "mean").module_class is Mean
    config = load_config(
        {"vocab_size": 8, "hidden_size": 8, "blocks": {"b": {"mixer": {"kind": "mean", "span": 5}}}, "pattern": "b"}
    )
    assert config.layers[0].mixer.config == MeanConfig(span=5)
    with pytest.raises(ConfigError, match=r"blocks\.b\.mixer\.spam: unknown key; did you mean 'span'\?"):
        load_config(
            {"vocab_size": 8, "hidden_size": 8, "blocks": {"b": {"mixer": {"kind": "mean", "spam": 5}}}, "pattern": "b"}
        )


def test_a_taken_name_is_refused(clean):
    with pytest.raises(ValueError, match="mixer kind 'attention' is taken by Attention"):
        register("attention", MeanConfig, Mean)
    register("attention", AttentionConfig, Attention)


def test_the_role_is_that_of_the_config(clean):
    @dataclass(frozen=True, kw_only=True)
    class Feed(FeedForwardConfig):
        pass

    register("attention", Feed, Routed)  # an ffn called attention disturbs no mixer
    assert kind_of("ffn", "attention").config_class is Feed
    assert kind_of("mixer", "attention").config_class is AttentionConfig

    class Plain(MixerConfig):
        pass

    class Stranger:
        pass

    with pytest.raises(TypeError, match="Stranger must be a dataclass derived from"):
        register("x", Stranger, Mean)
    for module_class in (nn.Identity, Routed):
        with pytest.raises(TypeError, match=rf"{module_class.__name__} must be derived from Mixer, as its config says"):
            register("x", MeanConfig, module_class)
    with pytest.raises(TypeError, match="Mean must be derived from FeedForward"):
        register("x", Feed, Mean)


def test_registered_kinds_train_and_generate(clean):
    register("mean", MeanConfig, Mean)
    register("routed", RoutedConfig, Routed)
    block = {"mixer": {"kind": "mean"}, "ffn": {"kind": "routed"}}
    model = zoo.build({"vocab_size": 8, "hidden_size": 8, "blocks": {"b": block}, "pattern": "b*2"})
    ids = torch.arange(1, 7)[None]
    output = model.train()(ids, labels=ids)
    assert output.aux_loss is None and output.expert_loads is None
    output.loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    assert model(ids, labels=ids).loss < output.loss
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.eval().generate(ids, **options)
    assert generated.shape == (1, 11)
    assert torch.equal(generated, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize(("role", "name", "hint"), [("mixer", "atention", "attention"), ("ffn", "mlpp", "mlp")])
def test_a_mistyped_kind_is_corrected(role, name, hint):
    with pytest.raises(FieldError, match=f"kind: unknown {role} '{name}'; did you mean '{hint}'"):
        kind_of(role, name)


@pytest.mark.parametrize("name", [None, 3, ["attention"], {"a": 1}])
def test_a_kind_is_a_name(name):
    with pytest.raises(FieldError, match="kind: unknown mixer"):
        kind_of("mixer", name)


PLUGIN = """
from dataclasses import dataclass
import torch
import zoo
from zoo.blocks import Mixer, MixerConfig, State
from zoo.blocks.linear import in_projection

@dataclass(frozen=True, kw_only=True)
class ShiftConfig(MixerConfig):
    "Mixes with the token before."

class Shift(Mixer):
    def __init__(self, config, model, layer_idx):
        super().__init__()
        self.proj = in_projection(model, model.hidden_size, model.hidden_size)
    def forward(self, x, context, state=None):
        return self.proj(torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
    def new_state(self, batch_size, device, dtype):
        return State(last=torch.zeros(batch_size, 1, device=device))
    def state_bytes(self, batch, length):
        return 4 * batch
    def flops(self, batch, length):
        return 2 * batch * length * self.proj.weight.numel()

def add():
    zoo.register("shift", ShiftConfig, Shift)

def fail():
    raise RuntimeError("it rained")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch, clean):
    """An installed package whose entry point is the given function."""
    from zoo.blocks import registry

    def install(function):
        (tmp_path / "myplugin.py").write_text(PLUGIN)
        info = tmp_path / "myplugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: myplugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[zoo.blocks]\nmine = myplugin:{function}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "_plugins_loaded", False)

    yield install
    sys.modules.pop("myplugin", None)


def test_an_installed_package_adds_its_kinds(plugin):
    plugin("add")
    blocks = {"b": {"mixer": {"kind": "shift"}}}
    model = zoo.build({"vocab_size": 8, "hidden_size": 8, "blocks": blocks, "pattern": "b*2"})
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 8)
    assert "shift" in [kind.name for kind in kinds()]


def test_a_broken_package_is_named(plugin):
    plugin("fail")
    for _ in range(2):  # it is tried again, not forgotten
        with pytest.raises(FieldError, match=r"the plugin myplugin:fail cannot be loaded \(it rained\)"):
            kind_of("mixer", "attention")
