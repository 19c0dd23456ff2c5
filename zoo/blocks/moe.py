"""Mixture of experts, dropless (Shazeer et al. 2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088, section 2.1).

    p = softmax(W_r x) or sigmoid(W_r x)  in float32;   T = the top_k largest of p + b   (b: correction_bias, or 0)
    y = sum_{e in T} w_e expert_e(x) + shared(x)      w_e = scale p_e, or scale p_e / sum_T p with renormalize
                                                      shared_gate: + sigmoid(w_s x) shared(x)
    groups          T lies in the top_k_groups groups of experts whose two largest p + b sum to most
                                                      DeepSeek-V3, arXiv:2412.19437, sections 2.1.2 and 3.4.2
    correction      b_e += correction_rate * sign(mean tokens of an expert - tokens of e)      after every training step
                                                      arXiv:2408.15664, algorithm 1
    auxiliary loss  E sum_e f_e P_e                   f_e share of tokens that chose e, P_e mean p_e / sum p
                                                      (arXiv:2101.03961, equation 4); balanced routing gives top_k
    z-loss          mean logsumexp(W_r x)^2           Zoph et al. 2022, arXiv:2202.08906, equation 5

    expert          W_down ( act(W_gate x) * (W_up x) ), or W_down act(W_up x) without `gated`
    latent_size     W_out sum_{e in T} w_e expert_e(W_in x) + shared(x)      the routed experts alone are narrower
                                                      LatentMoE, Nemotron 3, arXiv:2512.20856
    swiglu_limit    W_down ( g sigmoid(swiglu_alpha g) * (u + 1) ),  g = min(W_gate x, limit), u = W_up x within +-limit
                                                      gpt-oss, arXiv:2508.10925

Tokens are sorted by expert, so that each expert is one slice of one grouped matrix multiplication; none is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from zoo.blocks.base import FeedForward, FeedForwardConfig, Float32Module, RouterStatistics
from zoo.blocks.context import SequenceContext
from zoo.blocks.grouped import grouped_mm
from zoo.blocks.linear import in_projection, out_projection, out_projection_std
from zoo.blocks.mlp import ACTIVATIONS, MLP, Activation, MLPConfig, gated
from zoo.ops.matmul import linear
from zoo.schema import Count, FieldError, NonNegative, Positive, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


FEW_COPIES = 8  # up to which a decoding step goes through its experts one by one


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """`router:` of a mixture of experts.

    kind             softmax or sigmoid: what makes probabilities of logits.
    bias             a bias on the logits.
    correction_bias  a vector that is added to the probabilities for the choice alone, and that no gradient moves.
    correction_rate  how far a training step moves it, up for the experts that got few tokens (DeepSeek-V3: 0.001).
    num_groups       groups of consecutive experts; more than 1 confines a token's choice to a few of them.
    top_k_groups     to how many; default all.
    scale            of the chosen experts' weights.
    aux_loss_coef    weight of the load-balancing loss.
    z_loss_coef      weight of the z-loss.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    bias: bool = False
    correction_bias: bool = False
    correction_rate: NonNegative = 0.0
    num_groups: Size = 1
    top_k_groups: Size | None = None
    scale: Positive = 1.0
    aux_loss_coef: NonNegative = 0.01
    z_loss_coef: NonNegative = 0.0

    def resolve(self, num_experts: int, top_k: int) -> RouterConfig:
        """A copy with `top_k_groups` filled in.

        Raises:
            FieldError: the groups do not divide the experts, or too few experts are left to choose from.
        """
        if self.correction_rate and not self.correction_bias:
            raise FieldError("correction_rate", "moves the correction bias, and there is none; give correction_bias")
        groups = self.num_groups if self.top_k_groups is None else self.top_k_groups
        if groups > self.num_groups:
            raise FieldError("top_k_groups", f"must be at most num_groups ({self.num_groups}), got {groups}")
        if self.num_groups > 1 and (num_experts % self.num_groups or num_experts < 2 * self.num_groups):
            rule = f"must divide num_experts ({num_experts}) into groups of at least 2"
            raise FieldError("num_groups", f"{rule}, got {self.num_groups}")
        if groups * num_experts < top_k * self.num_groups:
            raise FieldError("top_k_groups", f"must leave top_k ({top_k}) experts to choose from, got {groups}")
        return replace(self, top_k_groups=groups)


