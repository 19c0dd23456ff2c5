"""Mixture of experts, dropless (Shazeer et al. 2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088, section 2.1).

    p = softmax(W_r x)  in float32;   T = the top_k largest of p
    y = sum_{e in T} w_e expert_e(x) + shared(x)      w_e = p_e, or p_e / sum_T p with renormalize

    auxiliary loss  E sum_e f_e P_e                   f_e share of tokens that chose e, P_e mean p_e (arXiv:2101.03961,
                                                      equation 4); balanced routing gives top_k
    z-loss          mean logsumexp(W_r x)^2           Zoph et al. 2022, arXiv:2202.08906, equation 5

Tokens are sorted by expert, so that each expert is one slice of one grouped matrix multiplication; none is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from zoo.blocks.base import FeedForward, FeedForwardConfig, RouterStatistics
from zoo.blocks.context import SequenceContext
from zoo.blocks.grouped import grouped_mm
from zoo.blocks.linear import in_projection, out_projection_std
from zoo.blocks.mlp import MLP, Activation, MLPConfig, gated
from zoo.ops.matmul import linear
from zoo.schema import Count, FieldError, NonNegative, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


FEW_COPIES = 8  # up to which a decoding step goes through its experts one by one


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """`router:` of a mixture of experts.

    kind           softmax.
    aux_loss_coef  weight of the load-balancing loss.
    z_loss_coef    weight of the z-loss.
    """

    kind: Literal["softmax"] = "softmax"
    aux_loss_coef: NonNegative = 0.01
    z_loss_coef: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class MoEConfig(FeedForwardConfig):
    """A mixture of gated experts; each token passes through top_k of them.

    intermediate_size   width of one expert.
    num_experts         experts to choose from.
    top_k               experts per token.
    renormalize         scale the chosen experts' weights to sum to 1 (MiniMax, Mixtral; Jamba does not).
    num_shared_experts  experts that every token passes through besides.
    activation          silu, gelu or relu2.
    router              how tokens choose, and the losses that keep the choice balanced.
    """

    intermediate_size: Size
    num_experts: Size
    top_k: Size = 2
    renormalize: bool = True
    num_shared_experts: Count = 0
    activation: Activation = "silu"
    router: RouterConfig = RouterConfig()

    def resolve(self, model: ZooConfig) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise FieldError("top_k", f"must be at most num_experts ({self.num_experts}), got {self.top_k}")
        return self


class Experts(nn.Module):
    """Every expert's weights: `gate_up_proj` `[experts, 2 * intermediate, hidden]` (gate rows first) and `down_proj`
    `[experts, hidden, intermediate]`."""

    def __init__(self, config: MoEConfig, model: ZooConfig) -> None:
        super().__init__()
        experts, inner, hidden = config.num_experts, config.intermediate_size, model.hidden_size
        self.std_in = model.initializer_range
        self.std_out = out_projection_std(model)
        self.activation = config.activation
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.gate_up_proj, std=self.std_in)
        init.normal_(self.down_proj, std=self.std_out)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """`x` `[rows, hidden]` sorted by expert, in the dtype to compute in; `ends` int32 `[experts]`, where each
        expert's rows end."""
        gate_up = grouped_mm(x, self.gate_up_proj.to(x.dtype), ends)
        return grouped_mm(gated(self.activation, gate_up), self.down_proj.to(x.dtype), ends)

    def one(self, token: Tensor, expert: int) -> Tensor:
        """One expert for one token: `[hidden]` to `[hidden]`."""
        gate_up = linear(token, self.gate_up_proj[expert])
        return linear(gated(self.activation, gate_up), self.down_proj[expert])


class Assignment(NamedTuple):
    """Where each token's copies stand among the rows, sorted by expert, that the experts work on.

    rows    `[rows]` int64, the token in each row.
    places  `[tokens, top_k]` int64, the row of each token's copies.
    ends    int32 `[experts]`, where each expert's rows end.
    """

    rows: Tensor
    places: Tensor
    ends: Tensor


