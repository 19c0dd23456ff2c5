"""The decays within the chunks of delta_rule: the products of tokens with the decay between them, and gradients.

Two forms, one per head and one per channel of the keys. `Decays.of` gives those of a block of chunks:

    into      `[n,H,C,1 or K]`  from the chunk's start to each token, e^{c_i}
    out_of    `[n,H,C,1 or K]`  from each token to the chunk's end, e^{c_C - c_j}
    whole     `[n,H,1 or K,1]`  from its start to its end
    products  <q, k>_ij for j <= i, and <k, k>_ij for j < i, `[n,H,C,C]` each, 0 above (the second may hold anything on
              its diagonal)

Gradients of log decays are sums of the terms that decayed across a token, never the difference of two larger sums,
which would drown those of strong decays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from zoo.ops.chunks import LOG2_E, HeadDecays, dot, matmul, scaled, summed
from zoo.ops.varlen import DocumentChunks, RowChunks


class Block(ABC):
    """The decays of one block of chunks."""

    into: Tensor
    out_of: Tensor
    whole: Tensor

    @abstractmethod
    def products(self) -> tuple[Tensor, Tensor]:
        """<q, k> and <k, k>."""

    @abstractmethod
    def gradients(
        self, queries: Tensor, keys: Tensor, q_in: Tensor, k_in: Tensor, k_out: Tensor, whole: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of q and k; that of the log decays is written down where `Decays.gradient` finds it.

        queries, keys  `[n,H,C,C]`  of what `products` gave, masked as they are.
        q_in, k_in     `[n,H,C,K]`  of q into and k into.
        k_out          `[n,H,C,K]`  of k out_of.
        whole          `[n,H,K,V]`  the state that enters times the gradient of the one that leaves.
        """


