"""What the ops that carry a state `[B,H,K,V]` from chunk to chunk share: chunks in blocks, decays within them, and
products of `[chunks, heads, ...]` with fewer heads of q and k.

Shapes: G groups of q and k heads, H heads, M chunks (varlen.py lays them out: the rows of a batch run side by side, in
lanes), n chunks worked on together, C tokens in a chunk, K and V the head dims.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.ops.varlen import DocumentChunks, RowChunks, max_chunks

MAX_CHUNK = 64  # measured on CPU: 128 doubles the work within chunks and saves less between them
LOG2_E = math.log2(math.e)
BLOCK = 32  # chunks times heads worked on together: with 64 x 64 float32 each, half a megabyte


class HeadDecays:
    """What the log decays of the chunks come to: factors, all in [0, 1].

    into       `[M,H,C,1]`       from the chunk's start to each token, e^{c_i}
    out_of     `[M,H,C,1]`       from each token to the chunk's end, e^{c_C - c_j}
    whole      `[M,H,1,1]`       from its start to its end, in at least float32
    within()   `[n or 1,H,C,C]`  from token j to token i >= j, e^{c_i - c_j}, and 0 above the diagonal
    """

    def __init__(self, log_decay: Tensor, layout: RowChunks | DocumentChunks, dtype: torch.dtype) -> None:
        # Sums are of log2 decays: torch computes powers of two four times as fast as powers of e. They are float64,
        # because a difference of two float32 sums of strong decays has lost the weak ones between them.
        self.dtype, self.wide, self.tokens = dtype, torch.promote_types(dtype, torch.float32), layout.tokens
        self.steps = torch.arange(1, layout.chunk + 1, device=log_decay.device)
        self.distance = (self.steps[:, None] - self.steps).clamp(min=0)
        self.constant: Tensor | None = None
        if log_decay.dim() == 1:
            slope = log_decay.double()[:, None] * LOG2_E
            self.sums = slope * torch.minimum(self.steps, self.tokens[:, None])[:, None]
            self.constant = (slope[..., None] * self.distance).exp2().tril().to(dtype)[None]
        else:
            self.sums = layout.spread(log_decay[..., None])[..., 0].double().mul(LOG2_E).cumsum(-1)
        total = self.sums[..., -1:]
        self.whole = total.exp2().to(log_decay.dtype)[..., None]
        self.into = self.sums.exp2().to(dtype)[..., None]
        self.out_of = (total - self.sums).clamp(max=0).exp2().to(dtype)[..., None]

    def within(self, now: slice) -> Tensor:
        if self.constant is not None:
            return self.constant
        sums = self.sums[now]
        high = sums.to(self.wide)
        low = (sums - high).to(self.wide)
        within = high[..., :, None] - high[..., None, :]
        within += low[..., :, None]
        within -= low[..., None, :]
        return within.clamp_(max=0).exp2_().tril_().to(self.dtype)

    def new_gradient(self) -> Tensor:
        """Zeros for `add_gradient` to add to: `[H]`, or `[M,H,C]` in chunks."""
        shape = self.sums.shape[1:2] if self.constant is not None else self.sums.shape
        return self.sums.new_zeros(shape, dtype=self.wide)

    def add_gradient(
        self, total: Tensor, now: slice, pairs: Tensor, into: Tensor, out_of: Tensor, whole: Tensor
    ) -> None:
        """Add the gradient of log_decay from the chunks `now`: a token's is the sum over all that decayed across it.

        pairs   `[n,H,C,C]`  what token j gave token i of the same chunk
        into    `[n,H,C]`    what the entering state gave each token
        out_of  `[n,H,C]`    what each token gave the leaving state
        whole   `[n,H]`      what the entering state gave the leaving state

        Taking sums only of the terms concerned, never the difference of two larger sums, keeps the gradient of a
        strong decay, which is tiny, from drowning in rounding.
        """
        if self.constant is not None:
            tokens = self.tokens[now, None]
            steps_in = torch.minimum(self.steps, tokens)[:, None]
            total += (pairs.sum(0).to(self.wide) * self.distance).sum((-2, -1))
            total += (into * steps_in + out_of * (tokens[..., None] - steps_in)).sum((0, 2)) + (whole * tokens).sum(0)
            return
        earlier = pairs.new_ones(pairs.shape[-2:]).triu_(1)
        gradient = (pairs @ earlier).tril_().sum(-2).to(self.wide)
        gradient += into.flip(-1).cumsum(-1).flip(-1)
        gradient[..., 1:] += out_of.cumsum(-1)[..., :-1]
        gradient += whole[..., None]
        total[now] = gradient


def layout_of(v: Tensor, cu_seqlens: Tensor | None) -> RowChunks | DocumentChunks:
    batch, length = v.shape[:2]
    if cu_seqlens is None:
        return RowChunks(batch, length, MAX_CHUNK, v.device)
    return DocumentChunks(cu_seqlens, length, MAX_CHUNK)


def chunks_at_most(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """A bound on the layout's chunks that does not depend on where documents end."""
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.shape[0] * max_chunks(v.shape[1], documents, MAX_CHUNK)


