"""Kimi Delta Attention (Kimi Linear, arXiv:2510.26692, section 3): Gated DeltaNet whose every channel of the keys
decays at a rate of its own.

    [q, k, v] = SiLU(conv([W_q x, W_k x, W_v x]));   q, k of each head to unit length;   q / sqrt(D)
    g_t = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias)   one per head and channel, through D dimensions
    beta_t = sigmoid(W_b x)
    S'_t = Diag(e^{g_t}) S_(t-1);   S_t = S'_t + beta_t k_t (v_t - k_t S'_t)^T;   o_t = q_t S_t
    output W_o ( RMSNorm(o) * sigmoid(W_g2 W_g1 x) )    one norm per head, all with the same weight

Without low_rank W_f and W_g are one matrix each. With lower_bound b < 0 no decay is below e^b (Ling 3.0):
g_t = b sigmoid(exp(A_log) (W_f x + dt_bias)).

H heads, D head_dim, of queries, keys and values alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Self

import torch
import torch.nn.functional as F
from annotated_types import Lt
from torch import Tensor, nn

from zoo.blocks.attention import resolve_head_dim
from zoo.blocks.base import MixerConfig
from zoo.blocks.gated_delta import DeltaMixer
from zoo.blocks.linear import in_projection
from zoo.schema import Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class KDAConfig(MixerConfig):
    """Kimi Delta Attention: the delta rule with one decay per channel.

    num_heads    heads.
    head_dim     of queries, keys and values; default hidden_size / num_heads.
    conv_kernel  taps of the short convolution.
    low_rank     make decays and output gates through head_dim dimensions, not with one matrix each.
    lower_bound  of the logarithms of the decays; default none.
    """

    num_heads: Size
    head_dim: Size | None = None
    conv_kernel: Size = 4
    low_rank: bool = True
    lower_bound: Annotated[float, Lt(0)] | None = None

    def resolve(self, model: ZooConfig) -> Self:
        return replace(self, head_dim=resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size))


class KDA(DeltaMixer):
    gate_activation = "sigmoid"

    def __init__(self, config: KDAConfig, model: ZooConfig, layer_idx: int) -> None:
        heads, dim, hidden = config.num_heads, config.head_dim, model.hidden_size
        assert dim is not None, "resolve() fills it in"
        super().__init__(model, (heads, heads), (dim, dim), config.conv_kernel, model.norm_config.eps)
        self.config = config
        if config.low_rank:
            self.f_a_proj = in_projection(model, hidden, dim)
            self.f_b_proj = in_projection(model, dim, self.inner)
            self.gate_a_proj = in_projection(model, hidden, dim)
            self.gate_b_proj = in_projection(model, dim, self.inner)
        else:
            self.f_proj = in_projection(model, hidden, self.inner)
            self.gate_proj = in_projection(model, hidden, self.inner)
        self.dt_bias = nn.Parameter(torch.empty(self.inner, dtype=torch.float32))
        self.reset_parameters()

    def log_decay(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        f = self.f_b_proj(self.f_a_proj(x)) if self.config.low_rank else self.f_proj(x)
        steps = (f.to(dtype) + self.dt_bias).unflatten(-1, (self.num_heads, self.head_dim))
        rates = self.A_log.to(dtype).exp()[:, None]
        if self.config.lower_bound is not None:
            return self.config.lower_bound * (rates * steps).sigmoid()
        return -rates * F.softplus(steps)

    def gate(self, x: Tensor) -> Tensor:
        return self.gate_b_proj(self.gate_a_proj(x)) if self.config.low_rank else self.gate_proj(x)
