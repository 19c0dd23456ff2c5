"""Hierarchical sparse attention: Native Sparse Attention (NSA, Yuan et al. 2025, arXiv:2502.11089, section 3), and with
`compress: null`, `window: null` Mixture of Block Attention (MoBA, Lu et al. 2025, arXiv:2502.13189, section 2).

Three tiers, each with keys and values of its own and the same queries, are added up as every head's gates say:

    o_t = sum_c sigmoid(W_c x_t) attend(q_t, K_c, V_c)         c: window, compress, select
    window    the last w tokens
    compress  phi(k_(i d) ... k_(i d + l - 1)), i = 0, 1, ... of the blocks that end at or before t; values alike
    select    in full, the n blocks of l' tokens with the highest score, of them the first and the last two always

    p_i = softmax_i(s * q_t . phi(k)_i),    score_j = sum over a group's heads and over i of p_i |i in j| / d

|i in j| counts the tokens of compressed block i that lie in selected block j: for l'/d = 4 and l/d = 2 compressed
blocks 4j-1 ... 4j+3 with weights 1, 2, 2, 2, 1 (equation 9, whose indices are off by one from 0). phi is the mean, the
last token, or W_2 SiLU(W_1 [k_i + e_i]) of a block's tokens side by side, e a vector for each place in it. Queries and
keys are rotated in the window and the selected blocks; compressed keys are not, nor what is compared with them.

MoBA has the last tier alone, without a gate; a block's score is that of the mean of its keys (rotated), without a
gradient, and the query's own block counts among the n.

B batch, T length, H query heads, K key/value heads, D head_dim, C compressed blocks, l, d, l' as above.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
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
from zoo.ops.varlen import document_ids, real_first
from zoo.schema import Count, FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(MixerConfig):
    """Sparse attention in three tiers: a window, a compressed view of everything, the best blocks in full.

    num_heads        query heads.
    num_kv_heads     key and value heads, whose query heads choose blocks together; default num_heads.
    head_dim         default hidden_size / num_heads.
    rope             rotary positions; null for none.
    window           tokens of the window, the query's own included; null for no such tier.
    compress         how a block becomes one key: mlp, mean or stride (its last token); null for no such tier: blocks
                     are then chosen by the means of their keys (MoBA).
    compress_block   tokens of a compressed block; default 32.
    compress_stride  tokens from one to the next; default 16.
    select_block     tokens of a block to choose.
    top_n            how many blocks a query sees in full, those always chosen included.
    first_blocks     blocks at the document's start that are always chosen.
    local_blocks     blocks up to the query's own that are always chosen.
    select_window    tokens, in whole blocks, the query's own included, beyond which no other is chosen; null for all.
    """

    num_heads: Size
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    window: Size | None = 512
    compress: Literal["mlp", "mean", "stride"] | None = "mlp"
    compress_block: Size | None = None
    compress_stride: Size | None = None
    select_block: Size = 64
    top_n: Size = 16
    first_blocks: Count = 1
    local_blocks: Size = 2
    select_window: Size | None = None

    def resolve(self, model: ZooConfig) -> Self:
        head_dim = resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size)
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if self.num_heads % num_kv_heads:
            raise FieldError("num_kv_heads", f"must divide num_heads ({self.num_heads}), got {num_kv_heads}")
        block, stride = self.compress_block, self.compress_stride
        if self.compress is None:
            for name in ("compress_block", "compress_stride"):
                if getattr(self, name) is not None:
                    raise FieldError(name, "has no use with compress: null; remove it, or choose how to compress")
        else:
            block, stride = 32 if block is None else block, 16 if stride is None else stride
            for name, size in (("compress_block", block), ("select_block", self.select_block)):
                if size % stride:
                    raise FieldError(name, f"must be a multiple of compress_stride ({stride}), got {size}")
            if self.select_block < block:
                raise FieldError("select_block", f"must be at least compress_block ({block}), got {self.select_block}")
        forced = self.first_blocks + self.local_blocks
        if self.top_n < forced:
            always = f"{forced} blocks are always chosen (first_blocks {self.first_blocks}, local_blocks"
            raise FieldError("top_n", f"must be at least {forced}, as {always} {self.local_blocks}), got {self.top_n}")
        if self.select_window is not None:
            if self.select_window % self.select_block:
                must = f"must be a multiple of select_block ({self.select_block})"
                raise FieldError("select_window", f"{must}, got {self.select_window}")
            within = self.select_window // self.select_block
            if self.top_n > within + self.first_blocks:
                most = f"must be at most {within + self.first_blocks}, the blocks there are to choose from (those of"
                always = f"select_window {self.select_window} and first_blocks {self.first_blocks})"
                raise FieldError("top_n", f"{most} {always}, got {self.top_n}")
        rope = self.rope
        if rope is not None:
            try:
                rope = rope.resolve(head_dim)
            except FieldError as error:
                raise error.within("rope") from None
        return replace(
            self,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            rope=rope,
            compress_block=block,
            compress_stride=stride,
        )

    @property
    def tiers(self) -> list[str]:
        """Those there are, in the order of their projections and gates."""
        has = {"window": self.window is not None, "compress": self.compress is not None, "select": True}
        return [name for name, there in has.items() if there]

    @property
    def recent_blocks(self) -> int | None:
        """How many of the last blocks there are to choose from; None for all."""
        return None if self.select_window is None else self.select_window // self.select_block

    @property
    def compressed(self) -> tuple[int, int]:
        """Tokens of a compressed block, and from one to the next."""
        return self.compress_block or self.select_block, self.compress_stride or self.select_block


class Compressor(nn.Module):
    """phi: a block of keys (or values) becomes one."""

    def __init__(self, config: HierarchicalConfig, model: ZooConfig) -> None:
        super().__init__()
        assert config.head_dim is not None and config.compress_block is not None, "resolve() fills them in"
        self.how, self.std, size = config.compress, model.initializer_range, config.compress_block * config.head_dim
        if self.how == "mlp":
            self.positions = nn.Parameter(torch.empty(config.compress_block, config.head_dim))
            self.up_proj = in_projection(model, size, 4 * config.head_dim)
            self.down_proj = in_projection(model, 4 * config.head_dim, config.head_dim)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.how == "mlp":
            init.normal_(self.positions, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[B, C, l, K, D]` to `[B, C, K, D]`."""
        if self.how == "mean":
            return x.mean(2)
        if self.how == "stride":
            return x[:, :, -1]
        x = (x + self.positions[:, None]).transpose(2, 3).flatten(-2)
        return self.down_proj(F.silu(self.up_proj(x)))


