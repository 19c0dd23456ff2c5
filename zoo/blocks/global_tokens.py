"""Global tokens: keys that every later query sees however far away, chosen by the id of their input token (Longformer,
arXiv:2004.05150, section 3.1, in causal form).

A token's place is its rank among the real tokens of its row (packed: its column). The global keys stand side by side in
the order of their places, so that those older than a query's window, and of its document, are an interval of them:

    o_t = c_t attention(q_t, window and sinks) + (1 - c_t) attention(q_t, global keys from first_t to before stop_t)

where c_t is the window's share of the softmax. A landmark, padding and a sink are never global.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo import ops
from zoo.blocks.context import SequenceContext
from zoo.blocks.parallel import ParallelState
from zoo.blocks.state import KeyValueState, State
from zoo.ops.varlen import document_ids

NOWHERE = 2**62  # the place of no token: after all


class GlobalKeys(NamedTuple):
    """The global keys first, in order, then others: keys, values `[batch, slots, num_kv_heads, head_dim]`, and their
    places `[batch, slots]` int64, NOWHERE for the others."""

    keys: Tensor
    values: Tensor
    places: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, places: Tensor) -> GlobalKeys:
        """In order, from keys in any."""
        places, order = places.sort(dim=1, stable=True)
        index = order[..., None, None].expand(-1, -1, *keys.shape[2:])
        return cls(keys.gather(1, index), values.gather(1, index), places)


class GlobalTokensState(State):
    """`keys`, `values`, `places` of the global tokens so far, as GlobalKeys has them, and `seen` `[batch]` int64, how
    many real tokens each row had."""

    def __init__(self, keys: Tensor) -> None:
        places = keys.new_empty(keys.shape[:2], dtype=torch.long)
        seen = keys.new_zeros(keys.shape[0], dtype=torch.long)
        super().__init__(keys=keys, values=keys.clone(), places=places, seen=seen)

    def append(self, new: GlobalKeys, tokens: Tensor | int) -> GlobalKeys:
        """Add those of a chunk of so many real tokens; returns all."""
        self.update(seen=self["seen"] + tokens)
        if count := int((new.places < NOWHERE).sum(1).max()):
            both = [torch.cat([self[name], x[:, :count].to(self[name].dtype)], 1) for name, x in new._asdict().items()]
            keys, values, places = GlobalKeys.of(*both)
            count = int((places < NOWHERE).sum(1).max())
            self.update(keys=keys[:, :count], values=values[:, :count], places=places[:, :count].contiguous())
        return GlobalKeys(self["keys"], self["values"], self["places"])


class WindowAndGlobalState(ParallelState):
    """The keys and values of the window and its sinks, and those of the global tokens."""

    def __init__(self, window: KeyValueState, global_tokens: GlobalTokensState) -> None:
        super().__init__([window, global_tokens])
        self.window, self.global_tokens = window, global_tokens


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_global: Tensor,
    context: SequenceContext,
    state: GlobalTokensState | None,
    *,
    window: int,
    num_sinks: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of the queries of a chunk towards the global keys that are older than their windows.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k, v: `[batch, length, num_kv_heads, head_dim]`, the chunk's own.
        is_global: bool `[batch, length]`.
        state: of the chunks before; it takes this one's.
    """
    batch, length = q.shape[:2]
    mask, start = context.padding_mask, None
    places = torch.arange(length, device=q.device).expand(batch, -1)
    if mask is not None:
        places = (mask.long().cumsum(1) - 1).masked_fill(~mask, -1)
        is_global = is_global & mask
    if state is not None:
        places = places + state["seen"][:, None]
        if mask is not None:
            places = places.masked_fill(~mask, -1)
    if context.cu_seqlens is not None:
        start = context.cu_seqlens.long()[document_ids(context.cu_seqlens, length)][None]
    is_global = is_global & (places - (0 if start is None else start) >= num_sinks)
    found = GlobalKeys.of(k, v, places.masked_fill(~is_global, NOWHERE))
    if state is not None:
        found = state.append(found, length if mask is None else mask.sum(1))
        found = found._replace(keys=found.keys.to(k.dtype), values=found.values.to(v.dtype))
    stop = torch.searchsorted(found.places, (places - window).contiguous(), right=True)
    first = torch.zeros_like(stop) if start is None else torch.searchsorted(found.places, start.contiguous())
    return ops.interval_attention(q, found.keys, found.values, first, stop, scale=scale, return_lse=True)


def merge(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of one softmax over the keys of both, each `(out, lse)` of its own; `far` may have seen nothing."""
    (out, lse), (other, other_lse) = near, far
    is_empty = other_lse == -torch.inf
    a, b = lse.masked_fill(is_empty, 0), other_lse.masked_fill(is_empty, 0)
    share = torch.where(is_empty, 1, (a - b).sigmoid())[..., None]
    out = (share * out + (1 - share) * other).to(out.dtype)
    return out, torch.where(is_empty, lse, torch.logaddexp(a, b))
