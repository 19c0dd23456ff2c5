"""Double-gated short convolution (LFM2, Liquid AI 2025, arXiv:2511.23404, section 2), which stands in for most
attention layers there. Two linear gates around a depthwise convolution of a few taps, without any activation.

    [B | C | u] = W_in x
    y = W_out ( C * conv(B * u) )        conv(z)_t = b + sum_{w=0..W-1} k_w z_(t-W+1+w)

D hidden_size (channels), W conv_kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo import ops
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import DepthwiseConv, in_projection, out_projection
from zoo.blocks.state import State
from zoo.schema import Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(MixerConfig):
    """Double-gated short convolution (LFM2).

    conv_kernel  taps of the convolution.
    bias         biases on both projections and on the convolution.
    """

    conv_kernel: Size = 3
    bias: bool = False


class ShortConv(Mixer):
    adapted = (("in_proj",),)

    def __init__(self, config: ShortConvConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.channels = model.hidden_size
        self.in_proj = in_projection(model, self.channels, 3 * self.channels, config.bias)
        self.conv = DepthwiseConv(self.channels, config.conv_kernel, config.bias)
        self.out_proj = out_projection(model, self.channels, config.bias)

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        x, cu_seqlens = context.pack(x)
        B, C, u = self.in_proj(x).chunk(3, dim=-1)
        y, conv_state = ops.causal_conv1d(
            B * u,
            self.conv.weight,
            self.conv.bias,
            initial_state=None if state is None else state["conv"],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        if state is not None:
            state.update(conv=conv_state)
        return context.unpack(self.out_proj(C * y))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch_size, self.channels, self.config.conv_kernel - 1
        return State(conv=torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * self.channels * (self.config.conv_kernel - 1) * 4

    def flops(self, batch: int, length: int) -> int:
        weights = sum(p.weight.numel() for p in (self.in_proj, self.conv, self.out_proj))
        return 2 * batch * length * weights