class UnfinishedState(KeyValueState):
    """Keys and values of the tokens that a compressed block yet to come needs."""

    def drop(self, counts: Tensor | int) -> None:
        """Forget so many of the first real tokens, of every row or of each its own number `[batch]`."""
        if isinstance(counts, int) and not self._padded:
            if counts:
                self._map(lambda tensor: tensor[:, counts:].clone())
            return
        mask = self["mask"]
        if isinstance(counts, Tensor):
            counts = counts[:, None]
        mask = mask & (mask.long().cumsum(1) > counts)
        self.update(mask=mask)
        needed = mask.any(0).nonzero().squeeze(1)
        self._map(lambda tensor: tensor.index_select(1, needed))
        self._padded = not bool(self["mask"].all())


class CompressedState(KeyValueState):
    """Keys and values of the compressed blocks, in each row one after the other, and then what is none."""

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if mask is None and not self._padded:
            return super().append(keys, values, mask)
        if keys.shape[1]:
            # Rows complete their blocks at different steps: a column for each step would be a hole in the others.
            mask = keys.new_ones(keys.shape[:2], dtype=torch.bool) if mask is None else mask
            before, (rows, columns) = self["mask"].sum(1), mask.nonzero(as_tuple=True)
            grow = int((before + mask.sum(1)).max()) - self["mask"].shape[1]
            for name, new in (("keys", keys), ("values", values), ("mask", mask)):
                past = self[name]
                whole = F.pad(past, (*[0, 0] * (past.dim() - 2), 0, grow))
                whole[rows, before[rows] + columns] = new[rows, columns].to(past.dtype)
                self.update(**{name: whole})
            self._buffers, self._padded = {}, True
        return self["keys"], self["values"], self["mask"]


class HierarchicalState(ParallelState):
    """The keys and values of the tokens to choose from and of the window, of the compressed blocks, and of the tokens
    of the block that is not complete yet."""

    def __init__(self, by_name: dict[str, KeyValueState]) -> None:
        super().__init__(list(by_name.values()))
        self.by_name = by_name


