"""Performer (Choromanski et al. 2020, arXiv:2009.14794): softmax attention estimated by positive random features,
FAVOR+ (lemma 1, section 2.4), causal (appendix B.1), with its normaliser.

    exp(q . k) = E_w [ exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2) ],   w ~ N(0, I)
    phi(x)_i = exp(w_i . x' - |x'|^2 / 2),   x' = x / D^(1/4),   i = 1 ... F
    o_t = sum_(j <= t) (phi(q_t) . phi(k_j)) v_j / sum_(j <= t) phi(q_t) . phi(k_j),   y = W_o o

The w_i are orthogonal within each D of them, with the lengths of Gaussian vectors (section 2.5). They are drawn from
`seed` once and never again, and saved with the model. A query's features are divided by the largest of them, which
cancels; a key's must not depend on other tokens and are taken as they are, in float32.

B batch, T length, H heads, D head_dim, F num_features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from transformers import initialization as init

from zoo.blocks.attention import resolve_head_dim
from zoo.blocks.base import MixerConfig
from zoo.blocks.linear_mixer import NormalizedLinearAttention
from zoo.schema import Count, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class PerformerConfig(MixerConfig):
    """Softmax attention estimated by positive random features.

    num_heads     heads.
    head_dim      default hidden_size / num_heads.
    num_features  random features of each head; default twice head_dim.
    seed          of the draw; every layer draws its own.
    """

    num_heads: Size
    head_dim: Size | None = None
    num_features: Size | None = None
    seed: Count = 0

    def resolve(self, model: ZooConfig) -> Self:
        head_dim = resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size)
        num_features = 2 * head_dim if self.num_features is None else self.num_features
        return replace(self, head_dim=head_dim, num_features=num_features)


def orthogonal_features(num_heads: int, num_features: int, head_dim: int, seed: int) -> Tensor:
    """`[num_heads, num_features, head_dim]` float32: Gaussian vectors, orthogonal within each head_dim of them."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    blocks = -(-num_features // head_dim)
    directions, triangular = torch.linalg.qr(normal(num_heads, blocks, head_dim, head_dim))
    # With the signs of R's diagonal the rotations are uniform.
    directions = directions * torch.diagonal(triangular, dim1=-2, dim2=-1).sign()[..., None, :]
    directions = directions.mT.flatten(1, 2)[:, :num_features]
    return (directions * normal(num_heads, num_features, head_dim).norm(dim=-1, keepdim=True)).float()


class Performer(NormalizedLinearAttention):
    directions: Tensor
    float32 = ("directions",)

    def __init__(self, config: PerformerConfig, model: ZooConfig, layer_idx: int) -> None:
        assert config.head_dim is not None and config.num_features is not None, "resolve() fills them in"
        super().__init__(config.num_heads, config.head_dim, config.num_features, model)
        self.config, self.layer_idx = config, layer_idx
        shape = self.num_heads, self.num_features, self.head_dim
        self.register_buffer("directions", torch.empty(shape, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        seed = self.config.seed + self.layer_idx
        init.copy_(self.directions, orthogonal_features(self.num_heads, self.num_features, self.head_dim, seed))

    def features(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q * self.head_dim**-0.25, k * self.head_dim**-0.25
        directions = self.directions.to(q.dtype)
        with torch.autocast(q.device.type, enabled=False):  # exponents, not activations
            q_logits, k_logits = (torch.einsum("bthd,hfd->bthf", x, directions) for x in (q, k))
        q = (q_logits - q_logits.amax(-1, keepdim=True)).exp()
        return q, (k_logits - k.square().sum(-1, keepdim=True) / 2).exp()

    def flops(self, batch: int, length: int) -> int:
        return super().flops(batch, length) + batch * length * 4 * self.directions.numel()
