"""Landmark attention in tiles of queries, each against the blocks before it: memory is linear in the length.

The grouped softmax is one softmax over blocks. With a_j = exp(s_j - L_b) the softmax within block b and L_b its
log-sum-exp over the keys up to the query,

    pi = softmax_b(z_b),   z_b = s_landmark(b) of an earlier block, L_b of the query's own;   P_j = pi_b a_j,   O = P V

for an own key's share of the one softmax is exp(s_j) / Z = (exp(L_b) / Z) a_j. The backward computes P again and keeps
nothing of the length squared. With dP = dO V^T, e_b = sum_{j in b} P_j dP_j and D = sum_b e_b,

    dV = P^T dO,   ds_j = P_j (dP_j - c_b),   c_b = e_b / pi_b of an earlier block, D of the own
    ds_landmark(b) = e_b - pi_b D

Ordinary keys are laid out in pieces of equal width, a long block in several, a short one with empty slots: whatever the
sizes of the blocks, at most about twice as many slots as keys.

Legend: b batch, T queries, S keys, K kv heads, G query heads per kv head, D head_dim, n blocks, P pieces, w slots of a
piece. "Rows" are the queries of one kv head, `[b*K, T*G, D]`, the G queries of a token side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.dispatch import implements, outside_autocast
from zoo.ops.landmark_attention import chosen

MAX_LOGITS = 2**18  # the most logits held at once, as of softmax_attention
MAX_QUERIES = 128  # tokens in a tile: a longer one computes more logits that are hidden


@implements("landmark_attention", "torch")
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    top_k: int | None,
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    inputs = q.to(dtype), k.to(dtype), v.to(dtype)
    if top_k is None:
        out = _forward(*inputs, is_landmark, scale, cu_seqlens, key_mask)
    else:
        out = chosen.landmark_attention(*inputs, is_landmark, scale, cu_seqlens, key_mask, top_k)
    return out.to(q.dtype)


# Opaque operators: torch.compile would otherwise unroll the loop over tiles into its graph.


@torch.library.custom_op("zoo::landmark_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for rows, keys, queries in _sequences(is_landmark, q.shape[1], cu_seqlens, key_mask):
        layout = _Layout(q[rows][:, queries], k[rows][:, keys], is_landmark[rows.start, keys], scale)
        values = layout.slots_of(v[rows][:, keys])
        outs = layout.q.new_empty(*layout.q.shape[:2], v.shape[3])
        for tile in layout:
            p, _ = layout.probabilities(tile)
            torch.bmm(p, values[tile.pairs, : tile.slots], out=outs[tile.pairs, tile.rows])
        out[rows, queries] = layout.tokens_of(outs).to(q.dtype)
    return out


@torch.library.custom_op("zoo::landmark_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, queries in _sequences(is_landmark, q.shape[1], cu_seqlens, key_mask):
        layout = _Layout(q[rows][:, queries], k[rows][:, keys], is_landmark[rows.start, keys], scale)
        values = layout.slots_of(v[rows][:, keys])
        grad_rows = layout.rows_of(grad_out[rows][:, queries])
        grad_q, grad_k, grad_landmarks = (torch.zeros_like(x) for x in (layout.q, layout.k, layout.landmarks))
        grad_v = torch.zeros_like(values)
        for tile in layout:
            own_q, own_grad = layout.q[tile.pairs, tile.rows], grad_rows[tile.pairs, tile.rows]
            p, pi = layout.probabilities(tile)
            grad_v[tile.pairs, : tile.slots] += p.mT @ own_grad
            grad_p = own_grad @ values[tile.pairs, : tile.slots].mT
            shares = layout.by_block(tile, (p * grad_p).unflatten(-1, (tile.pieces, layout.width)).sum(-1))
            total = shares.sum(-1, keepdim=True)
            centre = torch.where(tile.own, total, torch.where(pi > 0, shares / pi, 0.0))
            centre = layout.by_piece(tile, centre)[..., None]
            grad_logits = p.mul_((grad_p.unflatten(-1, (tile.pieces, layout.width)) - centre).flatten(-2))
            grad_landmark = torch.where(tile.earlier, shares - pi * total, 0.0)
            grad_k[tile.pairs, : tile.slots] += grad_logits.mT @ own_q
            grad_landmarks[tile.pairs, : tile.blocks] += grad_landmark.mT @ own_q
            grad_q[tile.pairs, tile.rows] = (
                grad_logits @ layout.k[tile.pairs, : tile.slots]
                + grad_landmark @ layout.landmarks[tile.pairs, : tile.blocks]
            )
        for grad, index, part in (
            (grads[0], queries, layout.tokens_of(grad_q * scale)),
            (grads[1], keys, layout.keys_of(grad_k, grad_landmarks)),
            (grads[2], keys, layout.keys_of(grad_v)),
        ):
            grad[rows, index] = part.to(grad.dtype)
    return grads


def _sequences(
    is_landmark: Tensor, length: int, cu_seqlens: Tensor | None, key_mask: Tensor | None
) -> Iterator[tuple[slice, Any, Any]]:
    """`(rows, keys, queries)`, one for all rows with the same blocks, for each document, or for each padded row: which
    keys there are in it, and which queries, the last of them."""
    batch, key_length = is_landmark.shape
    offset = key_length - length
    if cu_seqlens is not None:
        for start, stop in pairwise(cu_seqlens.tolist()):
            if start < stop:
                yield slice(0, 1), slice(start, stop), slice(start, stop)
    elif key_mask is not None:
        for row in range(batch):
            keys = key_mask[row].nonzero()[:, 0]
            queries = keys[keys >= offset] - offset
            if queries.numel():
                yield slice(row, row + 1), keys, queries
    elif bool((is_landmark == is_landmark[:1]).all()):
        yield slice(0, batch), slice(None), slice(None)
    else:
        for row in range(batch):
            yield slice(row, row + 1), slice(None), slice(None)


class _Tile(NamedTuple):
    """Some queries of some pairs of batch row and kv head, and what they see.

    pairs    of the `b*K`
    rows     of the `T*G`
    slots    how many slots, from the first, hold all keys that the queries see
    pieces   how many pieces
    blocks   how many blocks
    hidden   `[rows, slots]`, -inf where a query does not see the key there (or there is none), 0 elsewhere
    own      `[rows, blocks]`, whether the block is the query's own
    earlier  `[rows, blocks]`, whether the query sees the block's landmark
    """

    pairs: slice
    rows: slice
    slots: int
    pieces: int
    blocks: int
    hidden: Tensor
    own: Tensor
    earlier: Tensor


class _Layout:
    """One sequence without padding, its ordinary keys laid out in pieces: q (scaled) its rows, k the keys in slots
    `[b*K, P*w, D]`, landmarks `[b*K, n, D]`; at least float32.

    position        `[P*w]`, of the key in a slot; S in an empty one
    piece_block     `[P]`, the block of a piece, ascending
    landmark        `[n]`, the position of a block's landmark; S where there is none or the block has no key
    """

    def __init__(self, q: Tensor, k: Tensor, is_landmark: Tensor, scale: float) -> None:
        batch, self.length, heads, _ = q.shape
        self.key_length, self.kv_heads = k.shape[1:3]
        self.batch, self.shared = batch, heads // self.kv_heads
        wide = torch.promote_types(q.dtype, torch.float32)

        self.block = is_landmark.long().cumsum(0) - is_landmark.long()  # a landmark is in the block it ends
        ordinary = (~is_landmark).nonzero()[:, 0]
        self.blocks = int(self.block[-1]) + 1
        counts = torch.bincount(self.block[ordinary], minlength=self.blocks)
        longest, total = int(counts.max()), len(ordinary)
        # One width for all, unless few long blocks would leave most slots of the others empty.
        self.width = max(1, longest if longest * (self.blocks - 1) <= 2 * total else -(-total // self.blocks))
        pieces = (counts + self.width - 1) // self.width
        self.piece_block = torch.arange(self.blocks, device=q.device).repeat_interleave(pieces)
        place = torch.arange(total, device=q.device) - (counts.cumsum(0) - counts)[self.block[ordinary]]
        self.slot = (pieces.cumsum(0) - pieces)[self.block[ordinary]] * self.width + place
        self.ordinary = ordinary
        self.position = ordinary.new_full((len(self.piece_block) * self.width,), self.key_length)
        self.position[self.slot] = ordinary
        ends = is_landmark.nonzero()[:, 0]
        self.landmark = ordinary.new_full((self.blocks,), self.key_length)
        self.landmark[: len(ends)] = torch.where(counts[: len(ends)] > 0, ends, self.key_length)
        self.ends = ends

        self.q = self.rows_of(q) * scale
        self.k = self.slots_of(k)
        self.landmarks = self.k.new_zeros(self.k.shape[0], self.blocks, k.shape[3])
        self.landmarks[:, : len(ends)] = k[:, ends].to(wide).transpose(1, 2).flatten(0, 1)

    def rows_of(self, x: Tensor) -> Tensor:
        """`[b, T, H, D]` to `[b*K, T*G, D]`, in at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        grouped = x.to(wide).unflatten(2, (self.kv_heads, self.shared))
        return grouped.transpose(1, 2).reshape(-1, self.length * self.shared, x.shape[3])

    def tokens_of(self, rows: Tensor) -> Tensor:
        """The inverse of `rows_of`, `[b, T, H, D]`."""
        grouped = rows.view(self.batch, self.kv_heads, self.length, self.shared, rows.shape[2])
        return grouped.transpose(1, 2).flatten(2, 3)

    def slots_of(self, x: Tensor) -> Tensor:
        """`[b, S, K, D]` to `[b*K, P*w, D]`, in at least float32; zeros in empty slots."""
        wide = torch.promote_types(x.dtype, torch.float32)
        slots = x.new_zeros(x.shape[0], self.kv_heads, len(self.position), x.shape[3], dtype=wide)
        slots[:, :, self.slot] = x[:, self.ordinary].to(wide).transpose(1, 2)
        return slots.flatten(0, 1)

    def keys_of(self, slots: Tensor, landmarks: Tensor | None = None) -> Tensor:
        """The inverse of `slots_of`, `[b, S, K, D]`, with these at the landmarks, or zeros."""
        keys = slots.new_zeros(slots.shape[0], self.key_length, slots.shape[2])
        keys[:, self.ordinary] = slots[:, self.slot]
        if landmarks is not None:
            keys[:, self.ends] = landmarks[:, : len(self.ends)]
        return keys.unflatten(0, (self.batch, self.kv_heads)).transpose(1, 2)

    def __iter__(self) -> Iterator[_Tile]:
        size = max(1, min(MAX_QUERIES, MAX_LOGITS // (max(1, len(self.position)) * self.shared)))
        offset = self.key_length - self.length
        positions = torch.arange(offset, self.key_length, device=self.q.device)
        last = positions[size - 1 :: size]
        if len(last) * size < self.length:
            last = torch.cat([last, positions[-1:]])
        blocks = self.block[last] + 1
        pieces = torch.searchsorted(self.piece_block, blocks)  # those of the blocks up to the last query's own
        for i, (block_count, piece_count) in enumerate(torch.stack([blocks, pieces], 1).tolist()):
            tokens = slice(i * size, min((i + 1) * size, self.length))
            t = positions[tokens, None]
            slots = piece_count * self.width
            is_hidden = self.position[:slots] > t
            hidden = torch.zeros(is_hidden.shape, dtype=self.q.dtype, device=t.device)
            hidden.masked_fill_(is_hidden, -torch.inf)
            own = self.block[t] == torch.arange(block_count, device=t.device)
            masks = (x.repeat_interleave(self.shared, 0) for x in (hidden, own, self.landmark[:block_count] < t))
            visible = slots, piece_count, block_count, *masks
            rows = slice(tokens.start * self.shared, tokens.stop * self.shared)
            at_once = max(1, MAX_LOGITS // max(1, slots * (rows.stop - rows.start)))
            for start in range(0, self.q.shape[0], at_once):
                yield _Tile(slice(start, start + at_once), rows, *visible)

    def probabilities(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """P `[pairs, rows, slots]` and pi `[pairs, rows, blocks]`."""
        q = self.q[tile.pairs, tile.rows]
        logits = (q @ self.k[tile.pairs, : tile.slots].mT).add_(tile.hidden).unflatten(-1, (tile.pieces, self.width))
        pieces = logits.logsumexp(-1)
        # A block's log-sum-exp is that of its pieces'; the largest comes out first, and is 0 where all are -inf.
        index = self.piece_block[: tile.pieces].expand_as(pieces)
        largest = pieces.new_full((*pieces.shape[:2], tile.blocks), -torch.inf).scatter_reduce_(
            -1, index, pieces, "amax"
        )
        largest.masked_fill_(largest == -torch.inf, 0.0)
        lse = self.by_block(tile, (pieces - self.by_piece(tile, largest)).exp_()).log_().add_(largest)
        landmarks = q @ self.landmarks[tile.pairs, : tile.blocks].mT
        z = torch.where(tile.own, lse, landmarks.masked_fill_(~tile.earlier, -torch.inf))
        pi = z.softmax(-1).nan_to_num_(0.0)  # of a query that sees nothing
        shift = torch.where(pi > 0, pi.log() - lse, -torch.inf)
        return logits.add_(self.by_piece(tile, shift)[..., None]).exp_().flatten(-2), pi

    def by_block(self, tile: _Tile, x: Tensor) -> Tensor:
        """`[..., pieces]` added up to `[..., blocks]`."""
        index = self.piece_block[: tile.pieces].expand_as(x)
        return x.new_zeros(*x.shape[:-1], tile.blocks).scatter_add_(-1, index, x)

    def by_piece(self, tile: _Tile, x: Tensor) -> Tensor:
        """`[..., blocks]` handed out to `[..., pieces]`."""
        return x.index_select(-1, self.piece_block[: tile.pieces])


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, is_landmark, ctx.scale, cu_seqlens, key_mask = inputs
    ctx.save_for_backward(q, k, v, is_landmark, cu_seqlens, key_mask)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    q, k, v, is_landmark, cu_seqlens, key_mask = ctx.saved_tensors
    return *_backward(grad_out, q, k, v, is_landmark, ctx.scale, cu_seqlens, key_mask), None, None, None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
