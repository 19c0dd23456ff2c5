"""Mixers side by side: the sum of what each gives alone, and mistakes named by their path."""

import pytest
import torch

from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input, run_mixer
from zoo import ConfigError, load_config
from zoo.blocks import SequenceContext

ATTENTION = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "window": 4}
MAMBA2 = {"kind": "mamba2", "head_dim": 4, "state_size": 3}
LIGHTNING = {"kind": "lightning", "num_heads": 2}


def side_by_side(branches, **fields):
    return build_part(model_config(hidden_size=8, mixer={"kind": "parallel", "branches": branches, **fields}))


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("branches", [[ATTENTION], [MAMBA2, ATTENTION], [LIGHTNING, LIGHTNING, MAMBA2]])
def test_equals_its_branches_alone(branches, combine):
    a, b = [0.5, 1.5, 1.0][: len(branches)], [2.0, 1.0, -0.3][: len(branches)]
    mixer = perturb(side_by_side(branches, combine=combine, input_scales=a, output_scales=b).double())
    x = random_input(2, 11, 8, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for i, branch in enumerate(branches):
        alone = build_part(model_config(hidden_size=8, mixer=branch)).double()
        alone.load_state_dict(mixer.branches[i].state_dict())
        expected += b[i] * run_mixer(alone)(a[i] * x) / (len(branches) if combine == "mean" else 1)
    assert_close(run_mixer(mixer)(x), expected)
    plain = side_by_side(branches, combine=combine).double()
    plain.load_state_dict(mixer.state_dict())
    ones = side_by_side(branches, combine=combine, input_scales=[1] * len(a), output_scales=[1.0] * len(a)).double()
    ones.load_state_dict(mixer.state_dict())
    assert torch.equal(run_mixer(plain)(x), run_mixer(ones)(x))


def test_the_branches_of_one_kind_are_initialised_apart():
    torch.manual_seed(0)
    first, second = side_by_side([MAMBA2, MAMBA2]).branches
    assert not torch.equal(first.in_proj.weight, second.in_proj.weight)
    torch.manual_seed(0)
    assert torch.equal(first.in_proj.weight, side_by_side([MAMBA2, MAMBA2]).branches[0].in_proj.weight)


@torch.no_grad()
def test_its_state_holds_every_branch_s_and_nothing_else():
    mixer = perturb(side_by_side([MAMBA2, {"kind": "parallel", "branches": [LIGHTNING, ATTENTION]}]))
    x = random_input(3, 9, 8)
    expected = run_mixer(mixer)(x)
    state = mixer.new_state(3, torch.device("cpu"), torch.float32)
    mixer(x[:, :6], SequenceContext.of(x[:, :6]), state)
    names = {"0.conv", "0.S", "1.0.S", "1.1.keys", "1.1.values", "1.1.mask"}
    assert set(state.tensors) == names and state.nbytes() == mixer.state_bytes(3, 6)
    saved = {name: tensor.clone() for name, tensor in state.tensors.items()}
    other = mixer.new_state(3, torch.device("cpu"), torch.float32)
    other.load(saved)
    rows = torch.tensor([2, 0])
    state.select(rows)
    rest = x[:, 6:]
    context = SequenceContext.of(rest, position_ids=torch.arange(6, 9)[None])
    assert_close(mixer(rest, context, other), expected[:, 6:])
    context = SequenceContext.of(rest[rows], position_ids=torch.arange(6, 9)[None])
    assert_close(mixer(rest[rows], context, state), expected[rows, 6:])
    state.reset()
    assert state["1.1.keys"].shape[:2] == (2, 0) and not state["0.S"].any()
    state.update(**{"1.0.S": torch.ones_like(state["1.0.S"])})
    assert state["1.0.S"].all() and not state["0.S"].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "branches: is missing; give a list"),
        ({"branches": []}, "branches: is empty; give at least one mixer"),
        ({"branches": ATTENTION}, "branches: must be a list, each entry a mapping, got {'kind': 'attention'"),
        ({"branches": [MAMBA2, 3]}, r"branches\[1\]: must be a mapping with a kind, got 3"),
        ({"branches": [MAMBA2, {"num_heads": 2}]}, r"branches\[1\]\.kind: is missing"),
        ({"branches": [{"kind": "mamba3"}]}, r"branches\[0\]\.kind: unknown mixer 'mamba3'; did you mean 'mamba'\?"),
        ({"branches": [{"kind": "mlp"}]}, r"branches\[0\]\.kind: unknown mixer 'mlp'"),
        ({"branches": [MAMBA2, {"kind": "none"}]}, r"branches\[1\]\.kind: must be a mixer, got 'none'; remove the"),
        ({"branches": [{**ATTENTION, "num_head": 2}]}, r"branches\[0\]\.num_head: unknown key; did you mean 'num_h"),
        ({"branches": [{**ATTENTION, "num_heads": 3}]}, r"branches\[0\]\.num_heads: must divide hidden_size \(8\)"),
        ({"branches": [{**ATTENTION, "rope": {"rotary_dim": 3}}]}, r"branches\[0\]\.rope\.rotary_dim: must be even"),
        (
            {"branches": [{"kind": "parallel", "branches": [MAMBA2, {**MAMBA2, "head_dim": 5}]}]},
            r"branches\[0\]\.branches\[1\]\.head_dim: must divide",
        ),
        ({"branches": [MAMBA2], "input_scales": [1, 2]}, "input_scales: must be 1 numbers, one per branch, got 2"),
        ({"branches": [MAMBA2], "output_scales": []}, "output_scales: must be 1 numbers, one per branch, got 0"),
        ({"branches": [MAMBA2], "combine": "product"}, "combine: must be one of sum, mean"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=rf"^blocks\.b\.mixer\.{message}"):
        model_config(hidden_size=8, mixer={"kind": "parallel", **fields})


def test_defaults_are_checked_into_the_branches():
    mapping = {"vocab_size": 8, "hidden_size": 8, "blocks": {"b": {"mixer": MAMBA2}}, "pattern": "b"}
    mixer = {"kind": "parallel", "branches": [MAMBA2, {"kind": "mamba2", "head_dims": 4}]}
    with pytest.raises(ConfigError, match=r"^defaults\.mixer\.branches\[1\]\.head_dims: unknown key; did you mean"):
        load_config({**mapping, "defaults": {"mixer": mixer}})


def test_overrides_reach_a_branch():
    mixer = {"kind": "parallel", "branches": [MAMBA2, {**ATTENTION, "rope": {"theta": 5.0}}]}
    mapping = {"vocab_size": 8, "hidden_size": 8, "blocks": {"b": {"mixer": mixer}}, "pattern": "b"}
    path = "blocks.b.mixer.branches"
    config = load_config(mapping, [f"{path}[1].num_heads=4", f"{path}.1.rope.theta=7.5", f"{path}[0]={{kind: mamba}}"])
    first, second = config.layers[0].mixer.config.branches
    assert (first.kind, second.config.num_heads, second.config.rope.theta) == ("mamba", 4, 7.5)
    assert mixer["branches"][1]["num_heads"] == 2
    for override, message in (
        (f"{path}[2].num_heads=4", rf"^{path}\[2\]: must be an index below 2, got '2'"),
        (f"{path}.x=4", rf"^{path}\.x: must be an index below 2, got 'x'"),
        (f"{path}[1].num_head=4", r"^blocks\.b\.mixer\.branches\[1\]\.num_head: unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(mapping, [override])
