import inspect
from pathlib import Path

import pytest
import torch

import zoo
from tests.conformance.conftest import Measure
from tests.conformance.matrix import PARTS
from tests.conformance.runs import build, chunked, context_of, inputs, mix
from tests.conformance.subjects import SUBJECTS, new_layers
from zoo import ops
from zoo.ops.landmark_attention import chosen as chosen_blocks

LENGTH = 16_384
BOUND = 0.02
FLOAT32 = ("A_log", "D", "dt_bias", "a_param", "gate")  # parameters; every buffer is float32 besides
FLOAT32_ARGUMENTS = {
    "linear_attention": ("log_decay",),
    "selective_scan": ("delta", "A", "D"),
    "delta_rule": ("beta", "log_decay"),
}


@pytest.fixture
def same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run of a mixer attends to the blocks that the first chose: near a tie bfloat16 chooses another, which
    is as good and not near."""
    choose, chosen = ops.select_blocks, []

    def call(*arguments: object, **keywords: object) -> torch.Tensor:
        if chosen:
            return chosen.pop()
        chosen.append(choose(*arguments, **keywords))
        return chosen[0]

    attend, calls, tiles = ops.landmark_attention, [], []

    def landmark_attention(*arguments: object, **keywords: object) -> torch.Tensor:
        calls.append(len(tiles))
        return attend(*arguments, **keywords)

    def best(scores: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A tile at a time, in the same order in both runs."""
        if len(calls) % 2:
            tiles.append(scores.topk(slots, -1).indices)
        indices = tiles[-1] if len(calls) % 2 else tiles.pop(0)
        return scores.gather(-1, indices), indices

    monkeypatch.setattr(ops, "landmark_attention", landmark_attention)
    monkeypatch.setattr(chosen_blocks, "best_blocks", best)
    monkeypatch.setattr(ops, "select_blocks", call)


@torch.no_grad()
def test_bfloat16_stays_near_float32_over_16k_tokens(subject: str, measure: Measure, same_blocks: None) -> None:
    model, rounded = build(subject, torch.float32), build(subject, torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.copy_(rounded.get_parameter(name))  # the same weights: what is compared is the computation
    x = inputs(1, LENGTH, torch.float32).bfloat16()
    context = context_of(x)
    for i in new_layers(subject, PARTS["precision"]):
        reference = mix(model.layers[i].mixer, x.float(), context)
        state = rounded.layers[i].mixer.new_state(1, x.device, x.dtype)
        out = mix(rounded.layers[i].mixer, x, context, state)
        assert out.dtype == torch.bfloat16
        measure(f"layer {i}", out, reference, BOUND)
        for each in getattr(state, "branches", [state]):
            if "keys" not in each.tensors:
                assert {tensor.dtype for tensor in each.tensors.values()} == {torch.float32}


@torch.no_grad()
def test_ops_get_rates_and_decays_in_float32(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounded decay is a slightly different one, which no bound for bfloat16 outputs would tell from rounding."""

    def watched(name: str):
        op = getattr(ops, name)

        def call(*arguments: object, **keywords: object) -> object:
            given = inspect.signature(op).bind(*arguments, **keywords).arguments
            for argument in (*FLOAT32_ARGUMENTS[name], "initial_state"):
                assert given.get(argument) is None or given[argument].dtype == torch.float32, f"{name}: {argument}"
            return op(*arguments, **keywords)

        return call

    for name in FLOAT32_ARGUMENTS:
        monkeypatch.setattr(ops, name, watched(name))
    chunked(build(subject, torch.bfloat16), inputs(1, 9).bfloat16(), [7, 1, 1])


def check(rounded: torch.nn.Module, original: torch.nn.Module) -> None:
    """Rates, decays and buffers are the original's to the last bit, everything else is bfloat16."""
    for name, tensor in [*rounded.named_parameters(), *rounded.named_buffers()]:
        kept = name.rpartition(".")[2] in FLOAT32 or name in dict(rounded.named_buffers())
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        if kept:
            wanted = dict([*original.named_parameters(), *original.named_buffers()])[name]
            assert torch.equal(tensor, wanted), name


def test_rates_and_decays_stay_float32_when_cast(subject: str) -> None:
    check(build(subject, torch.float32).to(torch.bfloat16), build(subject, torch.float32))
    check(build(subject, torch.float32).bfloat16(), build(subject, torch.float32))


def test_rates_and_decays_stay_float32_when_built_or_loaded(subject: str, tmp_path: Path) -> None:
    config = SUBJECTS[subject]
    torch.manual_seed(0)
    built = zoo.build(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    original = zoo.build(config)
    assert {p.dtype for p in built.parameters()} <= {torch.bfloat16, torch.float32}
    for name, buffer in original.named_buffers():
        assert torch.equal(built.get_buffer(name), buffer)
    original.save_pretrained(tmp_path)
    check(zoo.ZooForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), original)