class Decays(ABC):
    """The decays of all chunks."""

    @abstractmethod
    def of(self, now: slice, q: Tensor, k: Tensor) -> Block:
        """Those of the chunks `now`, whose queries and keys are given."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """Of log_decay, in its own shape, once every block has its gradients."""


class PerHead(Decays):
    def __init__(self, log_decay: Tensor, layout: RowChunks | DocumentChunks, dtype: torch.dtype) -> None:
        self.log_decay, self.layout = log_decay, layout
        self.sums = HeadDecays(log_decay, layout, dtype)
        self.total = self.sums.new_gradient()

    def of(self, now: slice, q: Tensor, k: Tensor) -> Block:
        return _HeadBlock(self, now, q, k)

    def gradient(self) -> Tensor:
        if self.log_decay.dim() == 1:
            return self.total.zero_()  # a constant
        return self.layout.gather(self.total[..., None])[..., 0].contiguous()


class _HeadBlock(Block):
    def __init__(self, decays: PerHead, now: slice, q: Tensor, k: Tensor) -> None:
        sums = decays.sums
        self.decays, self.now, self.q, self.k = decays, now, q, k
        self.into, self.out_of, self.whole = sums.into[now], sums.out_of[now], sums.whole[now]
        self.within = sums.within(now)

    def products(self) -> tuple[Tensor, Tensor]:
        q, k = self.q, self.k
        self.queries, self.keys = (scaled(matmul(x, k.mT), self.within) for x in (q, k))
        return self.queries, self.keys

    def gradients(
        self, queries: Tensor, keys: Tensor, q_in: Tensor, k_in: Tensor, k_out: Tensor, whole: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, groups = self.q, self.k, self.q.shape[1]
        q_in, k_in, k_out = q_in * self.into, k_in * self.into, k_out * self.out_of
        self.decays.sums.add_gradient(
            self.decays.total,
            self.now,
            queries * self.queries + keys * self.keys,
            dot(q, q_in) + dot(k, k_in),
            dot(k, k_out),
            self.whole.flatten(1) * whole.sum((-2, -1)),
        )
        queries, keys = (summed(x * self.within, groups) for x in (queries, keys))
        dq = summed(q_in, groups) + matmul(queries, k)
        dk = summed(k_in + k_out, groups) + matmul(queries.mT, q) + matmul(keys + keys.mT, k)
        return dq, dk


class PerChannel(Decays):
    """Every pair of tokens j < i is split by the middle of exactly one of the blocks of 2, 4, 8 ... C tokens. There

        <q, k>_ij = sum_d (q_id e^{from the middle to i}) (k_jd e^{from j to the middle})

    is a product of two matrices, each with a factor of at most 1: nothing overflows, and what underflows is nothing.
    """

    def __init__(self, log_decay: Tensor, layout: RowChunks | DocumentChunks) -> None:
        self.layout = layout
        self.steps = layout.spread(log_decay)
        self.total = torch.zeros_like(self.steps)

    def of(self, now: slice, q: Tensor, k: Tensor) -> Block:
        return _ChannelBlock(self, now, q, k)

    def gradient(self) -> Tensor:
        return self.layout.gather(self.total)


class _ChannelBlock(Block):
    def __init__(self, decays: PerChannel, now: slice, q: Tensor, k: Tensor) -> None:
        steps = decays.steps[now]
        self.total, self.groups = decays.total[now], q.shape[1]
        shared = steps.shape[1] // self.groups
        self.q, self.k = (x if shared == 1 else x.repeat_interleave(shared, dim=1) for x in (q, k))
        # Sums of log decays from the start of a token's half up to it, and after it to the end of its half.
        to, after = steps * LOG2_E, torch.zeros_like(steps)
        self.levels = []  # (half of a block, to a token of a right half, from a token of a left one)
        half = 1
        while half < steps.shape[2]:
            (to_left, to_right), (after_left, _) = _halves(to, half), _halves(after, half)
            self.levels.append((half, to_right.exp2(), after_left.exp2()))
            after_left += to_right[..., -1:, :]
            to_right += to_left[..., -1:, :]
            half *= 2
        self.into, self.out_of = to.exp2(), after.exp2()
        self.whole = self.into[..., -1, :, None]

    def products(self) -> tuple[Tensor, Tensor]:
        chunk = self.k.shape[2]
        queries, keys = (self.k.new_zeros(*self.k.shape[:2], chunk, chunk) for _ in range(2))
        queries.diagonal(dim1=-2, dim2=-1).copy_((self.q * self.k).sum(-1))
        for half, right, left in self.levels:
            rows, columns = self._split(half, right, left)
            of_queries, of_keys = (rows @ columns.mT).split(half, -2)
            _corners(queries, half).copy_(of_queries)
            _corners(keys, half).copy_(of_keys)
        return queries, keys

    def _split(self, half: int, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the right halves decayed from the middle, `[n,H,blocks,2 half,K]`, and keys of the left
        ones decayed to it, `[n,H,blocks,half,K]`."""
        (_, q), (before, k) = _halves(self.q, half), _halves(self.k, half)
        return torch.cat([q * right, k * right], -2), before * left

    def gradients(
        self, queries: Tensor, keys: Tensor, q_in: Tensor, k_in: Tensor, k_out: Tensor, whole: Tensor
    ) -> tuple[Tensor, Tensor]:
        dq = q_in * self.into
        d_into, d_out_of = k_in * self.into, k_out * self.out_of
        dk = d_into + d_out_of
        # Of the logarithms of into and out_of, then down the levels of those in each half.
        d_to, d_after = self.q * dq + self.k * d_into, self.k * d_out_of
        own = queries.diagonal(dim1=-2, dim2=-1)[..., None]
        dq += own * self.k
        dk += own * self.q
        for half, right, left in reversed(self.levels):
            (to_left, to_right), (after_left, _) = _halves(d_to, half), _halves(d_after, half)
            to_left[..., -1, :] += to_right.sum(-2)
            # What lies after a token of the left half is all of the right one: the sum up to its last token.
            to_right[..., -1, :] += after_left.sum(-2)
            rows, columns = self._split(half, right, left)
            d_products = torch.cat([_corners(queries, half), _corners(keys, half)], -2)
            d_rows = d_products @ columns
            d_columns = d_products.mT @ rows
            after_left += columns * d_columns
            dq_right, dk_right = (d_rows * torch.cat([right, right], -2)).split(half, -2)
            q_rows, k_rows = (rows * d_rows).split(half, -2)
            to_right += q_rows + k_rows
            _halves(dq, half)[1].add_(dq_right)
            _halves(dk, half)[1].add_(dk_right)
            _halves(dk, half)[0].add_(d_columns * left)
        self.total.copy_(d_to + (self.whole[..., 0] * whole.sum(-1))[:, :, None])
        return summed(dq, self.groups), summed(dk, self.groups)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """x `[n,H,C,K]` in blocks of two halves: the left ones and the right ones, views `[n,H,blocks,half,K]`."""
    blocks = x.unflatten(2, (-1, 2, half))
    return blocks[:, :, :, 0], blocks[:, :, :, 1]


def _corners(x: Tensor, half: int) -> Tensor:
    """Of x `[n,H,C,C]`, rows of the right half against columns of the left one of each block on the diagonal: a view
    `[n,H,blocks,half,half]`."""
    blocks = x.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half))
    return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)
