"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, sections 5 to 7): one scalar decay per head turns the selective scan into
linear attention (state-space duality) with q = C, k = B, v = dt x, log_decay = dt A.

    [z, x, B, C, dt] = W_in x;   [x, B, C] = SiLU(conv([x, B, C]))
    dt = clamp(softplus(dt + dt_bias), dt_min, dt_max);   A = -exp(A_log)
    S_t = exp(dt_t A) S_(t-1) + B_t (dt_t x_t)^T;   y_t = C_t S_t + D x_t
    output W_out RMSNorm_group(y * SiLU(z))            gated before the norm; one norm per group

with norm: norm_first  W_out (RMSNorm_group(y) * SiLU(z))         with norm: none  W_out (y * SiLU(z))
with multipliers m     [m_z z, m_x x, m_B B, m_C C, m_dt dt] = m * W_in x     (Falcon-H1, arXiv:2507.22448, section 3)

H heads, P head_dim, N state_size, G num_groups (B and C of a group serve H/G consecutive heads), W conv_kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.blocks.base import Float32Module, Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import DepthwiseConv, in_projection, out_projection
from zoo.blocks.mamba import initial_dt_bias
from zoo.blocks.state import State
from zoo.schema import FieldError, NonNegative, Positive, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

A_MIN, A_MAX = 1.0, 16.0  # range of the initial decay rates


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Mamba-2 (SSD): heads of a state-space model with one scalar decay each.

    num_heads    heads; default 2 * hidden_size / head_dim.
    head_dim     channels per head.
    state_size   states per head.
    num_groups   groups of heads that share B and C, and one norm each.
    conv_kernel  taps of the short convolution.
    bias         biases on both projections.
    conv_bias    a bias on the short convolution.
    dt_min       the least step size.
    dt_max       the largest; default none.
    norm         gate_first: RMSNorm(y * SiLU(z)); norm_first: RMSNorm(y) * SiLU(z); none: y * SiLU(z).
    multipliers  five fixed factors on z, x, B, C and dt as the first projection gives them; default none.
    """

    num_heads: Size | None = None
    head_dim: Size = 64
    state_size: Size = 128
    num_groups: Size = 1
    conv_kernel: Size = 4
    bias: bool = False
    conv_bias: bool = True
    dt_min: NonNegative = 0.0
    dt_max: Positive | None = None
    norm: Literal["gate_first", "norm_first", "none"] = "gate_first"
    multipliers: list[float] | None = None

    def resolve(self, model: ZooConfig) -> Self:
        num_heads = self.num_heads
        if num_heads is None:
            if 2 * model.hidden_size % self.head_dim:
                raise FieldError(
                    "head_dim",
                    f"must divide 2 * hidden_size ({2 * model.hidden_size}), got {self.head_dim}; or give num_heads",
                )
            num_heads = 2 * model.hidden_size // self.head_dim
        if num_heads % self.num_groups:
            raise FieldError("num_groups", f"must divide num_heads ({num_heads}), got {self.num_groups}")
        if self.dt_max is not None and self.dt_max < self.dt_min:
            raise FieldError("dt_max", f"must be at least dt_min ({self.dt_min}), got {self.dt_max}")
        if self.multipliers is not None and len(self.multipliers) != 5:
            raise FieldError("multipliers", f"must be five numbers, for z, x, B, C and dt, got {len(self.multipliers)}")
        return replace(self, num_heads=num_heads)


class Multiply(Float32Module):
    """Multiplies consecutive parts of the last dimension, `sizes` channels each, by one fixed factor per part."""

    factors: Tensor
    float32 = ("factors",)

    def __init__(self, multipliers: list[float], sizes: list[int]) -> None:
        super().__init__()
        self.multipliers, self.sizes = multipliers, sizes
        self.register_buffer("factors", torch.empty(sum(sizes), dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        parts = zip(self.sizes, self.multipliers, strict=True)
        init.copy_(self.factors, torch.cat([torch.full((size,), factor) for size, factor in parts]))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factors).to(x.dtype)


class Mamba2(Mixer):
    adapted = (("in_proj",),)
    float32 = ("A_log", "D", "dt_bias")

    def __init__(self, config: Mamba2Config, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.num_heads is not None, "resolve() fills it in"
        self.config = config
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_groups, self.state_size = config.num_groups, config.state_size
        self.inner = self.num_heads * self.head_dim
        self.conv_channels = self.inner + 2 * self.num_groups * self.state_size
        self.norm_eps = model.norm_config.eps
        width = self.inner + self.conv_channels + self.num_heads
        self.in_proj = in_projection(model, model.hidden_size, width, config.bias)
        self.conv = DepthwiseConv(self.conv_channels, config.conv_kernel, config.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.norm_weight = nn.Parameter(torch.empty(self.inner)) if config.norm != "none" else None
        groups = self.num_groups * self.state_size
        sizes = [self.inner, self.inner, groups, groups, self.num_heads]
        self.multiply = None if config.multipliers is None else Multiply(config.multipliers, sizes)
        self.out_proj = out_projection(model, self.inner, config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.dt_bias, initial_dt_bias(self.num_heads))
        init.copy_(self.A_log, torch.empty(self.num_heads).uniform_(A_MIN, A_MAX).log())
        init.ones_(self.D)
        if self.norm_weight is not None:
            init.ones_(self.norm_weight)

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        x, cu_seqlens = context.pack(x)
        zxBCdt = self.in_proj(x)
        if self.multiply is not None:
            zxBCdt = self.multiply(zxBCdt)
        z, xBC, dt = zxBCdt.split([self.inner, self.conv_channels, self.num_heads], dim=-1)
        xBC, conv_state = ops.causal_conv1d(
            xBC,
            self.conv.weight,
            self.conv.bias,
            activation="silu",
            initial_state=None if state is None else state["conv"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        groups = self.num_groups * self.state_size
        values, B, C = xBC.split([self.inner, groups, groups], dim=-1)
        values = values.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (part.unflatten(-1, (self.num_groups, self.state_size)) for part in (B, C))
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)
        if self.config.dt_min > 0 or self.config.dt_max is not None:
            dt = dt.clamp(self.config.dt_min, self.config.dt_max)
        out, S = ops.linear_attention(
            C,
            B,
            (values * dt[..., None]).to(values.dtype),
            dt * -torch.exp(self.A_log.to(wide)),
            initial_state=None if state is None else state["S"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        if state is not None:
            state.update(conv=conv_state, S=S)
        y = out.to(wide) + self.D.to(wide)[:, None] * values
        return context.unpack(self.out_proj(self._gate(y.flatten(-2), z)))

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """`y` `[batch, length, inner]` normalised and gated, in the dtype of `z`."""
        if self.norm_weight is None:
            return (y * F.silu(z.to(y.dtype))).to(z.dtype)
        gate_first = self.config.norm == "gate_first"
        return ops.gated_rms_norm(
            y, z, self.norm_weight, eps=self.norm_eps, num_groups=self.num_groups, gate_first=gate_first
        )

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        conv = torch.zeros(batch_size, self.conv_channels, self.config.conv_kernel - 1, device=device, dtype=wide)
        shape = batch_size, self.num_heads, self.state_size, self.head_dim
        return State(conv=conv, S=torch.zeros(shape, device=device, dtype=wide))

    def state_bytes(self, batch: int, length: int) -> int:
        return 4 * batch * (self.conv_channels * (self.config.conv_kernel - 1) + self.inner * self.state_size)

    def flops(self, batch: int, length: int) -> int:
        weights = sum(p.weight.numel() for p in (self.in_proj, self.out_proj, self.conv))
        return batch * length * (2 * weights + 4 * self.inner * self.state_size)
