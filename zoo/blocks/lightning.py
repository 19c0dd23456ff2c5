"""Lightning attention (Qin et al. 2024, arXiv:2401.04658), as MiniMax-Text-01 released it (arXiv:2501.08313, section
2.2): linear attention with one constant decay per head, no softmax, no positions, no 1/sqrt(D).

    [q | k | v] = SiLU(W x), interleaved per head
    S_t = e^(-s_h) S_(t-1) + k_t v_t^T          the present token is not decayed
    o_t = q_t S_t
    y = W_o ( sigmoid(W_g x) * RMSNorm(o) )     the norm spans all heads

    s_h = 2^(-8(h+1)/H) * (1 - l/(L-1+1e-5) + 1e-5)      head h of H, layer l of L, both from 0

B batch, T length, H heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor
from transformers import initialization as init

from zoo import ops
from zoo.blocks.attention import resolve_head_dim
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import in_projection, out_projection
from zoo.blocks.norm import Norm, NormConfig
from zoo.blocks.state import State
from zoo.schema import Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

NORM_EPS = 1e-6  # fixed in the released model, whatever the model's own eps


@dataclass(frozen=True, kw_only=True)
class LightningConfig(MixerConfig):
    """Lightning attention with MiniMax-Text-01's exact semantics.

    num_heads  heads; each has its own constant decay.
    head_dim   default hidden_size / num_heads.
    slopes     decays for head counts that are no power of two: alibi (the original code) or geometric (transformers).
    """

    num_heads: Size
    head_dim: Size | None = None
    slopes: Literal["alibi", "geometric"] = "alibi"

    def resolve(self, model: ZooConfig) -> Self:
        head_dim = resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size)
        both = self.num_heads & (self.num_heads - 1) == 0  # the rules agree
        return replace(self, head_dim=head_dim, slopes="alibi" if both else self.slopes)


def decay_slopes(num_heads: int, layer_idx: int, num_layers: int, rule: str = "alibi") -> Tensor:
    """`[num_heads]` float32: s_h of the equation above, so that the decay is exp(-s_h).

    Both rules give 2^(-8(h+1)/H) for powers of two. Otherwise `geometric` keeps that formula, and `alibi` takes the
    slopes of the next smaller power of two followed by every other slope of the next larger one (Press et al. 2021,
    arXiv:2108.12409, footnote 8).
    """
    if rule == "geometric" or num_heads & (num_heads - 1) == 0:
        slopes = [2 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]
    else:
        smaller = 2 ** int(math.log2(num_heads))
        slopes = [2 ** (-8 * (head + 1) / smaller) for head in range(smaller)]
        slopes += [2 ** (-4 * (2 * head + 1) / smaller) for head in range(num_heads - smaller)]
    depth = 1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
    return torch.tensor(slopes, dtype=torch.float32, device="cpu") * depth


class Lightning(Mixer):
    adapted = (("qkv_proj",), ("gate_proj",))
    log_decay: Tensor
    float32 = ("log_decay",)

    def __init__(self, config: LightningConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None, "resolve() fills it in"
        self.config = config
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.layer_idx, self.num_layers = layer_idx, model.num_hidden_layers
        inner = self.num_heads * self.head_dim
        self.qkv_proj = in_projection(model, model.hidden_size, 3 * inner)
        self.gate_proj = in_projection(model, model.hidden_size, inner)
        self.norm = Norm(inner, NormConfig(eps=NORM_EPS))
        self.o_proj = out_projection(model, inner)
        self.register_buffer("log_decay", torch.empty(self.num_heads, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        slopes = decay_slopes(self.num_heads, self.layer_idx, self.num_layers, self.config.slopes)
        init.copy_(self.log_decay, -slopes)

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        x, cu_seqlens = context.pack(x)
        qkv = torch.nn.functional.silu(self.qkv_proj(x))
        q, k, v = qkv.unflatten(-1, (self.num_heads, 3 * self.head_dim)).split(self.head_dim, dim=-1)
        if state is None:
            out = ops.linear_attention(q, k, v, self.log_decay, cu_seqlens=cu_seqlens)
        else:
            out, new = ops.linear_attention(
                q, k, v, self.log_decay, initial_state=state["S"], return_state=True, cu_seqlens=cu_seqlens
            )
            state.update(S=new)
        gate = self.gate_proj(x)
        out = ops.gated_rms_norm(
            out.flatten(-2), gate, self.norm.weight, eps=NORM_EPS, activation="sigmoid", gate_first=False
        )
        return context.unpack(self.o_proj(out))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch_size, self.num_heads, self.head_dim, self.head_dim
        return State(S=torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * self.num_heads * self.head_dim**2 * 4

    def flops(self, batch: int, length: int) -> int:
        weights = sum(p.weight.numel() for p in (self.qkv_proj, self.gate_proj, self.o_proj))
        return batch * length * (2 * weights + 4 * self.num_heads * self.head_dim**2)