def blocks(layout: RowChunks | DocumentChunks, heads: int) -> list[tuple[slice, range]]:
    """`(chunks, positions)` to work on together, in order."""
    step = max(1, BLOCK // max(1, heads * layout.lanes))
    ranges = (range(p, min(p + step, layout.positions)) for p in range(0, layout.positions, step))
    return [(slice(r.start * layout.lanes, r.stop * layout.lanes), r) for r in ranges]


def in_lanes(layout: RowChunks | DocumentChunks, positions: range, *tensors: Tensor) -> list[tuple[Any, ...]]:
    """`(position, views...)` of each position: of each tensor `[n,...]` the lanes there, `[lanes,...]`."""
    # Not split(lanes), which makes one piece where there are no lanes at all.
    views = (x.unflatten(0, (len(positions), layout.lanes)).unbind() for x in tensors)
    return list(zip(positions, *views, strict=True))


def chain_buffer(chunks: int, lanes: int, state: Tensor, at_end: bool = False) -> Tensor:
    """Room for the states before and after each position of so many chunks, `[n + lanes,H,K,V]`, with `state`
    `[...,H,K,V]` at one end."""
    buffer = state.new_empty(chunks + lanes, *state.shape[1:])
    end = buffer[-lanes:] if at_end else buffer[:lanes]
    if state.shape == end.shape:  # at the very first position the document's own comes in its place
        end.copy_(state)
    return buffer


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x `[n,G,...]`, each group's copy for every one of its heads times that head's factor `[n,H,...]`: `[n,H,...]`."""
    if x.shape[1] == factor.shape[1]:
        return x * factor
    out = x.new_empty(x.shape[0], factor.shape[1], *x.shape[2:])
    grouped = (x.shape[1], -1)
    torch.mul(x[:, :, None], factor.unflatten(1, grouped), out=out.unflatten(1, grouped))
    return out


def summed(x: Tensor, groups: int, out: Tensor | None = None) -> Tensor:
    """`[n,H,...]` to `[n,G,...]`, the sum over the heads of each group."""
    if x.shape[1] != groups:
        return torch.sum(x.unflatten(1, (groups, -1)), 2, out=out)
    return x if out is None else out.copy_(x)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The dot products over the last dimension of x `[n,G,...,K]` and y `[n,H,...,K]`, in at least float32."""
    # sum adds up in float32 whatever it returns; asked to return float32 it would copy its input first.
    return scaled(x, y).sum(-1).to(torch.promote_types(y.dtype, torch.float32))


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b of `[n,H,...]`; out is contiguous."""
    heads = a.shape[:2]
    out = None if out is None else out.flatten(0, 1)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out).unflatten(0, heads)


def add_matmul(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total += factor * a @ b; total is contiguous."""
    total.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=factor)
