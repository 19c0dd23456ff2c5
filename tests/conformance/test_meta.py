from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.conformance.conftest import Measure
from tests.conformance.runs import build, chunked, forward, given, gradients, inputs
from tests.conformance.subjects import SUBJECTS, VOCAB_SIZE
from zoo import ops
from zoo.models import materialize


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory comes full of NaN, so that what nobody writes shows."""
    to_empty = nn.Module.to_empty

    def poisoned(module: nn.Module, **arguments: object) -> nn.Module:
        module = to_empty(module, **arguments)
        for tensor in tensors(module).values():
            tensor.data.fill_(torch.nan)
        return module

    monkeypatch.setattr(nn.Module, "to_empty", poisoned)


def test_materialised_equals_built_directly(subject: str, measure: Measure, poisoned_memory: None) -> None:
    torch.manual_seed(0)
    meta = zoo.build(SUBJECTS[subject], device="meta")
    assert all(tensor.is_meta for tensor in tensors(meta).values())
    torch.manual_seed(0)
    materialised = materialize(meta, "cpu")
    torch.manual_seed(0)
    built = zoo.build(SUBJECTS[subject])
    assert tensors(built).keys() == tensors(materialised).keys()
    for name, tensor in tensors(built).items():
        assert tensors(materialised)[name].dtype == tensor.dtype
        measure(name, tensors(materialised)[name], tensor, 0.0)
    assert (materialised.lm_head.weight is materialised.get_input_embeddings().weight) == bool(
        SUBJECTS[subject].get("tie_word_embeddings")
    )


def test_constructed_without_build(subject: str, measure: Measure) -> None:
    """`ZooForCausalLM(config)` draws in another order, so its random weights are others, of the same distribution."""
    torch.manual_seed(0)
    constructed = tensors(zoo.ZooForCausalLM(zoo.load_config(SUBJECTS[subject])))
    built, again = (tensors(zoo.build(SUBJECTS[subject])) for _ in range(2))
    for name, tensor in built.items():
        assert constructed[name].dtype == tensor.dtype and constructed[name].isfinite().all()
        if torch.equal(tensor, again[name]):
            measure(name, constructed[name], tensor, 0.0)
        else:  # some parameters hold a dozen numbers: a fourth root of their count for the scatter
            scatter = 4 / tensor.numel() ** 0.5
            assert abs(constructed[name].norm() / tensor.norm() - 1) < scatter, name


def test_analytic_counts_equal_counted_ones(subject: str) -> None:
    model = zoo.build(SUBJECTS[subject])
    unique = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert model.num_params() == sum(unique.values()) == zoo.build(SUBJECTS[subject], device="meta").num_params()
    batch, length = 2, 23
    input_ids = torch.randint(2, VOCAB_SIZE, (batch, length))  # 0 and 1 may be global, which is not counted
    # The reference backend computes visible pairs and the recurrence only, as the analytic count does.
    with FlopCounterMode(display=False) as counter, ops.backend("reference"), torch.no_grad():
        model(input_ids)
    assert counter.get_total_flops() == model.flops(batch, length)


def test_active_parameters_are_those_one_token_moves(subject: str) -> None:
    """A single token's gradient reaches every parameter but the experts it does not choose."""
    model = zoo.build(SUBJECTS[subject])
    x = inputs(1, 1, torch.float32)
    model.lm_head(model.model(**given(model.model, x)).last_hidden_state).sum().backward()
    idle = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            idle += sum(
                expert.numel() for expert, grad in zip(parameter, parameter.grad, strict=True) if not grad.any()
            )
    assert model.num_active_params() == model.num_params() - idle


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@torch.no_grad()
def test_state_bytes_equal_a_real_state(subject: str, dtype: torch.dtype) -> None:
    model = zoo.build(SUBJECTS[subject], dtype=dtype)
    for batch, length in ((1, 1), (3, 4), (2, 23)):
        cache = model.model(torch.randint(2, VOCAB_SIZE, (batch, length)), use_cache=True).past_key_values
        assert cache.nbytes() == model.state_bytes(batch, length)
        for _ in range(9):
            model.model(torch.randint(2, VOCAB_SIZE, (batch, 1)), past_key_values=cache)
        assert cache.nbytes() == model.state_bytes(batch, length + 9)


def test_tensors_are_made_where_the_inputs_are(subject: str, measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that names no device is on the meta device here, as on a GPU's machine it would be on the CPU, and does
    not go with the others. (Inside a registered operator `with torch.device` has no effect.)"""
    model, x = build(subject), inputs(1, 20).requires_grad_()
    cu_seqlens, mask = torch.tensor([0, 3, 3, 20], dtype=torch.int32), torch.arange(20)[None] >= 4
    weights = inputs(4, 20, seed=2)

    def runs() -> list[torch.Tensor]:
        outs = [forward(model, x), forward(model, x, cu_seqlens=cu_seqlens)]
        outs += [forward(model, x, attention_mask=mask), chunked(model, x, [12, 7, 1])]
        return [*outs, *gradients(model, (torch.cat(outs) * weights).sum(), x).values()]

    def elsewhere(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: make(*args, **{"device": "meta"} | options)

    expected = runs()
    for name in ("tensor", "arange", "empty", "zeros", "ones", "full", "eye", "linspace"):
        monkeypatch.setattr(torch, name, elsewhere(getattr(torch, name)))
    found = runs()
    for n, (out, wanted) in enumerate(zip(found, expected, strict=True)):
        measure(f"run {n}", out, wanted, 0.0)