@dataclass(frozen=True, kw_only=True)
class MoEConfig(FeedForwardConfig):
    """A mixture of experts; each token passes through top_k of them.

    intermediate_size         width of one expert.
    num_experts               experts to choose from.
    top_k                     experts per token.
    renormalize               scale the chosen experts' weights to sum to 1 (MiniMax, Mixtral; Jamba does not).
    num_shared_experts        experts that every token passes through besides.
    shared_intermediate_size  their width together; default num_shared_experts * intermediate_size.
    shared_gate               multiply their output by sigmoid(w x), one number per token (Qwen3-Next).
    activation                silu, gelu, gelu_tanh or relu2.
    gated                     multiply by a second projection (SwiGLU).
    swiglu_limit              clamp both projections to this (gpt-oss); default no limit.
    swiglu_alpha              slope of the clamped gate's sigmoid; default 1.702.
    bias                      biases on the experts' projections.
    latent_size               width in which the routed experts read and write, between two projections; default none.
    router                    how tokens choose, and the losses that keep the choice balanced.
    """

    intermediate_size: Size
    num_experts: Size
    top_k: Size = 2
    renormalize: bool = True
    num_shared_experts: Count = 0
    shared_intermediate_size: Size | None = None
    shared_gate: bool = False
    activation: Activation = "silu"
    gated: bool = True
    swiglu_limit: Positive | None = None
    swiglu_alpha: Positive | None = None
    bias: bool = False
    latent_size: Size | None = None
    router: RouterConfig = RouterConfig()

    def resolve(self, model: ZooConfig) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise FieldError("top_k", f"must be at most num_experts ({self.num_experts}), got {self.top_k}")
        shared, alpha = self.shared_intermediate_size, self.swiglu_alpha
        if self.num_shared_experts == 0:
            for name in ("shared_intermediate_size", "shared_gate"):
                if getattr(self, name):
                    raise FieldError(name, "is of the shared experts, and there are none; give num_shared_experts")
        elif shared is None:
            shared = self.num_shared_experts * self.intermediate_size
        if self.swiglu_limit is None:
            if alpha is not None:
                raise FieldError("swiglu_alpha", "belongs to the clamped SwiGLU; give swiglu_limit")
        elif not self.gated or self.activation != "silu" or self.num_shared_experts:
            raise FieldError("swiglu_limit", "needs gated experts with activation silu, and no shared experts")
        elif alpha is None:
            alpha = 1.702
        try:
            router = self.router.resolve(self.num_experts, self.top_k)
        except FieldError as error:
            raise error.within("router") from None
        return replace(self, shared_intermediate_size=shared, swiglu_alpha=alpha, router=router)


class Routing(NamedTuple):
    """What a router says of its tokens.

    probabilities  `[tokens, experts]`, a row sums to 1.
    weights        `[tokens, top_k]`, of the chosen experts.
    chosen         `[tokens, top_k]` int64.
    logits         `[tokens, experts]`.
    """

    probabilities: Tensor
    weights: Tensor
    chosen: Tensor
    logits: Tensor


