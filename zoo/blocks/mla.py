"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; without rotation in Kimi Linear).

    c_t = norm(W_DKV x_t)           the latent: all that is kept of a token, with r_t
    r_t = rope(W_KR x_t)            one key for all heads
    k_t = [W_UK c_t, r_t]           v_t = W_UV c_t
    q_t = [q_nope, rope(q_rope)]    of W_Q x_t, or W_UQ norm(W_DQ x_t) with q_lora_rank
    o_t = sum_j softmax_j(s * q_t . k_j) v_j        y = W_o (o)     with output_gate: W_o (sigmoid(W_g x) * o)

Few new tokens do not turn the whole past into keys and values. They take W_UK to the query's side, which then compares
with the latents themselves, one key/value head for all, and W_UV to the output's (section 2.1.2):

    q . (W_UK c) = (W_UK^T q) . c       sum_j p_j W_UV c_j = W_UV sum_j p_j c_j

B batch, T length, H heads, C kv_lora_rank, N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from zoo import ops
from zoo.blocks.attention import visible_pairs
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import Linear, in_projection, out_projection
from zoo.blocks.norm import Norm, NormConfig
from zoo.blocks.rope import RopeConfig, RotaryEmbedding
from zoo.blocks.state import KeyValueState, State
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

NORM = NormConfig(eps=1e-6)  # of the latents, whatever the model's, as in the code of its authors


