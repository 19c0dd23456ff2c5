"""What mixers share that attend to recent tokens in full and to older ones through slots: learned summaries of many
tokens each (compressive.py, linformer.py).

A query at position t of its row or document sees, in one softmax,

    the tokens `recent(t)` ... t                   keys and queries rotated
    of level i the slots `visible(t)[i]`           not rotated, nor the queries they are compared with

Slots of the first level are made of tokens, those of the next of slots, `made` of every `parts` in a row; a query
sees none that holds a token after it. Of what no later query sees, a state keeps nothing.

Rows of different lengths (packed documents, padded batches, states that have seen more or less) lie end to end,
`[N, heads, dim]`. How long they are is needed on the CPU: with documents, padding or a state, a call waits for the GPU.

B batch, T length, R rows, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from zoo import ops
from zoo.blocks.attention import resolve_head_dim
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import in_projection, out_projection
from zoo.blocks.rope import RopeConfig, RotaryEmbedding
from zoo.blocks.state import State
from zoo.ops.merging import merged
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

Position = TypeVar("Position", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class SlotConfig(MixerConfig):
    """Fields of these mixers.

    num_heads     query heads.
    num_kv_heads  key and value heads (grouped-query attention); default num_heads.
    head_dim      default hidden_size / num_heads.
    rope          rotary positions of the recent tokens; null for none.
    """

    num_heads: Size
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    rope: RopeConfig | None = field(default_factory=RopeConfig)

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


class Slots(NamedTuple):
    """The slots of all levels and rows, `[S, K, D]`; slot j of a level and row is the (`begin[level, row]` + j)-th."""

    keys: Tensor
    values: Tensor
    begin: Tensor


class SlotState(State):
    """What the next token of each row sees: `keys` `[B, C, K, D or 2 D]` (as turned, and as they were) and `values` of
    the recent tokens, `slot_keys` and `slot_values` `[B, S, K, D]` of one level after the other, and `seen` `[B]`, how
    many tokens there were, which says how many of each count; what is behind these is anything."""


class SlotMixer(Mixer):
    adapted = (("q_proj",), ("k_proj",), ("v_proj",))
    parts: int
    made: int
    block: int  # tokens, counted from a row's start, of which `recent` and `visible` are the same

    def __init__(self, config: SlotConfig, model: ZooConfig, layer_idx: int) -> None:
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

    @abstractmethod
    def recent(self, position: Position) -> Position:
        """The first token that a query there sees in full; tokens before it are in slots. It never falls."""

    @abstractmethod
    def visible(self, position: int) -> list[tuple[int, int]]:
        """Of each level, the first slot that a query there sees and the first it does not. They never fall; a slot
        before the first has no part in any that is yet to be made."""

    @abstractmethod
    def make(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, parts, K, D]` each to `[n, made, K, D]`."""

    @abstractmethod
    def see(
        self, slots: Slots, seen: list[int], ends: list[int], row: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(keys, values, first, stop)`: of each query at `position` `[N]` of `row` `[N]` an interval `[N]` of keys,
        which are its visible slots. Rows have positions `seen` to before `ends`."""

    @abstractmethod
    def making_flops(self, slots: int) -> int:
        """Multiplications, each with an addition, of as many slots."""

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        if state is not None and context.cu_seqlens is not None:
            kind = type(self).__name__.lower()
            raise ValueError(f"{kind} cannot continue a state with cu_seqlens; pad the rows instead of packing them")
        plain, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = plain
        if self.rotary is not None:
            q, turned = self.rotary(plain, k, context.position_ids, context.rotations)
            k = torch.cat([turned, k], -1)
        counts = _lengths(context)
        if sum(counts) == 0:
            return torch.zeros_like(x)
        q, plain, k, v = (context.pack(each)[0].flatten(0, 1) for each in (q, plain, k, v))

        seen = [0] * len(counts) if state is None else state["seen"].tolist()
        ends = [before + count for before, count in zip(seen, counts, strict=True)]
        starts = [self.recent(before) for before in seen]
        kept = [before - start for before, start in zip(seen, starts, strict=True)]
        if state is not None:
            k, v = _joined(state["keys"], kept, k, counts), _joined(state["values"], kept, v, counts)
        lengths = [before + count for before, count in zip(kept, counts, strict=True)]
        begin = [offset - start for offset, start in zip(offsets_of(lengths), starts, strict=True)]

        row, index = places_of(counts, x.device)
        position = index + torch.tensor(seen, device=x.device)[row]
        shift = torch.tensor(begin, device=x.device)[row]
        first, stop = self.recent(position) + shift, position + shift + 1
        last = ends if state is not None else [max(0, end - 1) for end in ends]
        slots = self._slots(state, k[..., -self.head_dim :], v, begin, seen, last)
        out, lse = _attend(q, k[..., : self.head_dim], v, first, stop)
        if slots is not None:
            out, _ = merged(out, lse, *_attend(plain, *self.see(slots, seen, ends, row, position)))
        elif torch.is_grad_enabled():
            # Who makes slots gets a gradient (0) all the same: data parallel training waits for each.
            none = k.new_empty(0, self.parts, self.num_kv_heads, self.head_dim)
            out = out + sum(each.sum() for each in self.make(none, none))
        if state is not None:
            self._keep(state, k, v, slots, begin, seen, ends)
        out = out.to(q.dtype)
        out = context.unpack(out) if context.padding_mask is not None else out.unflatten(1, x.shape[:2])[0]
        return self.o_proj(out.flatten(-2))

    def _slots(
        self, state: State | None, k: Tensor, v: Tensor, begin: list[int], seen: list[int], last: list[int]
    ) -> Slots | None:
        """All slots that queries from `seen` to `last` see; None if there is none. Token j of row r is the (begin[r] +
        j)-th of k and v."""
        before, after = [self.visible(n) for n in seen], [self.visible(n) for n in last]
        keys, values, begins, total = [], [], [], 0
        size = 0 if state is None else state["slot_keys"].shape[1]
        cursor = [row * size for row in range(len(seen))]  # the next slot of each row in the state
        for level in range(max([len(each) for each in after])):
            firsts, middles = ([each[level][i] if level < len(each) else 0 for each in before] for i in (0, 1))
            stops = [each[level][1] if level < len(each) else 0 for each in after]
            kept = [middle - first for first, middle in zip(firsts, middles, strict=True)]
            new = [stop - middle for middle, stop in zip(middles, stops, strict=True)]
            sources = [b + m // self.made * self.parts for b, m in zip(begin, middles, strict=True)]
            needed = [n // self.made * self.parts for n in new]
            k, v = (_take(each, sources, needed).unflatten(0, (-1, self.parts)) for each in (k, v))
            k, v = (each.flatten(0, 1) for each in self.make(k, v))
            if state is not None:
                k = _joined(state["slot_keys"], kept, k, new, cursor)
                v = _joined(state["slot_values"], kept, v, new, cursor)
            cursor = [c + n for c, n in zip(cursor, kept, strict=True)]
            offsets = offsets_of([a + b for a, b in zip(kept, new, strict=True)])
            begin = [offset - first for offset, first in zip(offsets, firsts, strict=True)]
            begins.append([total + each for each in begin])
            total += len(k)
            keys.append(k)
            values.append(v)
        if total == 0:
            return None
        return Slots(torch.cat(keys), torch.cat(values), torch.tensor(begins, device=k.device))

    def _keep(
        self,
        state: State,
        k: Tensor,
        v: Tensor,
        slots: Slots | None,
        begin: list[int],
        seen: list[int],
        ends: list[int],
    ) -> None:
        """What a query at `ends` sees."""
        starts = [self.recent(end) for end in ends]
        kept = [end - start for end, start in zip(ends, starts, strict=True)]
        sources = [start + b for start, b in zip(starts, begin, strict=True)]
        dtype = state["keys"].dtype  # under autocast that of the weights
        state.update(
            keys=_dense(k, sources, kept).to(dtype),
            values=_dense(v, sources, kept).to(dtype),
            seen=torch.tensor(ends, device=k.device),
        )
        after = [self.visible(end) for end in ends]
        if slots is None or after == [self.visible(before) for before in seen]:
            return
        begins = slots.begin.tolist()
        sources = [begins[i][row] + first for row, each in enumerate(after) for i, (first, _) in enumerate(each)]
        lengths = [stop - first for each in after for first, stop in each]
        whole = [sum(stop - first for first, stop in each) for each in after]
        state.update(
            slot_keys=_dense(_take(slots.keys, sources, lengths), offsets_of(whole), whole).to(dtype),
            slot_values=_dense(_take(slots.values, sources, lengths), offsets_of(whole), whole).to(dtype),
        )

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        def empty(width: int) -> Tensor:
            return torch.empty(batch_size, 0, self.num_kv_heads, width, device=device, dtype=dtype)

        return SlotState(
            keys=empty(self._key_width()),
            values=empty(self.head_dim),
            slot_keys=empty(self.head_dim),
            slot_values=empty(self.head_dim),
            seen=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def _key_width(self) -> int:
        """Of what is kept of a token's key: as it was turned, and as it was."""
        return self.head_dim if self.rotary is None else 2 * self.head_dim

    def state_bytes(self, batch: int, length: int) -> int:
        tokens = (length - self.recent(length)) * (self._key_width() + self.head_dim)
        slots = sum(stop - first for first, stop in self.visible(length)) * 2 * self.head_dim
        return batch * ((tokens + slots) * self.num_kv_heads * self.o_proj.weight.dtype.itemsize + 8)  # and the count

    def flops(self, batch: int, length: int) -> int:
        total = length * sum(p.weight.numel() for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        total += sum(self.making_flops(stop) for _, stop in self.visible(length - 1))
        seen, start = 0, 0
        while start < length:
            end = min(start + self.block, length)
            slots = sum(stop - first for first, stop in self.visible(start))
            n = end - start
            seen += n * (start - self.recent(start) + slots) + n * (n + 1) // 2
            start = end
        return 2 * batch * (total + 2 * seen * self.num_heads * self.head_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = ops.interval_attention(q[None], k[None], v[None], first[None], stop[None], return_lse=True)
    return out, lse


def _lengths(context: SequenceContext) -> list[int]:
    """How many tokens each row or document has."""
    bounds = context.cu_seqlens if context.row_offsets is None else context.row_offsets
    if bounds is not None:
        lengths: list[int] = bounds.diff().tolist()
        return lengths
    batch, length = context.position_ids.shape
    return [length] * batch


def offsets_of(lengths: list[int]) -> list[int]:
    """Where each row begins."""
    return [0, *accumulate(lengths)][:-1]


def places_of(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each item, its row and its place there."""
    total = sum(lengths)
    counts = torch.tensor(lengths, device=device)
    row = torch.arange(len(lengths), device=device).repeat_interleave(counts, output_size=total)
    return row, torch.arange(total, device=device) - (counts.cumsum(0) - counts)[row]


def _take(x: Tensor, starts: list[int], lengths: list[int]) -> Tensor:
    """Stretches of x `[N, ...]`, end to end."""
    parts = [(start, length) for start, length in zip(starts, lengths, strict=True) if length]
    begun = parts[0][0] if parts else 0
    total = sum(lengths)
    if [start for start, _ in parts] == [begun + offset for offset in offsets_of([length for _, length in parts])]:
        return x[begun : begun + total]
    row, index = places_of(lengths, x.device)
    return x.index_select(0, index + torch.tensor(starts, device=x.device)[row])


def _joined(
    kept: Tensor, kept_lengths: list[int], new: Tensor, new_lengths: list[int], starts: list[int] | None = None
) -> Tensor:
    """Of each row its items in `kept` `[R, C, ...]`, which begin at `starts` in `kept.flatten(0, 1)` (by default the
    row's first), and then its new ones, of `[N, ...]`; end to end."""
    rows, size = kept.shape[:2]
    starts = [row * size for row in range(rows)] if starts is None else starts
    both = torch.cat([kept.flatten(0, 1).to(new.dtype), new])
    later = [rows * size + offset for offset in offsets_of(new_lengths)]
    pairs = zip(zip(starts, kept_lengths, strict=True), zip(later, new_lengths, strict=True), strict=True)
    stretches = [stretch for pair in pairs for stretch in pair]
    return _take(both, [start for start, _ in stretches], [length for _, length in stretches])


def _dense(x: Tensor, starts: list[int], lengths: list[int]) -> Tensor:
    """Stretches of x `[N, ...]` as `[R, longest, ...]`; behind the end of a shorter one is anything."""
    longest = max(lengths)
    index = torch.arange(longest, device=x.device) + torch.tensor(starts, device=x.device)[:, None]
    index = index.clamp(max=max(0, len(x) - 1))
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)
