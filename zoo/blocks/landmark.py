"""Landmark attention: blocks of tokens, each found through one token behind it (Mohtashami and Jaggi 2023,
arXiv:2305.16300, section 3).

The model puts a landmark token after every M tokens of its stream (zoo/models/landmarks.py). Query t, in block c, has
one softmax over its own block's tokens and the landmarks of the blocks before, and shares what a landmark gets among
that block's tokens:

    p = softmax(s_j : j <= t in block c, or j the landmark of a block b < c)          s_j = q_t . k_j / sqrt(D)
    o_t = sum_{j in c} p_j v_j + sum_{b < c} p_landmark(b) sum_{j in b} softmax_b(s)_j v_j            y = W_o (o)

With train_top_k, a query has only the landmarks of the train_top_k highest s in its softmax, chosen by every head for
itself, and reads no other block, in training too; positions are those of the text.

With top_k, a query that continues a state has only the top_k such landmarks. Positions are then stingy: the last top_k
blocks keep their distance, all older ones stand right before them, in one place. With i the place of a token within its
block,

    q_t stands (M + 1) min(c - b, top_k + 1) + i_t - i_j behind k_j

so that no rotation is larger than training has seen, however long the text. Keys are cached turned by i_j alone, and
a query is turned by the rest, once for each of the top_k + 2 distances.

B batch, T length, H query heads, K key/value heads, G = H/K, D head_dim, M block_size, N blocks, R top_k.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import ops
from zoo.blocks.attention import resolve_head_dim
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import in_projection, out_projection
from zoo.blocks.rope import RopeConfig, RotaryEmbedding
from zoo.blocks.state import KeyValueState, State
from zoo.blocks.storage import Storage
from zoo.ops.landmark_attention.choice import best_blocks
from zoo.ops.varlen import real_first
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

MAX_RETRIEVED = 2**22  # numbers of the keys that are read at once, while a long prompt is


@dataclass(frozen=True, kw_only=True)
class LandmarkConfig(MixerConfig):
    """Landmark attention: a query finds the blocks it reads through one landmark token behind each.

    num_heads     query heads.
    num_kv_heads  key and value heads (grouped-query attention); default num_heads.
    head_dim      default hidden_size / num_heads.
    rope          rotary positions, of the stream with its landmarks; null for none.
    block_size    tokens before each landmark; the same for all landmark mixers of a model.
    top_k         with a cache, how many blocks each head of a token reads, at stingy positions; default as without one.
    train_top_k   how many without a cache: in training and evaluation, which it makes sub-quadratic; default all.
    """

    num_heads: Size
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    block_size: Size = 50
    top_k: Size | None = None
    train_top_k: Size | None = None

    def resolve(self, model: ZooConfig) -> Self:
        head_dim = resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size)
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if self.num_heads % num_kv_heads:
            raise FieldError("num_kv_heads", f"must divide num_heads ({self.num_heads}), got {num_kv_heads}")
        rope = self.rope
        if rope is not None:
            if self.top_k is not None and rope.type == "longrope":
                problem = f"has no length to choose its factors by where top_k ({self.top_k}) blocks are read"
                raise FieldError("rope.type", f"longrope {problem}; choose another type or remove top_k")
            try:
                rope = rope.resolve(head_dim)
            except FieldError as error:
                raise error.within("rope") from None
        return replace(self, head_dim=head_dim, num_kv_heads=num_kv_heads, rope=rope)

    def landmark_blocks(self) -> dict[str, int]:
        return {"block_size": self.block_size}


class Landmark(Mixer):
    adapted = (("q_proj",), ("k_proj",), ("v_proj",))

    def __init__(self, config: LandmarkConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_kv_heads is not None, "resolve() fills them in"
        self.config = config
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.period = config.block_size + 1  # every so manieth token is a landmark
        inner, inner_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = in_projection(model, model.hidden_size, inner)
        self.k_proj = in_projection(model, model.hidden_size, inner_kv)
        self.v_proj = in_projection(model, model.hidden_size, inner_kv)
        self.o_proj = out_projection(model, inner)
        self.rotary = RotaryEmbedding(config.rope) if config.rope is not None else None

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if state is not None and context.cu_seqlens is not None:
            raise ValueError("landmark cannot continue a state with cu_seqlens; pad the rows instead of packing them")
        if state is not None and self.config.top_k is not None:
            return self.o_proj(self._retrieved(q, k, v, context.padding_mask, state).flatten(-2))
        if self.rotary is not None:
            q, k = self.rotary(q, k, context.position_ids, context.rotations)
        key_mask = context.padding_mask
        if state is not None:
            assert isinstance(state, KeyValueState), "new_state() makes one"
            k, v, key_mask = state.append(k, v, key_mask)
            k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast the state has the dtype of the weights
        place = SequenceContext.positions(k, key_mask, context.cu_seqlens) % self.period
        out = ops.landmark_attention(
            q,
            k,
            v,
            place == self.config.block_size,
            cu_seqlens=context.cu_seqlens,
            key_mask=key_mask,
            top_k=self.config.train_top_k,
        )
        return self.o_proj(out.flatten(-2))

    def _retrieved(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: State) -> Tensor:
        """Heads' outputs `[B, T, H, D]` of what each query reads of the state, which takes `k` and `v`."""
        assert isinstance(state, LandmarkState) and self.config.top_k is not None
        block_size = self.config.block_size
        rank = SequenceContext.positions(q, mask, None, state["mask"].sum(1))
        keys, _, mask = state.append(self._turned(k, rank % self.period), v, mask)
        # Where the tokens of a row are: column `columns[row, r]` has its r-th.
        columns = torch.arange(keys.shape[1], device=q.device).expand(keys.shape[:2])
        if mask is not None:
            columns = real_first(mask)
        landmarks = state.landmarks(columns[:, block_size :: self.period])
        landmarks = landmarks.to(torch.promote_types(q.dtype, torch.float32))
        of_heads = self.num_heads * min(self.config.top_k, landmarks.shape[1]) + self.num_kv_heads  # and the own block
        read = len(q) * of_heads * block_size * self.head_dim
        size = max(1, MAX_RETRIEVED // read)
        tiles = zip(q.split(size, 1), rank.split(size, 1), strict=True)
        outs = [self._read(q_tile, rank_tile, state, landmarks, columns) for q_tile, rank_tile in tiles]
        return torch.cat(outs, 1).to(q.dtype)

    def _read(self, q: Tensor, rank: Tensor, state: LandmarkState, landmarks: Tensor, columns: Tensor) -> Tensor:
        """Of queries `[B, T, H, D]` that stand at `rank` `[B, T]` in their rows; landmarks `[B, N, K, D]`."""
        assert self.config.top_k is not None
        batch, length, _, dim = q.shape
        size, scale, device = self.config.block_size, dim**-0.5, q.device
        wide = landmarks.dtype
        block, place = rank // self.period, rank % self.period
        count = landmarks.shape[1]
        far = min(self.config.top_k + 1, count)

        distances = torch.arange(far + 1, device=device)
        positions = (place[..., None] + self.period * distances).flatten(1)
        turned = self._turned(q.to(wide).repeat_interleave(far + 1, 1), positions)
        turned = turned.view(batch, length, far + 1, self.num_kv_heads, -1, dim) * scale  # [B, T, distance, K, G, D]

        # All landmarks as if they were far, then the near ones anew; `far` places before them spare a special case.
        scores = torch.einsum("btkgd,bnkd->btkgn", turned[:, :, far], landmarks)
        before = block[..., None] - distances[1:far]
        rows = torch.arange(batch, device=device).view(-1, 1, 1)
        near = torch.einsum("btekgd,btekd->btkge", turned[:, :, 1:far], landmarks[rows, before.clamp(min=0)])
        index = (before + far)[:, :, None, None].expand_as(near)
        scores = F.pad(scores, (far, 0)).scatter(-1, index, near)[..., far:]
        later = torch.arange(count, device=device) >= block[..., None]
        scores = scores.masked_fill(later[:, :, None, None], -torch.inf)
        scores, chosen = best_blocks(scores, min(self.config.top_k, count))  # [B, T, K, G, R]

        # The chosen blocks' tokens; a block chosen for want of others has no weight.
        distance = (block[..., None, None, None] - chosen).clamp(0, far)
        of_block = turned.permute(0, 1, 3, 4, 2, 5).gather(-2, distance[..., None].expand(*distance.shape, dim))
        rows = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1, 1)
        heads = torch.arange(self.num_kv_heads, device=device).view(-1, 1, 1, 1)
        places = torch.arange(size, device=device)
        there = columns[rows, chosen[..., None] * self.period + places]  # [B, T, K, G, R, M]
        inside = torch.einsum(
            "btkgrd,btkgrmd->btkgrm", of_block, state.read("keys", rows, there, heads).to(wide)
        ).softmax(-1)

        rows = rows[..., 0, 0, 0]
        here = (block[..., None] * self.period + places).clamp(max=columns.shape[1] - 1)
        here = columns[rows, here]  # [B, T, M]
        own = torch.einsum("btkgd,btmkd->btkgm", turned[:, :, 0], state.read("keys", rows, here).to(wide))
        own = own.masked_fill((places > place[..., None])[:, :, None, None], -torch.inf)
        p_chosen, p_own = torch.cat([scores, own], -1).softmax(-1).split([scores.shape[-1], size], -1)
        rows = rows[..., None, None, None]
        shared = p_chosen[..., None] * inside
        out = torch.einsum("btkgrm,btkgrmd->btkgd", shared, state.read("values", rows, there, heads).to(wide))
        out = out + torch.einsum("btkgm,btmkd->btkgd", p_own, state.read("values", rows[..., 0, 0, 0], here).to(wide))
        return out.flatten(2, 3)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rotary is None else self.rotary(x, x[:, :, :0], positions)[0]

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        empty = torch.empty(batch_size, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        if self.config.top_k is None:
            return KeyValueState(empty, empty.clone())
        return LandmarkState(empty, empty.clone(), self.period)

    def state_bytes(self, batch: int, length: int) -> int:
        keys_and_values = 2 * self.num_kv_heads * self.head_dim * self.o_proj.weight.dtype.itemsize
        return batch * length * (keys_and_values + 1)  # and a byte of mask

    def flops(self, batch: int, length: int) -> int:
        weights = sum(p.weight.numel() for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        size, top_k = self.config.block_size, self.config.train_top_k
        blocks, rest = divmod(length, self.period)
        read = blocks if top_k is None else min(top_k, blocks)

        def tokens(limit: int) -> int:
            """Earlier blocks, `limit` at most, summed over all tokens."""
            before = limit * (limit - 1) // 2 + limit * (blocks - limit)
            return self.period * before + rest * min(blocks, limit)

        # Of landmarks the logits, of the tokens of the blocks that are read, and of its own block, logits and values.
        own = blocks * (size * (size + 1) // 2 + size) + rest * (rest + 1) // 2
        products = tokens(blocks) + 2 * (size * tokens(read) + own)
        return 2 * batch * (length * weights + products * self.num_heads * self.head_dim)


class LandmarkState(KeyValueState):
    """As KeyValueState, read a few blocks at a time. Keys and values may be kept off the device, but for the landmarks:
    what a step reads is brought in. Results are the same to the last bit."""

    def __init__(self, keys: Tensor, values: Tensor, period: int) -> None:
        super().__init__(keys, values)
        self.period = period  # of landmarks
        self.storage: Storage | None = None
        self._resident: Tensor | None = None  # with a storage: the landmarks
        self._settled = 0  # how many of them no row will change

    def keep_in(self, place: str | Path) -> bool:
        self.storage = Storage(place)
        self._store()
        return True

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.storage is not None and (keys.requires_grad or values.requires_grad):
            raise ValueError("what is kept off the device has no gradient; run under torch.no_grad()")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.storage is None):
            return super().append(keys, values, mask)

    def read(self, name: str, rows: Tensor, columns: Tensor, *heads: Tensor) -> Tensor:
        """The named tensor at such rows, columns and heads, on their device."""
        tensor = self[name]
        index = (rows, columns, *heads)
        if self.storage is None:
            return tensor[index]
        return tensor[tuple(x.to(tensor.device) for x in index)].to(columns.device)

    def landmarks(self, columns: Tensor) -> Tensor:
        """The keys `[B, N, K, D]` at `columns` `[B, N]`, where the landmarks of each row are; anything where it has no
        such landmark yet."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        if self.storage is None:
            every = self["keys"][:, self.period - 1 :: self.period]  # in rows without padding, and no copy
            return self.read("keys", rows, columns) if self._padded else every
        resident = self.read("keys", rows, columns[:, self._settled :])
        if self._resident is not None:
            resident = torch.cat([self._resident[:, : self._settled], resident], 1)
        self._resident, self._settled = resident, int(self["mask"].sum(1).min()) // self.period
        return resident

    def to(self, device: torch.device | str) -> Self:
        if self.storage is None:
            return super().to(device)
        if self["mask"].device != torch.device(device):
            self.tensors["mask"] = self["mask"].to(device)
            self._buffers.pop("mask", None)
        if self._resident is not None:
            self._resident = self._resident.to(device)
        return self

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        self._store()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """In the storage too, if this one is."""
        twin = copy.copy(self)
        twin._map(torch.clone)
        return twin

    def reset(self) -> None:
        super().reset()
        self._store()

    def nbytes(self) -> int:
        """Bytes in use, without what is kept in the storage."""
        if self.storage is None:
            return super().nbytes()
        return self["mask"].nbytes + (0 if self._resident is None else self._resident.nbytes)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        resident, settled = self._resident, self._settled
        super()._map(function)
        self._store()
        if resident is not None:
            self._resident, self._settled = function(resident), settled

    def _store(self) -> None:
        """Keys and values, which may be anywhere, into the storage; the landmarks are read when they are needed."""
        self._resident, self._settled = None, 0
        if self.storage is not None:
            for name in ("keys", "values"):
                tensor = self[name]
                self._buffers[name] = self._allocate(tensor, tuple(tensor.shape), name)
                self.tensors[name] = self._buffers[name].copy_(tensor)

    def _allocate(self, like: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        if self.storage is None or name == "mask":
            return super()._allocate(like, shape, name)
        return self.storage.empty(shape, like.dtype)
