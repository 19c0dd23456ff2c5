"""Mamba (Gu and Dao 2023, arXiv:2312.00752, sections 3.2 to 3.4), and Jamba's variant with inner norms (Lieber et al.
2024, arXiv:2403.19887).

    [u, z] = W_in x;   u = SiLU(conv(u))
    [dt, B, C] = W_x u                                 inner_norms: each RMS-normalised
    delta = softplus(W_dt dt + b_dt);   A = -exp(A_log)
    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t
    y_t = (C_t h_t + D u_t) * SiLU(z_t);   output W_out y

E intermediate_size (channels), N state_size, R dt_rank, W conv_kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import DepthwiseConv, Linear, in_projection, out_projection
from zoo.blocks.norm import Norm, NormConfig
from zoo.blocks.state import State
from zoo.schema import Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

DT_MIN, DT_MAX = 1e-3, 1e-1  # range of the initial step sizes (section 3.6)


@dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """Mamba-1: a selective state-space layer with a state of its own for every channel.

    intermediate_size  channels; default 2 * hidden_size.
    state_size         states per channel.
    conv_kernel        taps of the short convolution.
    dt_rank            rank of the step size's projection; default hidden_size / 16, rounded up.
    inner_norms        RMS-normalise dt, B and C (Jamba).
    bias               biases on the first and last projection.
    conv_bias          a bias on the short convolution.
    """

    intermediate_size: Size | None = None
    state_size: Size = 16
    conv_kernel: Size = 4
    dt_rank: Size | None = None
    inner_norms: bool = False
    bias: bool = False
    conv_bias: bool = True

    def resolve(self, model: ZooConfig) -> Self:
        return replace(
            self,
            intermediate_size=self.intermediate_size or 2 * model.hidden_size,
            dt_rank=self.dt_rank or math.ceil(model.hidden_size / 16),
        )


def initial_dt_bias(size: int) -> Tensor:
    """`[size]` float32 whose softplus is log-uniform in [DT_MIN, DT_MAX] (section 3.6)."""
    steps = torch.exp(torch.rand(size) * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN))
    return steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus


class Mamba(Mixer):
    adapted = (("in_proj",),)
    float32 = ("A_log", "D", "dt_bias")

    def __init__(self, config: MambaConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None and config.dt_rank is not None, "resolve() fills them in"
        self.config = config
        self.channels, self.state_size, self.dt_rank = config.intermediate_size, config.state_size, config.dt_rank
        self.in_proj = in_projection(model, model.hidden_size, 2 * self.channels, config.bias)
        self.conv = DepthwiseConv(self.channels, config.conv_kernel, config.conv_bias)
        self.x_proj = in_projection(model, self.channels, self.dt_rank + 2 * self.state_size)
        norm = NormConfig(eps=model.norm_config.eps)
        sizes = (self.dt_rank, self.state_size, self.state_size)
        self.inner_norms = nn.ModuleList([Norm(size, norm) for size in sizes]) if config.inner_norms else None
        self.dt_proj = Linear(self.dt_rank, self.channels, std=self.dt_rank**-0.5 / math.sqrt(3))
        self.dt_bias = nn.Parameter(torch.empty(self.channels, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(self.channels, self.state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.channels, dtype=torch.float32))
        self.out_proj = out_projection(model, self.channels, config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.dt_bias, initial_dt_bias(self.channels))
        # S4D-real (section 3.6): state n of every channel decays at rate n.
        init.copy_(self.A_log, torch.arange(1, self.state_size + 1).float().log().expand(self.channels, -1))
        init.ones_(self.D)

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        x, cu_seqlens = context.pack(x)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv_state = ops.causal_conv1d(
            u,
            self.conv.weight,
            self.conv.bias,
            activation="silu",
            initial_state=None if state is None else state["conv"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        if self.inner_norms is not None:
            dt, B, C = (norm(part) for norm, part in zip(self.inner_norms, (dt, B, C), strict=True))
        wide = torch.promote_types(x.dtype, torch.float32)
        delta = F.softplus(self.dt_proj(dt).to(wide) + self.dt_bias)
        y, h = ops.selective_scan(
            u,
            delta,
            -torch.exp(self.A_log.to(wide)),
            B,
            C,
            self.D.to(wide),
            initial_state=None if state is None else state["h"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        if state is not None:
            state.update(conv=conv_state, h=h)
        return context.unpack(self.out_proj(y * F.silu(z)))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        conv = torch.zeros(batch_size, self.channels, self.config.conv_kernel - 1, device=device, dtype=wide)
        return State(conv=conv, h=torch.zeros(batch_size, self.channels, self.state_size, device=device, dtype=wide))

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * self.channels * (self.config.conv_kernel - 1 + self.state_size) * 4

    def flops(self, batch: int, length: int) -> int:
        weights = sum(p.weight.numel() for p in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj, self.conv))
        return batch * length * (2 * weights + 4 * self.channels * self.state_size)
