"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464, section 3), as Qwen3-Next and OLMo-Hybrid released it: a state
that forgets at a rate of its own choice, and that erases what it held under a key before it writes there.

    [q, k, v] = SiLU(conv([W_q x, W_k x, W_v x]));   q, k of each head to unit length;   q / sqrt(K)
    g_t = -exp(A_log) softplus(W_a x + dt_bias);     beta_t = sigmoid(W_b x), twice that with negative_eigenvalues
    S'_t = e^{g_t} S_(t-1);   S_t = S'_t + beta_t k_t (v_t - k_t S'_t)^T;   o_t = q_t S_t
    output W_o ( RMSNorm(o) * SiLU(W_g x) )          one norm per head, all with the same weight

beta k k^T has an eigenvalue up to 1, or up to 2: then a state may also change its sign (arXiv:2411.12537).

G heads of q and k, H heads of v, K head_dim, V v_head_dim; each of the G serves H/G consecutive heads.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.blocks.attention import resolve_head_dim
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import DepthwiseConv, Linear, in_projection, out_projection
from zoo.blocks.mamba import initial_dt_bias
from zoo.blocks.mamba2 import A_MAX, A_MIN
from zoo.blocks.state import State
from zoo.schema import FieldError, Positive, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

UNIT_EPS = 1e-6  # added to a head's squared length, in both released models and in fla


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(MixerConfig):
    """Gated DeltaNet: the delta rule with one decay per head.

    num_heads             heads of queries and keys.
    num_v_heads           heads of values, each with a decay and a beta of its own; default num_heads.
    head_dim              of queries and keys; default hidden_size / num_heads.
    v_head_dim            of values; default head_dim.
    conv_kernel           taps of the short convolution.
    negative_eigenvalues  beta in (0, 2) instead of (0, 1).
    norm_eps              of the output's norm; default the model's.
    """

    num_heads: Size
    num_v_heads: Size | None = None
    head_dim: Size | None = None
    v_head_dim: Size | None = None
    conv_kernel: Size = 4
    negative_eigenvalues: bool = False
    norm_eps: Positive | None = None

    def resolve(self, model: ZooConfig) -> Self:
        head_dim = resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size)
        num_v_heads = self.num_v_heads or self.num_heads
        if num_v_heads % self.num_heads:
            raise FieldError("num_v_heads", f"must be a multiple of num_heads ({self.num_heads}), got {num_v_heads}")
        return replace(
            self,
            num_v_heads=num_v_heads,
            head_dim=head_dim,
            v_head_dim=self.v_head_dim or head_dim,
            norm_eps=self.norm_eps or model.norm_config.eps,
        )


class DeltaMixer(Mixer):
    """What mixers around the delta rule share; they differ in how decays and gates are made of x."""

    float32 = ("A_log", "dt_bias")
    gate_activation: ClassVar[Literal["silu", "sigmoid"]]

    def __init__(
        self, model: ZooConfig, heads: tuple[int, int], dims: tuple[int, int], conv_kernel: int, norm_eps: float
    ) -> None:
        super().__init__()
        (self.num_heads, self.num_v_heads), (self.head_dim, self.v_head_dim) = heads, dims
        self.conv_kernel, self.norm_eps, self.beta_scale = conv_kernel, norm_eps, 1.0
        self.inner, self.v_inner = self.num_heads * self.head_dim, self.num_v_heads * self.v_head_dim
        self.conv_channels = 2 * self.inner + self.v_inner
        hidden = model.hidden_size
        self.q_proj = in_projection(model, hidden, self.inner)
        self.k_proj = in_projection(model, hidden, self.inner)
        self.v_proj = in_projection(model, hidden, self.v_inner)
        self.b_proj = in_projection(model, hidden, self.num_v_heads)
        self.conv = DepthwiseConv(self.conv_channels, conv_kernel, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads, dtype=torch.float32))
        self.norm_weight = nn.Parameter(torch.empty(self.v_head_dim))
        self.o_proj = out_projection(model, self.v_inner)

    def reset_parameters(self) -> None:
        init.copy_(self.A_log, torch.empty(self.num_v_heads).uniform_(A_MIN, A_MAX).log())
        init.copy_(self.dt_bias, initial_dt_bias(self.dt_bias.numel()))
        init.ones_(self.norm_weight)

    dt_bias: nn.Parameter

    @abstractmethod
    def log_decay(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As the op takes it, in dtype."""

    @abstractmethod
    def gate(self, x: Tensor) -> Tensor:
        """Of the output, before its activation: `[batch, length, H V]`."""

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        x, cu_seqlens = context.pack(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        qkv, conv_state = ops.causal_conv1d(
            torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1),
            self.conv.weight,
            activation="silu",
            initial_state=None if state is None else state["conv"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        q, k, v = qkv.split([self.inner, self.inner, self.v_inner], -1)
        q, k = (unit_heads(part.unflatten(-1, (self.num_heads, self.head_dim))) for part in (q, k))
        out, S = ops.delta_rule(
            q,
            k,
            v.unflatten(-1, (self.num_v_heads, self.v_head_dim)),
            self.beta_scale * self.b_proj(x).to(wide).sigmoid(),
            self.log_decay(x, wide),
            scale=self.head_dim**-0.5,
            initial_state=None if state is None else state["S"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        if state is not None:
            state.update(conv=conv_state, S=S)
        y = ops.gated_rms_norm(
            out.flatten(-2),
            self.gate(x),
            self.norm_weight.repeat(self.num_v_heads),
            eps=self.norm_eps,
            num_groups=self.num_v_heads,
            activation=self.gate_activation,
            gate_first=False,
        )
        return context.unpack(self.o_proj(y))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        conv = torch.zeros(batch_size, self.conv_channels, self.conv_kernel - 1, device=device, dtype=wide)
        shape = batch_size, self.num_v_heads, self.head_dim, self.v_head_dim
        return State(conv=conv, S=torch.zeros(shape, device=device, dtype=wide))

    def state_bytes(self, batch: int, length: int) -> int:
        return 4 * batch * (self.conv_channels * (self.conv_kernel - 1) + self.v_inner * self.head_dim)

    def flops(self, batch: int, length: int) -> int:
        weights = sum(part.weight.numel() for part in self.modules() if isinstance(part, Linear | DepthwiseConv))
        return batch * length * (2 * weights + 6 * self.v_inner * self.head_dim)


def unit_heads(x: Tensor) -> Tensor:
    """x `[..., head_dim]` divided by its length, in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + UNIT_EPS)).to(x.dtype)


class GatedDelta(DeltaMixer):
    gate_activation = "silu"

    def __init__(self, config: GatedDeltaConfig, model: ZooConfig, layer_idx: int) -> None:
        heads, dims = (config.num_heads, config.num_v_heads), (config.head_dim, config.v_head_dim)
        assert heads[1] is not None and dims[0] is not None and dims[1] is not None, "resolve() fills them in"
        assert config.norm_eps is not None, "and this"
        super().__init__(model, (heads[0], heads[1]), (dims[0], dims[1]), config.conv_kernel, config.norm_eps)
        self.config = config
        self.beta_scale = 2.0 if config.negative_eigenvalues else 1.0
        self.a_proj = in_projection(model, model.hidden_size, self.num_v_heads)
        self.gate_proj = in_projection(model, model.hidden_size, self.v_inner)
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads, dtype=torch.float32))
        self.reset_parameters()

    def log_decay(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return -self.A_log.to(dtype).exp() * F.softplus(self.a_proj(x).to(dtype) + self.dt_bias)

    def gate(self, x: Tensor) -> Tensor:
        return self.gate_proj(x)
