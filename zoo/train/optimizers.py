"""Which parameter gets which optimiser, and which is decayed.

Weight decay applies to matrices only. Left out are: vectors and scalars (norms, D, decays, gates); biases, also where
each expert or head has its own and they are a matrix together; what a module lists in its class attribute `float32`
(rates and decays: A_log of Mamba-1 is a matrix); and embeddings (their rows see a gradient only when their token
occurs, so decay would erase rare tokens; OLMo 2, arXiv:2501.00656, section 3, reports that decaying them makes training
less stable).

What a module lists in its class attribute `learning_rates` (Infini-attention's gates) has a group of its own: AdamW's,
with the peak learning rate given there in place of the model's, no weight decay, and the same schedule.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; at scale Liu et al. 2025, arXiv:2502.16982)
replaces the momentum of a hidden matrix by its nearest semi-orthogonal matrix. Expert weights [num_experts, out, in]
hold most of a mixture's parameters and are num_experts separate matrices, so each is orthogonalised alone, through a
view. AdamW keeps embeddings, the output head, vectors, biases, rates, and matrices thinner than `MUON_MIN_SIDE`
(depthwise convolutions, small routers, per-head gates), where orthogonalising says nothing. The update is scaled to
AdamW's usual root mean square (`match_rms_adamw`), so one learning rate and one weight decay serve both.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MUON_MIN_SIDE = 16


def _outer_ids(model: nn.Module) -> set[int]:
    """Embeddings and the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return _embedding_ids(model) | (set() if head is None else {id(head.weight)})


def _embedding_ids(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _rate_ids(model: nn.Module) -> set[int]:
    """Parameters that their module declares to be rates rather than weights."""
    return {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "float32", ())}


def _bias_ids(model: nn.Module) -> set[int]:
    """Biases, by name: those of experts and of block-diagonal gates have two dimensions."""
    return {id(p) for name, p in model.named_parameters() if f"_{name.rpartition('.')[2]}".endswith("_bias")}


def _own_learning_rates(model: nn.Module) -> dict[int, float]:
    """Parameters (by id) for which their module names a learning rate."""
    return {
        id(getattr(module, name)): rate
        for module in model.modules()
        for name, rate in getattr(module, "learning_rates", {}).items()
    }


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The parameters that Muon takes: [out, in] or [num_experts, out, in] weights between embedding and head."""
    excluded = _outer_ids(model) | _rate_ids(model) | _bias_ids(model) | _own_learning_rates(model).keys()
    return [
        p
        for p in model.parameters()
        if p.requires_grad and p.ndim in (2, 3) and min(p.shape[-2:]) >= MUON_MIN_SIDE and id(p) not in excluded
    ]


def decay_groups(model: nn.Module, parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """`parameters` split into a group with `weight_decay`, a group without, and one more for each learning rate that
    modules give; empty groups are left out."""
    spared = _embedding_ids(model) | _rate_ids(model) | _bias_ids(model)
    own = _own_learning_rates(model)
    groups: dict[tuple[bool, float | None], list[Tensor]] = {(True, None): [], (False, None): []}
    for parameter in parameters:
        rate = own.get(id(parameter))
        decayed = parameter.ndim >= 2 and id(parameter) not in spared and rate is None
        groups.setdefault((decayed, rate), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decayed else 0.0} | ({} if rate is None else {"lr": rate})
        for (decayed, rate), members in groups.items()
        if members
    ]


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for hidden matrices and torch.optim.AdamW for the rest, as the one optimiser Lightning allows.

    Its `param_groups` hold the model's own parameters (clipping reads their gradients there) and are the place where a
    schedule writes learning rates; the two parts take the rates over from there. `state_dict()` covers both parts.

    Args:
        model: the model; its trainable parameters are shared out by `hidden_matrices`.
        learning_rate, weight_decay: of both parts.
        betas: AdamW's.
        momentum: Muon's.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], momentum: float
    ) -> None:
        self._matrices = hidden_matrices(model)
        taken = {id(p) for p in self._matrices}
        rest = (p for p in model.parameters() if p.requires_grad and id(p) not in taken)
        others = decay_groups(model, rest, weight_decay)
        super().__init__([{"params": self._matrices, "weight_decay": weight_decay}, *others], {"lr": learning_rate})
        # One [out, in] view per matrix that Muon orthogonalises: a parameter, or one expert's slice of a parameter.
        self._views = [[p.detach()] if p.ndim == 2 else list(p.detach().unbind(0)) for p in self._matrices]
        muon = torch.optim.Muon(
            [view for views in self._views for view in views],
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW([dict(group) for group in others], lr=learning_rate, betas=betas)
        self._parts = {"muon": muon, "adamw": adamw}

    def _pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(own group, the part's group) for every group."""
        parts = [group for part in self._parts.values() for group in part.param_groups]
        return list(zip(self.param_groups, parts, strict=True))

    def _give_learning_rates(self) -> None:
        for own, part in self._pairs():
            part["lr"] = own["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, views in zip(self._matrices, self._views, strict=True):
            rows = parameter.view(len(views), *parameter.shape[-2:])
            grads = [None] * len(views) if parameter.grad is None else parameter.grad.view_as(rows)
            for view, row, grad in zip(views, rows, grads, strict=True):
                view.data = row  # follows the parameter if its storage moved
                view.grad = grad
        self._give_learning_rates()
        for part in self._parts.values():
            part.step()
        for views in self._views:
            for view in views:
                view.grad = None  # so that zero_grad of the parameters really frees their gradients
        return loss

    def state_dict(self) -> dict[str, Any]:
        self._give_learning_rates()
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])
        for own, part in self._pairs():
            own["lr"] = part["lr"]


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float,
) -> torch.optim.Optimizer:
    """The optimiser `name` ("adamw" or "muon") over the trainable parameters of `model`."""
    if name == "muon":
        return MuonWithAdamW(model, learning_rate, weight_decay, betas, momentum)
    groups = decay_groups(model, (p for p in model.parameters() if p.requires_grad), weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
