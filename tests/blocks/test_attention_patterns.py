"""Attention patterns in the block: windows that grow, StreamingLLM's positions, mistakes. The op's own tests are in
tests/ops/test_pattern.py."""

from __future__ import annotations

import pytest
import torch

from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from zoo.blocks import SequenceContext
from zoo.blocks.attention import WindowGrowth

ATTENTION = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1}


def mixer(layer_idx: int = 0, num_layers: int = 1, **fields):
    return perturb(
        build_part(model_config(hidden_size=16, num_layers=num_layers, mixer=ATTENTION | fields), layer_idx=layer_idx)
    ).double()


def test_a_window_that_grows() -> None:
    growth = WindowGrowth(start=64, growth=2.0, cap=1000)
    assert [growth.at(layer) for layer in range(6)] == [64, 128, 256, 512, 1000, 1000]
    assert WindowGrowth(start=3, growth=1.5).at(3) == 10
    assert WindowGrowth(start=100, growth=1.15).at(1) == 115, "in floats 114.99999999999999"
    assert WindowGrowth(start=5, growth=0.1).at(30) == 1
    assert WindowGrowth(start=2, growth=2.0).at(9999) == 2**31 - 1
    x = random_input(1, 40, 16, dtype=torch.float64)
    for layer, window in ((0, 2), (2, 8), (3, 9)):
        grown = mixer(layer, 4, window={"start": 2, "growth": 2.0, "cap": 9})
        plain = mixer(layer, 4, window=window)
        assert_close(grown(x, SequenceContext.of(x)), plain(x, SequenceContext.of(x)), tolerance=1e-12)
        assert grown.flops(1, 40) == plain.flops(1, 40) and grown.state_bytes(1, 40) == plain.state_bytes(1, 40)


@pytest.mark.parametrize("more", [{}, {"num_sinks": 2}, {"stride": 4}, {"dilation": 2}], ids=str)
def test_a_window_for_each_layer(more: dict) -> None:
    """Where it is null nothing stands outside; the whole model's list is given, whatever the layers between."""
    x = random_input(1, 40, 16, dtype=torch.float64)
    for layer, window in enumerate([3, None, 8]):
        listed = mixer(layer, 3, window=[3, None, 8], **more)
        has_outside = window is not None or "dilation" in more
        plain = mixer(layer, 3, window=window, **(more if has_outside else {}))
        assert_close(listed(x, SequenceContext.of(x)), plain(x, SequenceContext.of(x)), tolerance=1e-12)
        assert listed.flops(1, 40) == plain.flops(1, 40) and listed.state_bytes(1, 40) == plain.state_bytes(1, 40)
        assert listed.config.varies_with_depth


def test_random_blocks_differ_from_layer_to_layer() -> None:
    fields = {"window": 4, "random": {"blocks": 1, "block_size": 4, "seed": 7}}
    assert mixer(1, 2, **fields).pattern.seed == 8
    assert mixer(0, 2, **fields).pattern != mixer(1, 2, **fields).pattern


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"window": 5, "dilation": 3, "num_sinks": 2}, 4 * 3 + 2),
        ({"window": 5, "num_sinks": 2}, 4 + 2),
        ({"window": 5, "stride": 4}, 60),
        ({"window": 5, "random": {"blocks": 1}}, 60),
        ({"dilation": 3}, 60),
    ],
)
def test_the_state_keeps_what_later_queries_see(fields: dict, kept: int) -> None:
    layer, x = mixer(**fields), random_input(2, 60, 16, dtype=torch.float64)
    state = layer.new_state(2, x.device, x.dtype)
    parts = [layer(part, SequenceContext.of(part, seen=torch.full((2,), 7 * i)), state)
             for i, part in enumerate(x.split(7, 1))]  # fmt: skip
    assert_close(torch.cat(parts, 1), layer(x, SequenceContext.of(x)), tolerance=1e-12)
    assert state["keys"].shape[1] == kept and state.nbytes() == layer.state_bytes(2, 60)