@dataclass(frozen=True, kw_only=True)
class MLAConfig(MixerConfig):
    """Multi-head latent attention: a small cache of latents, from which every head makes its keys and values.

    num_heads         heads.
    q_lora_rank       width of the query's latent; null for queries straight from the stream.
    kv_lora_rank      width of the latent of keys and values.
    qk_nope_head_dim  dimensions of a head that are not rotated.
    qk_rope_head_dim  dimensions that are; their key is one for all heads.
    v_head_dim        of the values.
    rope              rotary positions; null for none (Kimi Linear).
    bias              biases on the projections that read or write the stream, but for the queries'.
    output_gate       multiply each head's output by sigmoid(W_g x), one number per head (Ling 3.0).
    """

    num_heads: Size
    q_lora_rank: Size | None = None
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    bias: bool = False
    output_gate: bool = False

    def resolve(self, model: ZooConfig) -> Self:
        if self.rope is None:
            return self
        try:
            rope = self.rope.resolve(self.qk_rope_head_dim)
        except FieldError as error:
            raise error.within("rope") from None
        return replace(self, rope=rope)

    @property
    def scale(self) -> float:
        """Of the logits: yarn's factor stands here where `mscale_all_dim` says so."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope is not None and self.rope.factor is not None and self.rope.mscale_all_dim is not None:
            scale *= (0.1 * self.rope.mscale_all_dim * math.log(max(1.0, self.rope.factor)) + 1) ** 2
        return scale


class MLA(Mixer):
    def __init__(self, config: MLAConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        hidden, heads, latent = model.hidden_size, config.num_heads, config.kv_lora_rank
        nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        if config.q_lora_rank is None:
            self.q_proj = in_projection(model, hidden, heads * (nope + rope))
        else:
            self.q_a_proj = in_projection(model, hidden, config.q_lora_rank, config.bias)
            self.q_a_norm = Norm(config.q_lora_rank, NORM)
            self.q_b_proj = in_projection(model, config.q_lora_rank, heads * (nope + rope))
        self.kv_a_proj = in_projection(model, hidden, latent + rope, config.bias)  # c, then r
        self.kv_a_norm = Norm(latent, NORM)
        self.kv_b_proj = in_projection(model, latent, heads * (nope + v_dim))  # of each head W_UK, then W_UV
        self.gate_proj = in_projection(model, hidden, heads) if config.output_gate else None
        self.o_proj = out_projection(model, heads * v_dim, config.bias)
        self.rotary = RotaryEmbedding(config.rope) if config.rope is not None else None

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        sizes = [self.config.qk_nope_head_dim, self.config.qk_rope_head_dim]
        q = self.q_proj(x) if self.config.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (self.config.num_heads, -1)).split(sizes, -1)
        latents, k_rope = self.kv_a_proj(x)[:, :, None].split([self.config.kv_lora_rank, sizes[1]], -1)
        latents = self.kv_a_norm(latents)
        if self.rotary is not None:
            q_rope, k_rope = self.rotary(q_rope, k_rope, context.position_ids, context.rotations)
        memory, key_mask, past = torch.cat([latents, k_rope], -1), context.padding_mask, 0
        if state is not None:
            if context.cu_seqlens is not None:
                raise ValueError("mla cannot continue a state with cu_seqlens; pad the rows instead of packing them")
            assert isinstance(state, KeyValueState), "new_state() makes one"
            past = state["keys"].shape[1]
            memory, _, key_mask = state.append(memory, memory[..., :0], key_mask)
            memory = memory.to(q.dtype)  # under autocast the state has the dtype of the weights
        # An adapter around kv_b_proj is in what it computes, not in its weight.
        shorter = past and type(self.kv_b_proj) is Linear and self._is_shorter_absorbed(x.shape[1])
        attend = self._absorbed if shorter else self._expanded
        out = attend(q_nope, q_rope, memory, context.cu_seqlens, key_mask)
        if self.gate_proj is not None:
            out = out * self.gate_proj(x).sigmoid()[..., None]
        return self.o_proj(out.flatten(-2))

    def _is_shorter_absorbed(self, queries: int) -> bool:
        """Whether comparing so many queries with latents, which are longer than keys, costs less than making keys and
        values of every latent: for each head and latent, queries * (2C + R) against queries * (N + R + V) + C (N + V).
        """
        expanded = self.config.qk_nope_head_dim + self.config.v_head_dim
        return queries * (2 * self.config.kv_lora_rank - expanded) < self.config.kv_lora_rank * expanded

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, memory: Tensor, cu_seqlens: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        """Heads' outputs `[B, T, H, V]` of keys and values made of `memory` `[B, L, 1, C + R]`, latents and keys."""
        latents, k_rope = memory.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        keys_and_values = self.kv_b_proj(latents.squeeze(2)).unflatten(-1, (self.config.num_heads, -1))
        k_nope, v = keys_and_values.split([self.config.qk_nope_head_dim, self.config.v_head_dim], -1)
        k = torch.cat([k_nope, k_rope.to(k_nope.dtype).expand(-1, -1, self.config.num_heads, -1)], -1)
        q = torch.cat([q_nope, q_rope], -1)
        return ops.softmax_attention(q, k, v, scale=self.config.scale, cu_seqlens=cu_seqlens, key_mask=key_mask)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, memory: Tensor, cu_seqlens: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        """The same, of `memory` as it is."""
        weight = self.kv_b_proj.weight.to(q_nope.dtype).unflatten(0, (self.config.num_heads, -1))
        up_k, up_v = weight.split([self.config.qk_nope_head_dim, self.config.v_head_dim], 1)
        q = torch.cat([(q_nope.transpose(1, 2) @ up_k).transpose(1, 2), q_rope], -1)
        latents = memory[..., : self.config.kv_lora_rank]
        out = ops.softmax_attention(
            q, memory, latents, scale=self.config.scale, cu_seqlens=cu_seqlens, key_mask=key_mask
        )
        return (out.transpose(1, 2) @ up_v.mT).transpose(1, 2)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        empty = torch.empty(batch_size, 0, 1, width, device=device, dtype=dtype)
        return KeyValueState(empty, empty[..., :0].clone())  # the values are among the keys

    def state_bytes(self, batch: int, length: int) -> int:
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return batch * length * (width * self.o_proj.weight.dtype.itemsize + 1)  # and a byte of mask

    def flops(self, batch: int, length: int) -> int:
        weights = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)
        widths = self.config.qk_nope_head_dim + self.config.qk_rope_head_dim + self.config.v_head_dim
        visible = visible_pairs(length, None, 0)
        return 2 * batch * (length * weights + visible * self.config.num_heads * widths)