class Hierarchical(Mixer):
    adapted = (("q_proj",), ("k_proj",), ("v_proj",), ("gate_proj",))

    def __init__(self, config: HierarchicalConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_kv_heads is not None, "resolve() fills them in"
        self.config = config
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, inner, inner_kv = model.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        tiers = len(config.tiers)
        self.q_proj = in_projection(model, hidden, inner)
        self.k_proj = in_projection(model, hidden, tiers * inner_kv)  # the tiers one after the other
        self.v_proj = in_projection(model, hidden, tiers * inner_kv)
        self.gate_proj = in_projection(model, hidden, tiers * self.num_heads) if tiers > 1 else None
        self.o_proj = out_projection(model, inner)
        self.rotary = RotaryEmbedding(config.rope) if config.rope is not None else None
        self.compress_k = Compressor(config, model) if config.compress is not None else None
        self.compress_v = Compressor(config, model) if config.compress is not None else None

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        states: dict[str, KeyValueState] = {}
        if state is not None:
            if context.cu_seqlens is not None:
                raise ValueError(
                    "hierarchical cannot continue a state with cu_seqlens; pad the rows instead of packing them"
                )
            assert isinstance(state, HierarchicalState), "new_state() makes one"
            states = state.by_name
        cu_seqlens, tiers = context.cu_seqlens, self.config.tiers
        plain = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        sizes = len(tiers), self.num_kv_heads, self.head_dim
        k, v = (dict(zip(tiers, p(x).unflatten(-1, sizes).unbind(2), strict=True)) for p in (self.k_proj, self.v_proj))
        q = plain
        if self.rotary is not None:
            turning = [tier for tier in tiers if tier != "compress"]
            joined = torch.cat([k[tier] for tier in turning], 2)
            q, joined = self.rotary(plain, joined, context.position_ids, context.rotations)
            k |= zip(turning, joined.split(self.num_kv_heads, 2), strict=True)
        outs = {}
        if "window" in tiers:
            keys, values, mask = _append(states.get("window"), k["window"], v["window"], context.padding_mask)
            outs["window"] = ops.softmax_attention(
                q, keys, values, window=self.config.window, cu_seqlens=cu_seqlens, key_mask=mask
            )
        keys, values, mask = _append(states.get("select"), k["select"], v["select"], context.padding_mask)
        position = _positions(keys.shape[1], mask, context)
        if "compress" in tiers:
            chooser = plain
            short_k, short_v, first = self._compressed(states, k["compress"], v["compress"], context)
            visible = self._blocks_within(position + 1)
            outs["compress"], lse = ops.interval_attention(
                chooser, short_k, short_v, first, first + visible, return_lse=True
            )
        else:
            chooser, lse = q, None
            short_k, _, first = self._compressed(states, k["select"].detach(), v["select"][..., :0], context)
        chosen = ops.select_blocks(
            chooser,
            short_k,
            first,
            position,
            compress_block=self.config.compressed[0],
            compress_stride=self.config.compressed[1],
            select_block=self.config.select_block,
            top_n=self.config.top_n,
            first_blocks=self.config.first_blocks,
            local_blocks=self.config.local_blocks,
            recent_blocks=self.config.recent_blocks,
            lse=lse,
        )
        outs["select"] = ops.block_sparse_attention(
            q, keys, values, chosen, block_size=self.config.select_block, cu_seqlens=cu_seqlens, key_mask=mask
        )
        if self.gate_proj is None:
            return self.o_proj(outs["select"].flatten(-2))
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (len(tiers), self.num_heads)).unbind(2)
        gated = [gate[..., None] * outs[tier] for gate, tier in zip(gates, tiers, strict=True)]
        return self.o_proj(torch.stack(gated).sum(0).flatten(-2))

    def _compressed(
        self, states: dict[str, KeyValueState], k: Tensor, v: Tensor, context: SequenceContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all compressed blocks `[B, C, K, D]`, those of a padded row before what is none, those of
        a document after those of the one before; and `[B, T]` the first one of each query's document."""
        size, stride = self.config.compressed
        k, v, mask = _append(states.get("unfinished"), k, v, context.padding_mask)
        first, there = torch.zeros_like(context.position_ids), None
        inside = torch.arange(size, device=k.device)
        if context.cu_seqlens is not None:
            bounds = context.cu_seqlens.long()
            counts = self._blocks_within(bounds.diff())
            base = counts.cumsum(0) - counts
            document = torch.arange(len(counts), device=k.device).repeat_interleave(counts)
            begins = bounds[document] + (torch.arange(len(document), device=k.device) - base[document]) * stride
            tokens = (begins[:, None] + inside)[None]
            first = base[document_ids(context.cu_seqlens, k.shape[1])][None]
        elif mask is None:
            count = max(0, (k.shape[1] - size + stride) // stride)
            tokens = (torch.arange(count, device=k.device)[:, None] * stride + inside).expand(k.shape[0], -1, -1)
        else:
            counts = self._blocks_within(mask.sum(1))
            index = torch.arange(int(counts.max()), device=k.device)
            tokens = real_first(mask)[:, (index[:, None] * stride + inside).clamp(max=k.shape[1] - 1)]
            there = index < counts[:, None]
        short_k, short_v = _take(k, tokens), _take(v, tokens)
        if self.compress_k is not None and self.compress_v is not None:
            short_k, short_v = self.compress_k(short_k), self.compress_v(short_v)
        else:
            short_k, short_v = short_k.mean(2), short_v[:, :, 0]
        if states:
            unfinished = states["unfinished"]
            assert isinstance(unfinished, UnfinishedState), "new_state() makes one"
            unfinished.drop(tokens.shape[1] * stride if there is None else counts * stride)
            short_k, short_v, _ = _append(states["compressed"], short_k, short_v, there)
        return short_k, short_v, first

    def _blocks_within(self, tokens: Tensor) -> Tensor:
        """How many compressed blocks so many tokens complete."""
        size, stride = self.config.compressed
        return ((tokens - size + stride) // stride).clamp(min=0)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        k = torch.empty(batch_size, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        short_v = k if self.compress_v is not None else k[..., :0]
        states = {
            "unfinished": UnfinishedState(k.clone(), short_v.clone()),
            "compressed": CompressedState(k.clone(), short_v.clone()),
            "select": KeyValueState(k.clone(), k.clone()),
        }
        if self.config.window is not None:
            states["window"] = KeyValueState(k.clone(), k.clone(), self.config.window)
        return HierarchicalState(states)

    def state_bytes(self, batch: int, length: int) -> int:
        size, stride = self.config.compressed
        count = max(0, (length - size + stride) // stride)
        both = 2 * self.num_kv_heads * self.head_dim * self.o_proj.weight.dtype.itemsize + 1  # and a byte of mask
        short = both if self.compress_v is not None else both // 2 + 1
        window = 0 if self.config.window is None else min(length, self.config.window - 1)
        return batch * ((count + length - count * stride) * short + (length + window) * both)

    def flops(self, batch: int, length: int) -> int:
        size, stride = self.config.compressed
        count = max(0, (length - size + stride) // stride)
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj)
        total = length * sum(p.weight.numel() for p in projections if p is not None)
        for phi in (self.compress_k, self.compress_v):
            if phi is not None and phi.how == "mlp":
                total += count * self.num_kv_heads * (phi.up_proj.weight.numel() + phi.down_proj.weight.numel())
        inner = self.num_heads * self.head_dim
        seen = count * (length - size + 1) - stride * count * (count - 1) // 2  # by all queries
        total += (3 if self.compress_k is not None else 1) * seen * inner  # the choice compares once more
        if self.config.window is not None:
            total += 2 * visible_pairs(length, self.config.window, 0) * inner
        block, most = self.config.select_block, self.config.top_n
        full, rest = divmod(length, block)
        few = min(full, most)
        earlier = block * (few * (few - 1) // 2 + (full - few) * (most - 1)) + rest * min(most - 1, full)
        chosen = block * earlier + full * (block * (block + 1) // 2) + rest * (rest + 1) // 2
        return 2 * batch * (total + 2 * chosen * inner)


def _append(
    state: KeyValueState | None, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All keys and values there are, and which of them are real (None for all)."""
    if state is None:
        return k, v, mask
    keys, values, mask = state.append(k, v, mask)
    return keys.to(k.dtype), values.to(v.dtype), mask  # under autocast the state has the dtype of the weights


def _positions(length: int, mask: Tensor | None, context: SequenceContext) -> Tensor:
    """`[B, T]`: where the queries, the last of `length` tokens, stand in their document or among their row's real
    tokens; -1 at padding. A position id is no index: it may be given."""
    batch, queries = context.position_ids.shape
    if mask is not None:
        before, own = mask.split([length - queries, queries], 1)
        return (own.cumsum(1) + (before.sum(1, keepdim=True) - 1)).masked_fill(~own, -1)
    index = torch.arange(length - queries, length, device=context.position_ids.device)
    if context.cu_seqlens is not None:
        index = index - context.cu_seqlens[document_ids(context.cu_seqlens, length)]
    return index.expand(batch, -1)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """`x` `[B, L, K, D]` at `tokens` `[B, C, l]`: `[B, C, l, K, D]`."""
    rows = tokens + torch.arange(x.shape[0], device=x.device)[:, None, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, tokens.shape)
