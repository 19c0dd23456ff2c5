"""The recurrent block of Griffin and RecurrentGemma (De et al. 2024, arXiv:2402.19427, section 2.3): a real-gated
linear recurrent unit (RG-LRU, section 2.4) behind a short convolution, and a GELU gate beside both.

    y = GELU(W_y x + b_y);   u = conv(W_x x + b_x)
    r_t = sigmoid(u_t W_a + b_a)                                recurrence gate, equation 1
    i_t = sigmoid(u_t W_i + b_i)                                input gate, equation 2
    log a_t = -c softplus(Lambda) r_t,  c = 8                   equations 3 and 6
    h_t = a_t h_(t-1) + sqrt(1 - a_t^2) (i_t u_t)               equation 4
    output W_o (h * y) + b_o

W_a and W_i are block-diagonal, a block for each head (appendix A). As released (and in transformers), the first token
of a sequence enters whole, without sqrt(1 - a^2): there is no state to make room beside. The op is the selective scan
with one state per channel: delta = -log a, A = -1, B = C = 1 and delta u the gated input.

E width (channels), H num_heads, W conv_kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import DepthwiseConv, in_projection, out_projection
from zoo.blocks.state import State
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

C = 8.0
A_MIN, A_MAX = 0.9, 0.999  # range of the initial a^c (section 2.4)
# A gate that underflows would make 0/0 of the input and its gradient; exp(-DELTA_MIN) is still 1 in float32.
DELTA_MIN = 1e-12


@dataclass(frozen=True, kw_only=True)
class RGLRUConfig(MixerConfig):
    """Griffin's recurrent block: short convolution, real-gated linear recurrent unit, GELU gate.

    num_heads    blocks on the diagonal of the two gates' matrices.
    width        channels of the recurrence; default hidden_size.
    conv_kernel  taps of the short convolution.
    """

    num_heads: Size
    width: Size | None = None
    conv_kernel: Size = 4

    def resolve(self, model: ZooConfig) -> Self:
        width = self.width or model.hidden_size
        if width % self.num_heads:
            raise FieldError("num_heads", f"must divide the width ({width}), got {self.num_heads}")
        return replace(self, width=width)


class BlockDiagonal(nn.Module):
    """A linear map within each head: `weight` `[heads, in, out]`, `bias` `[heads, out]`."""

    def __init__(self, num_heads: int, size: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_heads, size, size))
        self.bias = nn.Parameter(torch.empty(num_heads, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)
        init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[batch, length, heads * in]` to `[batch, length, heads * out]`."""
        heads = x.flatten(0, 1).unflatten(-1, self.bias.shape).transpose(0, 1)
        y = torch.baddbmm(self.bias[:, None].to(x.dtype), heads, self.weight.to(x.dtype))
        return y.transpose(0, 1).reshape(x.shape)


class RGLRU(Mixer):
    adapted = (("x_proj",), ("y_proj",))
    float32 = ("a_param",)

    def __init__(self, config: RGLRUConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.width is not None, "resolve() fills it in"
        self.config = config
        self.width = config.width
        self.x_proj = in_projection(model, model.hidden_size, self.width, bias=True)
        self.y_proj = in_projection(model, model.hidden_size, self.width, bias=True)
        self.conv = DepthwiseConv(self.width, config.conv_kernel)
        size = self.width // config.num_heads
        self.recurrence_gate = BlockDiagonal(config.num_heads, size, std=(0.01 / size) ** 0.5)
        self.input_gate = BlockDiagonal(config.num_heads, size, std=(0.01 / size) ** 0.5)
        self.a_param = nn.Parameter(torch.empty(self.width, dtype=torch.float32))
        self.out_proj = out_projection(model, self.width, bias=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # a^2 is uniform (appendix A), and softplus(Lambda) = -log a.
        square = torch.empty(self.width).uniform_(A_MIN**2, A_MAX**2)
        init.copy_(self.a_param, torch.expm1(-0.5 * square.log()).log())

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        x, cu_seqlens = context.pack(x)
        positions, _ = context.pack(context.position_ids)
        u, conv_state = ops.causal_conv1d(
            self.x_proj(x),
            self.conv.weight,
            self.conv.bias,
            initial_state=None if state is None else state["conv"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        r = self.recurrence_gate(u).to(wide).sigmoid()
        delta = (C * F.softplus(self.a_param.to(wide)) * r).clamp(min=DELTA_MIN)
        room = torch.sqrt(-torch.expm1(-2 * delta)).masked_fill((positions == 0)[..., None], 1)
        gated = room * self.input_gate(u).to(wide).sigmoid() * u
        one = delta.new_ones(1, 1, 1)
        h, last = ops.selective_scan(
            gated / delta,
            delta,
            -one[0].expand(self.width, 1),
            one.expand(*delta.shape[:2], 1),
            one.expand(*delta.shape[:2], 1),
            initial_state=None if state is None else state["h"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        if state is not None:
            state.update(conv=conv_state, h=last)
        y = F.gelu(self.y_proj(x), approximate="tanh")
        return context.unpack(self.out_proj(h.to(y.dtype) * y))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        conv = torch.zeros(batch_size, self.width, self.config.conv_kernel - 1, device=device, dtype=wide)
        return State(conv=conv, h=torch.zeros(batch_size, self.width, 1, device=device, dtype=wide))

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * self.width * self.config.conv_kernel * 4  # W - 1 inputs and one state

    def flops(self, batch: int, length: int) -> int:
        modules = (self.x_proj, self.y_proj, self.conv, self.recurrence_gate, self.input_gate, self.out_proj)
        return batch * length * (2 * sum(p.weight.numel() for p in modules) + 4 * self.width)
