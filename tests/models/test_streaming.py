"""Generation without end: memory stays flat, logits finite, and within the window it is what generate() says."""

from __future__ import annotations

import gc
from itertools import islice

import pytest
import torch

import zoo
from zoo.models.streaming import obstacle, stream

TRAINED = 64  # what the sizes below are for
MLP = {"kind": "mlp", "intermediate_size": 24}
SINKS = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "window": 24, "num_sinks": 4}
INFINI = {"kind": "infini", "num_heads": 2}
MODEL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "initializer_range": 0.3,
    "defaults": {"ffn": MLP},
    "blocks": {
        "sinks": {"mixer": SINKS},
        "lightning": {"mixer": {"kind": "lightning", "num_heads": 2}},
        "mamba": {"mixer": {"kind": "mamba", "state_size": 4}},
    },
    "pattern": "sinks lightning mamba",
}


def greedy(logits: torch.Tensor) -> torch.Tensor:
    assert logits.isfinite().all()
    return logits.argmax(-1, keepdim=True)


def build(**changes: object) -> zoo.ZooForCausalLM:
    torch.manual_seed(0)
    return zoo.build(MODEL | changes).eval()


def tensor_bytes() -> int:
    gc.collect()
    return sum({each[0]: each[1] for each in map(_storage, gc.get_objects())}.values())


def _storage(x: object) -> tuple[int, int]:
    """Where a tensor's memory is, and its bytes."""
    try:
        if issubclass(type(x), torch.Tensor) and x.device.type == "cpu":
            return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
    except Exception:  # a fake tensor, or a proxy of something dead
        pass
    return 0, 0


def test_on_from_a_hundred_thousand_tokens() -> None:
    """The prompt is read in chunks; token by token it is tests/benchmarks/test_stream.py, and in full `make stream`."""
    model = build()
    prompt = torch.randint(61, (1, 100_000))
    tokens = stream(model, prompt, greedy)
    assert all(0 <= int(token) < 61 for token in islice(tokens, 100))
    early = tensor_bytes()
    assert all(0 <= int(token) < 61 for token in islice(tokens, 400))
    assert tensor_bytes() == early


def test_within_the_window_it_is_what_generate_says() -> None:
    model = build()
    prompt = torch.randint(61, (1, 9))
    mask = torch.ones_like(prompt)
    options = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, max_new_tokens=12, **options)[:, 9:]
    assert torch.equal(torch.cat(list(islice(stream(model, prompt, greedy), 12)), 1), expected)


def test_sinks_are_seen_where_the_cache_holds_them() -> None:
    """The same as a model whose own file says so, and nothing is left changed."""
    as_text = build()
    blocks = MODEL["blocks"] | {"sinks": {"mixer": {**SINKS, "sink_positions": "cache"}}}
    as_cache = build(blocks=blocks)
    prompt = torch.randint(61, (1, TRAINED))
    seen: list[torch.Tensor] = []

    def recording(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return greedy(logits)

    tokens = stream(as_text, prompt, recording)
    chosen = torch.cat(list(islice(tokens, 20)), 1)
    tokens.close()
    with torch.no_grad():
        ids = torch.cat([prompt, chosen], 1)
        whole = as_cache(ids).logits[:, TRAINED - 1 : -1]
        assert torch.allclose(torch.stack(seen, 1), whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(whole, as_text(ids).logits[:, TRAINED - 1 : -1], rtol=1e-2, atol=1e-2)
    assert as_text.model.layers[0].mixer.config.sink_positions == "text"


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"kind": "attention", "num_heads": 2}, r"the state of layer 0 \(attention\) grows with the text"),
        ({**SINKS, "stride": 8}, r"the state of layer 0 \(attention\) grows"),
        (
            {"kind": "attention", "num_heads": 4, "window": 8, "rope": {
                "type": "longrope", "factor": 4.0, "original_max_position_embeddings": 512,
                "short_factor": [1.0, 1.1, 1.4, 1.9], "long_factor": [1.5, 3.0, 8.0, 21.0]}},
            "longrope turns all tokens",
        ),
        ({"kind": "compressive", "num_heads": 2}, r"the state of layer 0 \(compressive\) grows"),
        (
            {"kind": "parallel", "branches": [{**INFINI, "segment": 2**30}, {"kind": "compressive", "num_heads": 2}]},
            r"the state of layer 0 \(parallel\) grows",
        ),
        (
            {"kind": "linear", "num_heads": 2, "feature_map": "cosformer", "max_length": 99},
            r"layer 0 \(linear, cosformer\) is for 99 tokens; it needs elu or relu there",
        ),
        (
            {"kind": "parallel", "branches": [
                {"kind": "lightning", "num_heads": 2},
                {"kind": "linear", "num_heads": 2, "feature_map": "cosformer", "max_length": 99}]},
            r"layer 0 \(linear, cosformer\) is for 99 tokens",
        ),
    ],
)  # fmt: skip
def test_models_that_grow_are_refused(mixer: dict, message: str) -> None:
    model = build(blocks=MODEL["blocks"] | {"sinks": {"mixer": mixer}})
    assert obstacle(build()) is None
    with pytest.raises(ValueError, match=message):
        next(stream(model, torch.zeros(1, 3, dtype=torch.long), greedy))


@pytest.mark.parametrize("segment", [1, 5, 1000, 100_003])
def test_a_state_may_go_up_and_down(segment: int) -> None:
    infini = INFINI | {"segment": segment}
    for mixer in (infini, {"kind": "parallel", "branches": [infini, {"kind": "lightning", "num_heads": 2}]}):
        assert obstacle(build(blocks=MODEL["blocks"] | {"sinks": {"mixer": mixer}})) is None
