"""Cross entropy from hidden states, without ever holding all logits; and the routers' losses, pooled over layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.blocks import RouterStatistics
from zoo.blocks.moe import MoEConfig

IGNORE_INDEX = -100
FEW_LOGITS = 2**22  # so many (16 MB in float32) may be held for the backward pass: faster than computing them again
CHUNK_ELEMENTS = 2**24  # logits in memory at once, in the fallback: 64 MB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy, in float32, of `hidden @ weight.T` against `labels`.

    Args:
        hidden: `[tokens, hidden]`.
        weight: `[vocab, hidden]`, the output head.
        labels: `[tokens]` int64; -100 is ignored.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if len(hidden) * len(weight) <= FEW_LOGITS:
        return _cross_entropy(hidden, weight, labels)
    if hasattr(F, "linear_cross_entropy") and torch.is_grad_enabled():
        with torch.autocast(device, enabled=False):
            losses = F.linear_cross_entropy(
                hidden,
                weight,
                labels,
                reduction="none",  # torch would sum in the dtype of `hidden`, and bfloat16 cannot tell 2.34 from 2.35
                ignore_index=IGNORE_INDEX,
                options=torch.nn.LinearCrossEntropyOptions(),
            )
        return losses.float().sum()
    return chunked_cross_entropy(hidden, weight, labels)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, for a torch without F.linear_cross_entropy: logits of a few tokens at a time, computed again for the
    backward pass."""
    tokens = max(1, CHUNK_ELEMENTS // weight.shape[0])

    total = hidden.new_zeros((), dtype=torch.float32)
    for h, y in zip(hidden.split(tokens), labels.split(tokens), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_cross_entropy, h, weight, y, use_reentrant=False)
        else:
            total = total + _cross_entropy(h, weight, y)
    return total


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORE_INDEX)


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
        losses.append(config.router.aux_loss_coef * config.num_experts * (f * P).sum() + config.router.z_loss_coef * z)
    return torch.stack(losses).sum() if losses else None
