"""zoo/train/optimizers.py, on a small module that has one parameter of every sort."""

import copy

import pytest
import torch
from torch import nn

import zoo
from tests.conformance.subjects import SUBJECTS
from zoo.train import optimizers
from zoo.train.optimizers import MuonWithAdamW, hidden_matrices, make_optimizer

OPTIONS = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "momentum": 0.95}


class EverySort(nn.Module):
    float32 = ("A_log",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 32)
        self.linear = nn.Linear(32, 48)
        self.norm = nn.LayerNorm(48)
        self.experts = nn.Parameter(torch.randn(3, 32, 48) / 7)
        self.conv = nn.Conv1d(32, 32, 4, groups=32)
        self.A_log = nn.Parameter(torch.randn(32, 16))
        self.head = nn.Linear(32, 40, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.linear(self.embedding(ids)))
        hidden = torch.einsum("bth,eoh->bto", hidden, self.experts)
        hidden = self.conv(hidden.transpose(1, 2)).transpose(1, 2) + (self.A_log.exp().sum(1))
        return self.head(hidden)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids)[:, :8].transpose(1, 2), ids[:, :8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def names_of(model: nn.Module, parameters: list) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_weight_decay_reaches_matrices_only():
    model = EverySort()
    groups = make_optimizer("adamw", model, **OPTIONS).param_groups
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    spared = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    assert names_of(model, decayed) == {"linear.weight", "experts", "conv.weight", "head.weight"}
    assert names_of(model, spared) == {
        "embedding.weight", "linear.bias", "norm.weight", "norm.bias", "conv.bias", "A_log"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_with_a_learning_rate_of_their_own_have_a_group_of_their_own(name):
    """Infini-attention's gates: another peak rate, the same schedule, no weight decay."""

    class Matrix(nn.Linear):
        learning_rates = {"weight": 0.002}

    infini = {"mixer": {"kind": "infini", "num_heads": 2, "segment": 4}}
    model = zoo.build({"vocab_size": 64, "hidden_size": 32, "blocks": {"a": infini}, "pattern": "a*2"})
    model.matrix = Matrix(32, 32)
    options = OPTIONS | {"learning_rate": 1e-4}
    optimizer = make_optimizer(name, model, **options)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))
    gates = {f"model.layers.{layer}.mixer.gate" for layer in (0, 1)}
    own = {}
    for group in optimizer.param_groups:
        names = names_of(model, group["params"])
        if names & {*gates, "matrix.weight"}:
            assert not group["weight_decay"]
            own[group["lr"]] = names
        else:
            assert group["lr"] == 1e-4
    assert own == {0.01: gates, 0.002: {"matrix.weight"}}
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.005, 0.001, 5e-5}
    # The first step of AdamW moves a parameter by its rate.
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for layer in model.model.layers:
        assert torch.allclose(layer.mixer.gate, torch.tensor(-0.005), rtol=1e-3)


def test_rates_of_a_built_model_are_spared():
    """Mamba-1's A_log is a matrix, and the model has come from the meta device."""
    mamba = {"mixer": {"kind": "mamba", "state_size": 16}}
    mamba2 = {"mixer": {"kind": "mamba2", "num_heads": 2, "state_size": 16}}
    config = {"vocab_size": 64, "hidden_size": 32, "blocks": {"a": mamba, "b": mamba2}, "pattern": "a b"}
    model = zoo.build(config)
    for name in ("adamw", "muon"):
        groups = make_optimizer(name, model, **OPTIONS).param_groups
        spared = names_of(model, [p for group in groups if not group["weight_decay"] for p in group["params"]])
        for rate in ("A_log", "D", "dt_bias"):
            assert {f"model.layers.{layer}.mixer.{rate}" for layer in (0, 1)} <= spared
        assert "model.layers.0.mixer.in_proj.weight" not in spared
    assert names_of(model, hidden_matrices(model)) == {
        f"model.layers.{layer}.mixer.{weight}.weight"
        for layer, weight in [(0, "in_proj"), (0, "x_proj"), (0, "out_proj"), (1, "in_proj"), (1, "out_proj")]
    }


@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_bias_is_decayed_or_a_hidden_matrix(subject, monkeypatch):
    """Those of experts and of the RG-LRU's gates are matrices."""
    monkeypatch.setattr(optimizers, "MUON_MIN_SIDE", 1)
    model = zoo.build(SUBJECTS[subject], device="meta")
    groups = make_optimizer("adamw", model, **OPTIONS).param_groups
    decayed = names_of(model, [p for group in groups if group["weight_decay"] for p in group["params"]])
    taken = decayed | names_of(model, hidden_matrices(model))
    assert taken and not [name for name in taken if name.split(".")[-1].endswith("bias")]


def test_a_tied_embedding_is_not_decayed_and_listed_once():
    model = EverySort()
    model.head.weight = model.embedding.weight
    groups = make_optimizer("adamw", model, **OPTIONS).param_groups
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert id(model.head.weight) in {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = EverySort()
    optimizer = make_optimizer("muon", model, **OPTIONS)
    assert isinstance(optimizer, MuonWithAdamW)
    assert names_of(model, optimizer.param_groups[0]["params"]) == {"linear.weight", "experts"}
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert names_of(model, listed) == {name for name, _ in model.named_parameters()}
    assert len(listed) == len(list(model.parameters()))


def test_each_expert_is_orthogonalised_alone():
    """The update of [3, out, in] equals torch.optim.Muon on three separate matrices."""
    model = EverySort()
    experts = [nn.Parameter(w.clone()) for w in model.experts.detach()]
    optimizer = make_optimizer("muon", model, **OPTIONS)
    separate = torch.optim.Muon(experts, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        torch.manual_seed(step)
        model.experts.grad = torch.randn_like(model.experts) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
        for expert, grad in zip(experts, model.experts.grad, strict=True):
            expert.grad = grad.clone()
        optimizer.step()
        separate.step()
    assert torch.equal(model.experts.detach(), torch.stack([e.detach() for e in experts]))
    assert not torch.equal(model.experts.detach(), EverySort().experts.detach())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learns_and_resumes_bit_for_bit(name):
    model = EverySort()
    optimizer = make_optimizer(name, model, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    first = train(model, optimizer, 15)
    scheduler.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    rest = train(model, optimizer, 15, start=15)
    assert rest[-1] < 0.9 * first[0]

    resumed = EverySort()
    with torch.no_grad():
        for p in resumed.parameters():
            p.fill_(7.0)
    resumed_optimizer = make_optimizer(name, resumed, **OPTIONS)
    torch.optim.lr_scheduler.LambdaLR(resumed_optimizer, lambda step: 1.0 / (1 + step)).load_state_dict(saved[2])
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    assert [g["lr"] for g in resumed_optimizer.param_groups] == [0.005] * len(resumed_optimizer.param_groups)
    assert train(resumed, resumed_optimizer, 15, start=15) == rest


def test_clipping_sees_every_gradient_of_muon():
    model = EverySort()
    optimizer = make_optimizer("muon", model, **OPTIONS)
    train(model, optimizer, 1)
    ids = torch.arange(12)[None]
    model(ids).square().mean().backward()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert all(grad is not None for grad in grads)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_stay_out():
    model = EverySort()
    model.linear.weight.requires_grad_(False)
    for name in ("adamw", "muon"):
        listed = [p for group in make_optimizer(name, model, **OPTIONS).param_groups for p in group["params"]]
        assert "linear.weight" not in names_of(model, listed)
