"""Cross entropy from hidden states, without ever holding all logits; and the routers' losses, pooled over layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.blocks import RouterStatistics
from zoo.blocks.moe import MoEConfig
from zoo.ops.matmul import matmul

IGNORE_INDEX = -100
# Where torch's own is used. On a CPU it takes 64 tokens at a time and adds up the head's whole gradient for each.
NATIVE_DEVICES = ("cuda",)
CHUNK_ELEMENTS = 2**24  # logits in memory at once: 64 MB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """The summed cross entropy, in float32, of `hidden @ weight.T` against `labels`.

    Args:
        hidden: `[tokens, hidden]`.
        weight: `[vocab, hidden]`, the output head.
        labels: `[tokens]` int64; -100 is ignored.
        softcap: logits become `softcap * tanh(logits / softcap)`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        native = device in NATIVE_DEVICES and hasattr(F, "linear_cross_entropy") and softcap is None
        if not native or not torch.is_grad_enabled():
            if not torch.is_grad_enabled():
                hidden, weight = hidden.detach(), weight.detach()  # or its gradients would be made all the same
            return _LinearCrossEntropy.apply(hidden, weight, labels, softcap)
        losses = F.linear_cross_entropy(
            hidden,
            weight,
            labels,
            reduction="none",  # torch would sum in the dtype of `hidden`, and bfloat16 cannot tell 2.34 from 2.35
            ignore_index=IGNORE_INDEX,
            options=torch.nn.LinearCrossEntropyOptions(),
        )
    return losses.float().sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Logits of some tokens at a time; their gradients are made while they are there, so that nothing of the size of
    the logits is kept, and nothing is computed twice (as in Liger Kernel, arXiv:2410.10989, section 3.2)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        total = hidden.new_zeros((), dtype=torch.float32)
        tokens = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, len(hidden), tokens):
            now = slice(start, start + tokens)
            h, real = hidden[now], labels[now] != IGNORE_INDEX
            targets = labels[now].masked_fill(~real, 0)[:, None]
            logits = matmul(h, weight.T).float()
            if softcap is not None:
                squashed = logits.div_(softcap).tanh_()
                logits = softcap * squashed
            log_p = logits.log_softmax(-1)
            total -= log_p.gather(1, targets)[:, 0].masked_fill(~real, 0).sum()
            if d_hidden is not None and d_weight is not None:
                d_logits = log_p.exp_().scatter_add_(1, targets, log_p.new_full(targets.shape, -1.0))
                if softcap is not None:
                    d_logits *= 1 - squashed.square_()
                d_logits = d_logits.masked_fill_(~real[:, None], 0).to(hidden.dtype)
                d_hidden[now] = matmul(d_logits, weight)
                d_weight += matmul(d_logits.T, h)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None, None


def router_loss(routers: Sequence[tuple[MoEConfig, RouterStatistics]]) -> Tensor | None:
    """The weighted load-balancing and z-losses of all routers; None without routers.

    Layers with the same experts and coefficients are pooled: f_e and P_e are means over the tokens of all of them,
    `E sum_e f_e P_e` is taken once (Switch Transformers, arXiv:2101.03961, equation 4, as Mixtral and Jamba pool it).
    """
    pools: dict[MoEConfig, list[RouterStatistics]] = {}
    for config, statistics in routers:
        pools.setdefault(config, []).append(statistics)
    losses = []
    for config, pool in pools.items():
        tokens = torch.stack([s.tokens for s in pool]).sum().clamp(min=1)
        f = torch.stack([s.assignments for s in pool]).sum(0) / tokens
        P = torch.stack([s.probabilities for s in pool]).sum(0) / tokens
        z = torch.stack([s.squared_log_z for s in pool]).sum() / tokens
        losses.append(config.router.aux_loss_coef * len(f) * (f * P).sum() + config.router.z_loss_coef * z)
    return torch.stack(losses).sum() if losses else None
