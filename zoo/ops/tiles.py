# mypy: disable-error-code="assignment,no-untyped-def"
"""What kernels share that go through documents in pieces: where each piece stands, tiles of heads and of states."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad


def tile_size(dim: int, largest: int) -> int:
    """A power of two from 16 to `largest`, half of that where it covers `dim` more closely."""
    if dim > largest > 64 and triton.cdiv(dim, largest // 2) % 2 == 1:
        return largest // 2
    return max(16, min(largest, triton.next_power_of_2(dim)))


class Pieces(NamedTuple):
    """Documents cut into pieces of `size` tokens, in order; a document has at least one, if only an empty one.

    How many there are for packed documents stays on the device: `number` is a bound, and the pieces beyond the last
    count as empty ones of the last document.
    """

    number: int
    size: int
    document: Tensor | None  # [number], the document of each piece; None where all rows are alike
    first: Tensor | None  # [documents + 1], the first piece of each document


def pieces_of(documents: int, length: int, size: int, cu_seqlens: Tensor | None) -> Pieces:
    if cu_seqlens is None:
        return Pieces(documents * triton.cdiv(length, size), size, None, None)
    counts = ((cu_seqlens.diff() + (size - 1)) // size).clamp_(min=1)
    first = pad(counts.cumsum(0), (1, 0))
    number = bound(documents, length, size)
    pieces = torch.arange(number, device=cu_seqlens.device)
    document = torch.searchsorted(first[1:], pieces, right=True).clamp_(max=documents - 1)
    return Pieces(number, size, document, first)


def bound(documents: int, length: int, size: int) -> int:
    """At most this many pieces of `size` tokens come from documents of `length` tokens together."""
    return length // size + documents


@triton.jit
def place(piece, document_of, first_of, cu_seqlens, length, size):
    """`(document, start, tokens, index, last)`: a piece is the index-th of its document, and ends it or not; its first
    token is counted over all rows."""
    if document_of is None:
        per_row = tl.cdiv(length, size)
        document = (piece // per_row).to(tl.int64)
        index = (piece % per_row).to(tl.int64)
        start = document * length
        whole = length
    else:
        document = tl.load(document_of + piece)
        index = piece - tl.load(first_of + document)
        start = tl.load(cu_seqlens + document).to(tl.int64)
        whole = tl.load(cu_seqlens + document + 1) - start
    offset = index * size
    return document, start + offset, tl.minimum(whole - offset, size).to(tl.int32), index, offset + size >= whole


@triton.jit
def load(x, token, inside, stride, dim, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """A tile [token, dim] of one head of x."""
    mask = inside[:, None] & (dim < DIM)[None, :]
    return tl.load(x + token[:, None] * stride + dim[None, :], mask=mask, other=0).to(DTYPE)


@triton.jit
def store_transposed(x, token, inside, stride, dim, DIM: tl.constexpr, tile):
    """A tile [dim, token] into one head of x."""
    mask = inside[None, :] & (dim < DIM)[:, None]
    tl.store(x + token[None, :] * stride + dim[:, None], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_state(states, index, k, v, K: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr):
    """A tile [k, v] of states [..., K, V]."""
    mask = (k < K)[:, None] & (v < V)[None, :]
    return tl.load(states + index * (K * V) + k[:, None] * V + v[None, :], mask=mask, other=0).to(DTYPE)


@triton.jit
def store_state(states, index, k, v, K: tl.constexpr, V: tl.constexpr, tile):
    mask = (k < K)[:, None] & (v < V)[None, :]
    tl.store(states + index * (K * V) + k[:, None] * V + v[None, :], tile.to(states.dtype.element_ty), mask=mask)


def tf32_is_asked_for() -> bool:
    """By torch's own switch, which is off unless somebody calls it."""
    return torch.get_float32_matmul_precision() != "highest"


def rows_of(x: Tensor) -> Tensor:
    """`[B, T, heads, dim]` to `[N, heads, dim]`, copied only if its rows are not evenly apart or its dims not
    adjacent."""
    x = x.flatten(0, 1)
    return x if x.stride(2) == 1 else x.contiguous()
