"""A training step, and what its row says."""

import pytest
import torch

import zoo
from benchmarks import models, train
from benchmarks.rows import Options
from benchmarks.train import AS_IT_COMES, Size, as_it_comes, measure, step

OPTIONS = Options(quick=True, peaks={"float32": 1e12})


def test_a_step_leaves_no_gradients_behind():
    model = zoo.build(models.families(32)["llama"].ours).train()
    seen = []
    parameter = next(model.parameters())
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    step(model, torch.zeros(1, 8, dtype=torch.int64), "float32")
    assert seen and seen[0] > 0 and parameter.grad is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_is_autocast(dtype):
    model = zoo.build(models.families(32)["llama"].ours).train()
    seen = []
    layer = model.model.layers[0].mixer.q_proj
    layer.register_forward_hook(lambda module, inputs, out: seen.append((module.weight.dtype, out.dtype)))
    step(model, torch.zeros(1, 8, dtype=torch.int64), dtype)
    assert seen == [(torch.float32, getattr(torch, dtype))]


def test_a_slow_peer_runs_once_and_ours_as_usual(monkeypatch):
    steps = []

    def counted(model, ids, dtype):
        steps.append((type(model).__name__, tuple(ids.shape)))
        step(model, ids, dtype)

    monkeypatch.setattr(train, "step", counted)
    row = measure("mamba2", Size(2, 20, slow=True), "float32", OPTIONS)
    assert [shape for name, shape in steps if name == "Mamba2ForCausalLM"] == [(1, 16), (2, 20), (2, 20)]
    assert len([shape for name, shape in steps if name == "ZooForCausalLM"]) > 1
    assert row["candidates"]["transformers"]["count"] == row["candidates"][AS_IT_COMES]["count"] == 1
    assert row["parameters"] == row["peer_parameters"]
    assert row["candidates"]["zoo"]["ratios"]["transformers"] > 0


def test_a_peer_as_it_comes_runs_without_our_settings(monkeypatch):
    calls = []
    for name in ("keep_freed_memory", "give_freed_memory_back"):
        monkeypatch.setattr(train, name, lambda name=name: calls.append(name))
    as_it_comes(lambda: calls.append("step"))()
    assert calls == ["give_freed_memory_back", "step", "keep_freed_memory"]


def test_the_work_of_a_step_is_three_forward_passes():
    row = measure("llama", Size(2, 16), "float32", OPTIONS)
    model = zoo.build(models.families(32)["llama"].ours)
    assert row["floor"]["flops"] == 3 * model.flops(2, 16)
    candidate = row["candidates"]["zoo"]
    assert candidate["tokens_per_s"] == pytest.approx(32e3 / candidate["ms"], rel=1e-3)


def test_a_peer_of_another_size_is_refused(monkeypatch):
    families = models.families(32)
    wrong = families | {"llama": families["llama"]._replace(theirs=families["mamba2"].theirs)}
    monkeypatch.setattr(models, "families", lambda hidden: wrong)
    with pytest.raises(RuntimeError, match="parameters"):
        measure("llama", Size(1, 16), "float32", OPTIONS)


def test_the_125m_model_has_no_peer():
    sizes = train.SIZES["cpu"]
    assert sizes.keys() - models.families().keys() == {"minimax-125m"}
    assert zoo.load_config(models.MINIMAX_125M).num_hidden_layers == 8


def test_compiled_is_a_candidate_with_its_compile_time(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    row = measure("llama", Size(1, 16), "float32", Options(quick=True, compile=True))
    assert row["candidates"]["zoo compiled"]["ratios"].keys() == {"transformers", AS_IT_COMES}
    assert row["compile_s"] >= 0
