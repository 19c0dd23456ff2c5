"""Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143, section 2.1): softmax attention within segments, and of
all segments before a memory of constant size, which every head mixes in by a gate of its own.

    A_dot = softmax(rope(Q) rope(K)^T / sqrt(D)) V       causal, within the segment
    A_mem = sigma(Q) M / (sigma(Q) z)                    sigma = ELU + 1, without rotation
    O = sigmoid(beta_h) A_mem + (1 - sigmoid(beta_h)) A_dot;    O = A_dot while the memory is empty
    y = W_o (O)

and after each complete segment, from the memory that all its tokens met:

    M += sigma(K)^T V                                    update linear
    M += sigma(K)^T (V - sigma(K) M / (sigma(K) z))      update delta
    z += sum of sigma(K)

The linear update is an affine map of (M, z) with no decay: a stretch of segments adds what it would have written to an
empty memory, so ranks that hold stretches of a sequence can add up one another's (context parallelism).

B batch, T length, H query heads, N key/value heads, D head_dim. Each of the N heads serves H/N consecutive query heads,
which share its memory: M `[B,N,D,D]`, z `[B,N,D]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.blocks.attention import resolve_head_dim, visible_pairs
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import in_projection, out_projection
from zoo.blocks.parallel import ParallelState
from zoo.blocks.rope import RopeConfig, RotaryEmbedding
from zoo.blocks.state import KeyValueState, State
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(MixerConfig):
    """Infini-attention: attention within segments beside a compressed memory of all segments before.

    num_heads     query heads; each has a gate between segment and memory.
    num_kv_heads  key and value heads, each with a memory (grouped-query attention); default num_heads.
    head_dim      default hidden_size / num_heads.
    rope          rotary positions within segments, never in the memory; null for none.
    segment       tokens in a segment, counted from each document's start.
    update        what a segment writes: linear, its values; delta, what the memory does not yet give for its keys.
    """

    num_heads: Size
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    segment: Size = 2048
    update: Literal["linear", "delta"] = "linear"

    def resolve(self, model: ZooConfig) -> Self:
        head_dim = resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size)
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if self.num_heads % num_kv_heads:
            raise FieldError("num_kv_heads", f"must divide num_heads ({self.num_heads}), got {num_kv_heads}")
        rope = self.rope
        if rope is not None:
            try:
                rope = rope.resolve(head_dim)
            except FieldError as error:
                raise error.within("rope") from None
        return replace(self, head_dim=head_dim, num_kv_heads=num_kv_heads, rope=rope)


class Infini(Mixer):
    adapted = (("q_proj",), ("k_proj",), ("v_proj",))
    gate: nn.Parameter
    float32 = ("gate",)
    # At a model's usual rate the gates stay where they start, half open.
    learning_rates = {"gate": 0.01}

    def __init__(self, config: InfiniConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_kv_heads is not None, "resolve() fills them in"
        self.config = config
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        inner, inner_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = in_projection(model, model.hidden_size, inner)
        self.k_proj = in_projection(model, model.hidden_size, inner_kv)
        self.v_proj = in_projection(model, model.hidden_size, inner_kv)
        self.o_proj = out_projection(model, inner)
        self.rotary = RotaryEmbedding(config.rope) if config.rope is not None else None
        self.gate = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.gate)

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in projections)
        q_mem, k_mem = q, k
        if self.rotary is not None:
            q, k = self.rotary(q, k, context.position_ids, context.rotations)
        if state is None:
            out = self._attend(q, k, v, q_mem, k_mem, cu_seqlens=context.cu_seqlens, key_mask=context.padding_mask)
            return self.o_proj(out.flatten(-2))
        if context.cu_seqlens is not None:
            raise ValueError("infini cannot continue a state with cu_seqlens; pad the rows instead of packing them")
        assert isinstance(state, ParallelState), "new_state() makes one"
        memory, unfinished = state.branches
        assert isinstance(unfinished, SegmentState), "new_state() makes one"
        keys = k if self.rotary is None else torch.cat([k, k_mem], -1)
        keys, v, key_mask = unfinished.append(keys, v, context.padding_mask)
        keys, v = keys.to(q.dtype), v.to(q.dtype)  # under autocast the state has the dtype of the weights
        k, k_mem = keys[..., : self.head_dim], keys[..., -self.head_dim :]
        out, (m, z) = self._attend(
            q, k, v, q_mem, k_mem, key_mask=key_mask, initial_memory=(memory["M"], memory["z"]), return_memory=True
        )
        memory.update(M=m, z=z)
        unfinished.forget_complete()
        return self.o_proj(out.flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, q_mem: Tensor, k_mem: Tensor, **options: Any) -> Any:
        config = self.config
        return ops.infini_attention(
            q, k, v, self.gate, segment=config.segment, q_mem=q_mem, k_mem=k_mem, update=config.update, **options
        )

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        heads, dim, wide = self.num_kv_heads, self.head_dim, torch.promote_types(dtype, torch.float32)
        memory = State(
            M=torch.zeros(batch_size, heads, dim, dim, device=device, dtype=wide),
            z=torch.zeros(batch_size, heads, dim, device=device, dtype=wide),
        )
        keys = torch.empty(batch_size, 0, heads, self._key_width(), device=device, dtype=dtype)
        values = torch.empty(batch_size, 0, heads, dim, device=device, dtype=dtype)
        return ParallelState([memory, SegmentState(keys, values, self.config.segment)])

    def _key_width(self) -> int:
        """Of what is kept of a key: as it was turned, and as it was."""
        return self.head_dim if self.rotary is None else 2 * self.head_dim

    def state_bytes(self, batch: int, length: int) -> int:
        memory = self.num_kv_heads * (self.head_dim + 1) * self.head_dim * 4
        token = self.num_kv_heads * (self._key_width() + self.head_dim) * self.o_proj.weight.dtype.itemsize
        return batch * (memory + length % self.config.segment * (token + 1))  # and a byte of mask

    def flops(self, batch: int, length: int) -> int:
        weights = sum(p.weight.numel() for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        segment, dim = self.config.segment, self.head_dim
        complete, rest = divmod(length, segment)
        local = complete * visible_pairs(segment, None, 0) + visible_pairs(rest, None, 0)
        after_first, written = max(0, length - segment), complete * segment
        known = max(0, written - segment) if self.config.update == "delta" else 0
        memory = after_first * self.num_heads + (written + known) * self.num_kv_heads  # products of a vector with M
        return 2 * batch * (length * weights + 2 * local * self.num_heads * dim + memory * dim**2)


class SegmentState(KeyValueState):
    """Keys and values of the unfinished segment of each row."""

    def __init__(self, keys: Tensor, values: Tensor, segment: int) -> None:
        super().__init__(keys, values)
        self.segment = segment

    def forget_complete(self) -> None:
        """Drop the complete segments."""
        length = self["mask"].shape[1]
        if length < self.segment:
            return
        if self._padded:
            # Rows stand at different places in their segments: keep each column that any row still needs.
            rank = self["mask"].long().cumsum(1)
            unfinished = self["mask"] & (rank > rank[:, -1:] // self.segment * self.segment)
            self.update(mask=unfinished)
            needed = unfinished.any(0).nonzero().squeeze(1)
            self._map(lambda tensor: tensor.index_select(1, needed))
            self._padded = not bool(self["mask"].all())
        else:
            first = length // self.segment * self.segment
            self._map(lambda tensor: tensor[:, first:].clone())