def assign(chosen: Tensor, num_experts: int, round_up: bool) -> Assignment:
    """Sort the copies of tokens by expert; `chosen` is int64 `[tokens, top_k]`.

    round_up repeats an expert's last token until its number of rows is one of few (at most 1/8 more). oneDNN compiles a
    bfloat16 kernel for each new shape, which takes longer than the multiplication itself, and routing would
    otherwise bring new shapes at every step. Nothing reads the repeated rows.
    """
    top_k = chosen.shape[1]
    # Stable, so that a token's row among its expert's rows never depends on tokens after it.
    order = chosen.flatten().argsort(stable=True)
    sorted_experts = chosen.flatten()[order]
    counts = F.one_hot(sorted_experts, num_experts).sum(0)
    starts = counts.cumsum(0) - counts
    if not round_up:
        places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        return Assignment(order // top_k, places.view_as(chosen), counts.cumsum(0).int())
    step = 2 ** (counts.clamp(min=128).log2().floor() - 3).long()
    ends = ((counts + step - 1) // step * step).cumsum(0)
    row_starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    rank = torch.arange(len(order), device=order.device) - starts[sorted_experts]
    places = torch.empty_like(order).scatter(0, order, row_starts[sorted_experts] + rank)
    slots = torch.arange(int(ends[-1]), device=order.device)
    experts = torch.searchsorted(ends, slots, right=True)
    sources = starts[experts] + torch.minimum(slots - row_starts[experts], counts[experts] - 1)
    return Assignment(order[sources] // top_k, places.view_as(chosen), ends.int())


class _Spread(torch.autograd.Function):
    """Tokens `[tokens, hidden]` to rows `[rows, hidden]`. Backwards, each token gathers from its rows: a gather is
    several times as fast as index_select's own scatter, and does not depend on the order of additions."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        total = grad.index_select(0, places[:, 0])
        for place in places.unbind(1)[1:]:
            total += grad.index_select(0, place)
        return total, None, None


class _Combine(torch.autograd.Function):
    """y_t = sum_k weight_tk row_(place tk): rows `[rows, hidden]` and weights `[tokens, top_k]` to `[tokens, hidden]`,
    in the rows' dtype, summed in that of the weights."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, weights: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(out, weights, rows, places)
        parts = zip(weights.split(1, dim=1), places.unbind(1), strict=True)
        weight, place = next(parts)
        y = out.index_select(0, place) * weight
        for weight, place in parts:
            y.addcmul_(out.index_select(0, place), weight)
        return y.to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, weights, rows, places = ctx.saved_tensors
        # Rows that only fill up an expert's share stand for no copy: their weight is 0.
        row_weights = weights.new_zeros(len(rows)).scatter_(0, places.flatten(), weights.flatten())
        grad_out = (grad.index_select(0, rows) * row_weights[:, None]).to(out.dtype)
        grad = grad.to(weights.dtype)
        grad_weights = torch.stack([(out.index_select(0, place) * grad).sum(-1) for place in places.unbind(1)], 1)
        return grad_out, grad_weights, None, None


class MoE(FeedForward):
    def __init__(self, config: MoEConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.router = in_projection(model, model.hidden_size, config.num_experts)
        self.experts = Experts(config, model)
        shared = MLPConfig(
            intermediate_size=max(1, config.num_shared_experts) * config.intermediate_size, activation=config.activation
        )
        self.shared = MLP(shared, model, layer_idx) if config.num_shared_experts else None

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, RouterStatistics | None]:
        packed, _ = context.pack(x)  # padding is neither routed nor counted
        tokens = packed.flatten(0, 1)
        few = x.shape[1] == 1 and len(tokens) * self.config.top_k <= FEW_COPIES
        if few and x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return context.unpack(self._decode(tokens, context).view(packed.shape)), None
        probabilities, weights, chosen, logits = self._route(tokens)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        jit = device == "cpu" and dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        rows, places, ends = assign(chosen, self.config.num_experts, round_up=jit)
        out = self.experts(_Spread.apply(tokens.to(dtype), rows, places), ends)
        y = _Combine.apply(out, weights, rows, places)
        if self.shared is not None:
            y = y + self.shared(tokens, context)[0]
        statistics = RouterStatistics(
            tokens=logits.new_full((), tokens.shape[0]),
            assignments=F.one_hot(chosen, self.config.num_experts).sum((0, 1)).to(logits.dtype),
            probabilities=probabilities.sum(0),
            squared_log_z=logits.logsumexp(-1).square().sum(),
        )
        return context.unpack(y.view(packed.shape)), statistics

    def _decode(self, tokens: Tensor, context: SequenceContext) -> Tensor:
        """The same for the next token of a few rows, without statistics: sorting and grouping would take longer than
        multiplying does."""
        _, weights, chosen, _ = self._route(tokens)
        y = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens, context)[0]
        rows = zip(y.unbind(), tokens.unbind(), weights.to(y.dtype).unbind(), chosen.tolist(), strict=True)
        for total, token, row_weights, experts in rows:
            for weight, expert in zip(row_weights.unbind(), experts, strict=True):
                total.addcmul_(self.experts.one(token, expert), weight)
        return y

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Probabilities `[tokens, experts]`, weights and indices `[tokens, top_k]` of those chosen, and the logits."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.to(wide), self.router.weight.to(wide))
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.config.top_k, dim=-1)
        if self.config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return probabilities, weights, chosen, logits

    def num_active_params(self) -> int:
        idle = self.config.num_experts - self.config.top_k
        per_expert = (self.experts.gate_up_proj.numel() + self.experts.down_proj.numel()) // self.config.num_experts
        return self.num_params() - idle * per_expert

    def flops(self, batch: int, length: int) -> int:
        per_token = self.num_active_params() - (self.shared.num_params() if self.shared is not None else 0)
        shared = self.shared.flops(batch, length) if self.shared is not None else 0
        return 2 * batch * length * per_token + shared