class Router(Float32Module):
    """Chooses experts, in float32 whatever the dtype of the weights."""

    correction_bias: Tensor | None
    float32 = ("correction_bias",)  # it decides between probabilities that may differ little

    def __init__(self, config: MoEConfig, model: ZooConfig) -> None:
        super().__init__()
        self.config, self.top_k, self.renormalize = config.router, config.top_k, config.renormalize
        self.std = model.initializer_range
        experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(experts, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(experts)) if self.config.bias else None
        corrected = self.config.correction_bias
        self.register_buffer("correction_bias", torch.empty(experts, dtype=torch.float32) if corrected else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)
        for bias in (self.bias, self.correction_bias):
            if bias is not None:
                init.zeros_(bias)

    def forward(self, tokens: Tensor) -> Routing:
        """`tokens` is `[tokens, hidden]`."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(wide)
            logits = F.linear(tokens.to(wide), self.weight.to(wide), bias)
        scores = logits.softmax(-1) if self.config.kind == "softmax" else logits.sigmoid()
        if self.correction_bias is None and self.config.num_groups == 1:
            weights, chosen = scores.topk(self.top_k, dim=-1)
        else:
            chosen = self._eligible(scores.detach()).topk(self.top_k, dim=-1).indices
            weights = scores.gather(1, chosen)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
        if self.config.scale != 1:
            weights = weights * self.config.scale
        if self.config.kind == "sigmoid":
            return Routing(scores / (scores.sum(-1, keepdim=True) + 1e-20), weights, chosen, logits)
        return Routing(scores, weights, chosen, logits)

    @torch.no_grad()
    def correct(self, load: Tensor) -> None:
        """Move the correction bias after a training step in which the experts got `load` `[experts]` tokens."""
        assert self.correction_bias is not None, "resolve() sees to it"
        self.correction_bias += self.config.correction_rate * (load.mean() - load).sign()

    def _eligible(self, scores: Tensor) -> Tensor:
        """What the choice is made by: corrected scores, -inf in the groups that are left out."""
        if self.correction_bias is not None:
            scores = scores + self.correction_bias
        groups, kept = self.config.num_groups, self.config.top_k_groups
        if groups == kept:
            return scores
        grouped = scores.unflatten(1, (groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
        return grouped.masked_fill(left_out[..., None], -torch.inf).flatten(1)


class Experts(nn.Module):
    """Every expert's weights: `gate_up_proj` `[experts, 2 * intermediate, hidden]` (gate rows first; `up_proj`
    `[experts, intermediate, hidden]` where they are not gated) and `down_proj` `[experts, hidden, intermediate]`; with
    biases, each as `..._bias` without the last dimension. `hidden` is latent_size where there is one."""

    def __init__(self, config: MoEConfig, model: ZooConfig) -> None:
        super().__init__()
        experts, inner, hidden = config.num_experts, config.intermediate_size, config.latent_size or model.hidden_size
        self.std_in = model.initializer_range
        self.std_out = out_projection_std(model) if config.latent_size is None else self.std_in
        self.config = config
        self.up = "gate_up_proj" if config.gated else "up_proj"
        widths = {self.up: (2 * inner if config.gated else inner, hidden), "down_proj": (hidden, inner)}
        for name, shape in widths.items():
            self.register_parameter(name, nn.Parameter(torch.empty(experts, *shape)))
        for name, (rows, _) in widths.items():
            bias = nn.Parameter(torch.empty(experts, rows)) if config.bias else None
            self.register_parameter(f"{name}_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.get_parameter(self.up), std=self.std_in)
        init.normal_(self.get_parameter("down_proj"), std=self.std_out)
        if self.config.bias:
            for name in (self.up, "down_proj"):
                init.zeros_(self.get_parameter(f"{name}_bias"))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """`x` `[rows, hidden]` sorted by expert, in the dtype to compute in; `ends` int32 `[experts]`, where each
        expert's rows end."""

        def project(x: Tensor, name: str) -> Tensor:
            y = grouped_mm(x, getattr(self, name).to(x.dtype), ends)
            if not self.config.bias:
                return y
            bias = getattr(self, f"{name}_bias")
            counts = ends.diff(prepend=ends.new_zeros(1))
            return y + bias.to(x.dtype).repeat_interleave(counts, dim=0, output_size=x.shape[0])

        return project(self._activate(project(x, self.up)), "down_proj")

    def one(self, token: Tensor, expert: int) -> Tensor:
        """One expert for one token: `[hidden]` to `[hidden]`."""

        def project(x: Tensor, name: str) -> Tensor:
            bias = getattr(self, f"{name}_bias")[expert] if self.config.bias else None
            return linear(x, getattr(self, name)[expert], bias)

        return project(self._activate(project(token, self.up)), "down_proj")

    def _activate(self, x: Tensor) -> Tensor:
        config = self.config
        if not config.gated:
            return ACTIVATIONS[config.activation](x)
        if config.swiglu_limit is None:
            return gated(config.activation, x)
        assert config.swiglu_alpha is not None, "resolve() fills it in"
        gate, up = x.chunk(2, dim=-1)
        gate, up = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
        return gate * (config.swiglu_alpha * gate).sigmoid() * (up + 1)


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
        self.router = Router(config, model)
        self.experts = Experts(config, model)
        self.shared: MLP | None = None
        if config.shared_intermediate_size is not None:
            shared = MLPConfig(
                intermediate_size=config.shared_intermediate_size,
                activation=config.activation,
                gated=config.gated,
                bias=config.bias,
            )
            self.shared = MLP(shared, model, layer_idx)
        self.shared_gate = in_projection(model, model.hidden_size, 1) if config.shared_gate else None
        latent = config.latent_size
        self.latent_in_proj = None if latent is None else in_projection(model, model.hidden_size, latent)
        self.latent_out_proj = None if latent is None else out_projection(model, latent)

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, RouterStatistics | None]:
        packed, _ = context.pack(x)  # padding is neither routed nor counted
        tokens = packed.flatten(0, 1)
        few = x.shape[1] == 1 and len(tokens) * self.config.top_k <= FEW_COPIES
        if few and x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return context.unpack(self._decode(tokens, context).view(packed.shape)), None
        routing = self.router(tokens)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        jit = device == "cpu" and dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        rows, places, ends = assign(routing.chosen, self.config.num_experts, round_up=jit)
        inner = tokens if self.latent_in_proj is None else self.latent_in_proj(tokens)
        out = self.experts(_Spread.apply(inner.to(dtype), rows, places), ends)
        y = _Combine.apply(out, routing.weights, rows, places)
        if self.latent_out_proj is not None:
            y = self.latent_out_proj(y)
        if self.shared is not None:
            y = y + self._shared(tokens, context)
        statistics = RouterStatistics(
            tokens=routing.logits.new_full((), tokens.shape[0]),
            assignments=F.one_hot(routing.chosen, self.config.num_experts).sum((0, 1)).to(routing.logits.dtype),
            probabilities=routing.probabilities.sum(0),
            squared_log_z=routing.logits.logsumexp(-1).square().sum(),
        )
        return context.unpack(y.view(packed.shape)), statistics

    def _shared(self, tokens: Tensor, context: SequenceContext) -> Tensor:
        assert self.shared is not None
        y = self.shared(tokens, context)[0]
        return y if self.shared_gate is None else y * self.shared_gate(tokens).sigmoid()

    def _decode(self, tokens: Tensor, context: SequenceContext) -> Tensor:
        """The same for the next token of a few rows, without statistics: sorting and grouping would take longer than
        multiplying does."""
        _, weights, chosen, _ = self.router(tokens)
        inner = tokens if self.latent_in_proj is None else self.latent_in_proj(tokens)
        y = torch.zeros_like(inner)
        rows = zip(y.unbind(), inner.unbind(), weights.to(y.dtype).unbind(), chosen.tolist(), strict=True)
        for total, token, row_weights, experts in rows:
            for weight, expert in zip(row_weights.unbind(), experts, strict=True):
                total.addcmul_(self.experts.one(token, expert), weight)
        if self.latent_out_proj is not None:
            y = self.latent_out_proj(y)
        return y if self.shared is None else y + self._shared(tokens, context)

    def num_active_params(self) -> int:
        idle = self.config.num_experts - self.config.top_k
        per_expert = sum(parameter[0].numel() for parameter in self.experts.parameters())
        return self.num_params() - idle * per_expert

    def flops(self, batch: int, length: int) -> int:
        per_expert = sum(parameter[0].numel() for parameter in self.experts.parameters() if parameter.dim() == 3)
        weights = self.router.weight.numel() + self.config.top_k * per_expert
        for projection in (self.shared_gate, self.latent_in_proj, self.latent_out_proj):
            weights += 0 if projection is None else projection.weight.numel()
        shared = self.shared.flops(batch, length) if self.shared is not None else 0
        return 2 * batch * length * weights + shared