def streaming(layer, x, window: int, sinks: int) -> torch.Tensor:
    """StreamingLLM (section 3.2) as its paper tells it, one token at a time: the cache holds the sinks and the window,
    unturned; keys and the query are turned to their places in the cache."""
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    outs = []
    for t in range(x.shape[1]):
        kept = [j for j in range(t + 1) if j < sinks or t - j < window]
        places = torch.arange(len(kept))[None]
        turned, _ = layer.rotary(k[:, kept], k[:, kept], places)
        query, _ = layer.rotary(q[:, t, None], q[:, t, None], places[:, -1:])
        weights = torch.softmax(torch.einsum("bqhd,bkgd->bhqk", query, turned) * 8**-0.5, -1)
        outs.append(torch.einsum("bhqk,bkgd->bqhd", weights, v[:, kept]).flatten(2))
    return layer.o_proj(torch.cat(outs, 1))


def test_sinks_stand_where_the_cache_holds_them() -> None:
    layer, x = mixer(window=6, num_sinks=3, sink_positions="cache"), random_input(2, 40, 16, dtype=torch.float64)
    layer.rotary.inv_freq = layer.rotary.inv_freq.double()
    expected = streaming(layer, x, 6, 3)
    # float32 angles of other positions: the relative distances are the same, their rounding is not.
    assert_close(layer(x, SequenceContext.of(x)), expected, tolerance=1e-5)
    as_text = mixer(window=6, num_sinks=3)
    assert_close(as_text(x[:, :9], SequenceContext.of(x[:, :9])), expected[:, :9], tolerance=1e-5)
    assert (as_text(x, SequenceContext.of(x)) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"window": -1},
            "mixer.window: must be a whole number >= 1 or a mapping or a list, each entry (a whole number >= 1 or "
            "null) or null, got -1",
        ),
        ({"window": [4, 5]}, "mixer.window: must have an entry for each of the model's 1 layers, got 2"),
        ({"window": []}, "mixer.window: must have an entry for each of the model's 1 layers, got 0"),
        ({"window": [None], "num_sinks": 1}, "mixer.window: is null for every layer; remove it"),
        ({"window": [-4]}, "mixer.window[0]: must be a whole number >= 1, got -4"),
        ({"window": [True]}, "mixer.window[0]: must be a whole number, got true"),
        ({"window": [4], "num_sinks": 1, "sink_positions": "cache"}, "change these or remove it"),
        ({"window": {"start": 4}}, "mixer.window.growth: is missing; give a number > 0"),
        ({"window": {"start": 4, "growth": 2.0, "max": 9}}, "mixer.window.max: unknown key; known: start, growth, cap"),
        ({"window": {"start": 64, "growth": 2.0, "cap": 32}}, "mixer.window.cap: must be at least start (64), got 32"),
        ({"window": {"start": 0, "growth": 2.0}}, "mixer.window.start: must be a whole number >= 1, got 0"),
        ({"dilation": 0}, "mixer.dilation: must be a whole number >= 1, got 0"),
        ({"stride": 4}, "mixer.stride: needs a window to stand outside of; give window too"),
        ({"random": {"blocks": 1}}, "mixer.random: needs a window to stand outside of; give window too"),
        ({"window": 4, "dilation": 2, "stride": 4}, "mixer.stride: does not go with dilation (2); remove one of them"),
        ({"window": 4, "random": {}}, "mixer.random.blocks: is missing; give a whole number >= 1"),
        (
            {"window": 4, "sink_positions": "cache"},
            "mixer.sink_positions: cache needs num_sinks, one window without dilation, and no stride, random or "
            "global_token_ids; change these or remove it",
        ),
        (
            {"window": 4, "num_sinks": 2, "sink_positions": "cache", "rope": None},
            "mixer.sink_positions: cache needs a rope whose angles do not change with the length; change rope or "
            "remove it",
        ),
    ],
)
def test_mistakes_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        mixer(**fields)
    assert str(raised.value).endswith(message)
