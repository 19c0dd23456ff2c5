"""Costs from shapes alone: they are the built model's, and the memory estimate is near a measured training step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

import zoo
from tests.conformance.subjects import SUBJECTS
from zoo.cli.describe import table
from zoo.models.summary import runs, summarize

CONFIGS = sorted(Path("configs/models").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_costs_are_the_built_model_s(path: Path) -> None:
    config = zoo.load_config(path)
    model = zoo.build(config, device="meta", dtype=torch.bfloat16)
    total = summarize(config, 3000).total
    assert total.params == model.num_params()
    assert total.active_params == model.num_active_params()
    assert total.flops == model.flops(1, 3000)
    assert total.state_bytes == model.state_bytes(1, 3000)


@pytest.mark.parametrize("subject", sorted(SUBJECTS))
def test_every_subject_has_costs(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.models.summary.PROBE_TOKENS", 64)  # segments of 6 tokens are slow without data too
    config = zoo.load_config(SUBJECTS[subject])
    summary = summarize(config, 8)
    assert summary.total.params == zoo.build(config, device="meta").num_params()
    assert all(cost.activation_bytes > 0 for cost in summary.blocks.values())


def test_a_text_that_is_longer_than_cosformer_s_has_costs() -> None:
    """The probe's 1,024 tokens are no text."""
    mixer = {"kind": "linear", "num_heads": 2, "feature_map": "cosformer", "max_length": 20}
    config = zoo.load_config({"vocab_size": 8, "hidden_size": 32, "blocks": {"b": {"mixer": mixer}}, "pattern": "b"})
    assert summarize(config, 20).total.params == zoo.build(config, device="meta").num_params()


@pytest.mark.parametrize("subject", ["zamba", "shared"])
def test_weights_that_layers_share_are_counted_once(subject: str) -> None:
    config = zoo.load_config(SUBJECTS[subject])
    model = zoo.build(config, device="meta", dtype=torch.bfloat16)
    summary = summarize(config, 3000)
    assert summary.total.params == model.num_params()
    assert summary.total.active_params == model.num_active_params()
    assert summary.total.flops == model.flops(1, 3000)
    assert summary.total.state_bytes == model.state_bytes(1, 3000)
    shared = {layer.name for layer in config.layers if layer.shared}
    assert set(summary.shared) == shared and all(cost.params > 0 for cost in summary.shared.values())
    assert all(any(f"{name}, shared" in line for line in table(summary)) for name in shared)


def test_an_untied_head_and_a_layer_norm_are_counted() -> None:
    config = zoo.load_config(
        "configs/models/transformer-tiny.yaml", ["tie_word_embeddings=false", "norm={kind: layer}"]
    )
    assert summarize(config, 8).total.params == zoo.build(config, device="meta").num_params()


def test_minimax_text_01() -> None:
    """The published 456.09 B parameters, 45.9 B of them active (without the embeddings)."""
    config = zoo.load_config(
        {
            "vocab_size": 200_064,
            "hidden_size": 6144,
            "defaults": {"ffn": {"kind": "moe", "intermediate_size": 9216, "num_experts": 32, "top_k": 2}},
            "blocks": {
                "lightning": {"mixer": {"kind": "lightning", "num_heads": 64, "head_dim": 128}},
                "softmax": {"mixer": {"kind": "attention", "num_heads": 64, "num_kv_heads": 8, "head_dim": 128}},
            },
            "pattern": "(lightning*7 softmax)*10",
        }
    )
    summary = summarize(config, 2**20)
    assert round(summary.total.params / 1e9, 2) == 456.09
    assert round((summary.total.active_params - summary.ends.params) / 1e9, 1) == 45.9


def test_runs_are_consecutive_layers_of_one_block() -> None:
    config = zoo.load_config("configs/models/jamba-tiny.yaml", ["pattern=mamba*2 softmax mamba mamba_moe*3"])
    found = [(run.first, run.last, run.layer.name, run.count) for run in runs(config.layers)]
    assert found == [(0, 1, "mamba", 2), (2, 2, "softmax", 1), (3, 3, "mamba", 1), (4, 6, "mamba_moe", 3)]


def test_ten_thousand_layers_are_one_block() -> None:
    config = zoo.load_config("configs/models/transformer-tiny.yaml", ["pattern=softmax*10000"])
    one = zoo.load_config("configs/models/transformer-tiny.yaml", ["pattern=softmax"])
    many, single = summarize(config, 64), summarize(one, 64)
    assert many.total.params - many.ends.params == 10_000 * (single.total.params - single.ends.params)


@pytest.mark.parametrize("name", ["transformer", "minimax", "jamba", "mamba2"])
def test_the_memory_estimate_is_near_a_measured_training_step(name: str) -> None:
    """Peak bytes that torch allocates in the second training step (the first makes the optimizer's averages)."""
    config = zoo.load_config(f"configs/models/{name}-tiny.yaml")
    batch, length = 2, 512
    model = zoo.build(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    tokens = torch.randint(256, (batch, length))

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer, tokens)
    with tracker:
        step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    estimate = sum(summarize(config, length).training_bytes(batch).values())
    assert 0.9 < estimate / peak < 1.05, (estimate / 2**20, peak / 2**20)
