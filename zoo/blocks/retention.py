"""Retention (Sun et al. 2023, arXiv:2307.08621, sections 2.1 and 2.3): linear attention with rotary positions and one
constant decay per head, each head normalised, gated.

    S_t = gamma_h S_(t-1) + k_t v_t^T,   o_t = q_t S_t / sqrt(D)     q and k turned by their positions
    gamma_h = 1 - 2^(-5-h)                                           head h, from 0
    y = W_o (silu(W_g x) * RMSNorm_h(o))                             the norm of each head by itself, scaled by w

The rotations and the decay together are the paper's xPos: k_j turned by j, q_t by t and gamma^(t-j) between them.

B batch, T length, H heads, D head_dim, V v_head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from transformers import initialization as init

from zoo import ops
from zoo.blocks.attention import resolve_head_dim
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import in_projection, out_projection
from zoo.blocks.norm import Norm, NormConfig
from zoo.blocks.rope import RopeConfig, RotaryEmbedding
from zoo.blocks.state import State
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class RetentionConfig(MixerConfig):
    """Retention, the mixer of RetNet.

    num_heads   heads; each has its own constant decay.
    head_dim    of queries and keys; default hidden_size / num_heads.
    v_head_dim  of values; default twice head_dim.
    rope        rotary positions; null for none.
    """

    num_heads: Size
    head_dim: Size | None = None
    v_head_dim: Size | None = None
    rope: RopeConfig | None = field(default_factory=RopeConfig)

    def resolve(self, model: ZooConfig) -> Self:
        head_dim = resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size)
        rope = self.rope
        if rope is not None:
            try:
                rope = rope.resolve(head_dim)
            except FieldError as error:
                raise error.within("rope") from None
            if rope.type == "longrope":
                raise FieldError("rope.type", "longrope would turn what the state holds; choose another")
        v_head_dim = 2 * head_dim if self.v_head_dim is None else self.v_head_dim
        return replace(self, head_dim=head_dim, v_head_dim=v_head_dim, rope=rope)


def log_decays(num_heads: int) -> Tensor:
    """`[num_heads]` float32: log(1 - 2^(-5-h))."""
    decays = [math.log1p(-(2.0 ** (-5 - head))) for head in range(num_heads)]
    return torch.tensor(decays, dtype=torch.float32, device="cpu")


class Retention(Mixer):
    adapted = (("q_proj",), ("k_proj",), ("v_proj",), ("gate_proj",))
    log_decay: Tensor
    float32 = ("log_decay",)

    def __init__(self, config: RetentionConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.v_head_dim is not None, "resolve() fills them in"
        self.config = config
        self.num_heads, self.head_dim, self.v_head_dim = config.num_heads, config.head_dim, config.v_head_dim
        inner, inner_v = self.num_heads * self.head_dim, self.num_heads * self.v_head_dim
        self.q_proj = in_projection(model, model.hidden_size, inner)
        self.k_proj = in_projection(model, model.hidden_size, inner)
        self.v_proj = in_projection(model, model.hidden_size, inner_v)
        self.gate_proj = in_projection(model, model.hidden_size, inner_v)
        self.norm = Norm(inner_v, NormConfig(eps=model.norm_config.eps))
        self.o_proj = out_projection(model, inner_v)
        self.rotary = RotaryEmbedding(config.rope) if config.rope is not None else None
        self.register_buffer("log_decay", torch.empty(self.num_heads, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.log_decay, log_decays(self.num_heads))

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.rotary is not None:
            q, k = self.rotary(q, k, context.position_ids, context.rotations)
        (q, cu_seqlens), (k, _), (x, _) = context.pack(q), context.pack(k), context.pack(x)
        v = self.v_proj(x).unflatten(-1, (-1, self.v_head_dim))
        initial = None if state is None else state["S"]
        out, new = ops.linear_attention(
            q, k, v, self.log_decay, scale=self.head_dim**-0.5, initial_state=initial, return_state=True,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        if state is not None:
            state.update(S=new)
        out = ops.gated_rms_norm(
            out.flatten(-2), self.gate_proj(x), self.norm.weight, eps=self.norm.config.eps,
            num_groups=self.num_heads, activation="silu", gate_first=False,
        )  # fmt: skip
        return context.unpack(self.o_proj(out))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch_size, self.num_heads, self.head_dim, self.v_head_dim
        return State(S=torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * self.num_heads * self.head_dim * self.v_head_dim * 4

    def flops(self, batch: int, length: int) -> int:
        projections = (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj)
        weights = sum(p.weight.numel() for p in projections)
        return batch * length * (2 * weights + 4 * self.num_heads * self.head_dim * self.v_head_dim)
