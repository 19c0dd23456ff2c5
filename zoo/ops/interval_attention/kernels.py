# mypy: disable-error-code="assignment,no-untyped-def"
"""Attention to intervals of keys on a GPU, for interval_attention and softmax_attention: FlashAttention-2's forward and
backward (Dao, arXiv:2307.08691), each query with one or several intervals of its own.

    s_ij = scale q_i k_j ;  p_ij = exp(s_ij - lse_i) for the j that i sees, else 0 ;  o_i = sum_j p_ij v_j
    ds_ij = p_ij (do_i v_j - delta_i),  delta_i = do_i o_i - dlse_i ;  with a soft cap times 1 - tanh^2
    dq_i = scale sum_j ds_ij k_j ;  dk_j = scale sum_i ds_ij q_i ;  dv_j = sum_i p_ij do_i

    _forward_kernel   a tile of queries goes through the keys that any of them sees
    _query_kernel     the same for delta and dq
    _span_kernel      of each tile of queries and each slot, the keys that one sees, and those that all see
    _key_kernel       a tile of keys goes through the queries that see any of them, for dk and dv

"All see" is what spares a tile its mask. Nothing is added up by atomic operations, so a second run gives the same bits.

A product with a computed tile takes it as the right-hand operand (linear_attention/kernels.py says why), and a program
has 4 warps: with more, Triton 3.6 may let one group of them overwrite what wgmma still reads for another (triton pull
requests 9484 and 9497).

Legend: B rows of the batch, T queries, S keys, H heads, K kv heads, G = H/K heads per kv head, D and V the head dims, R
slots, the intervals of a query. A program has BM "rows", the queries of one kv head with the G of a token side by side,
or BN keys.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.dispatch import implements, outside_autocast

MAX_DIM = 256
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
MIN_KEYS = 512  # for each of the programs that share out the keys of a few queries
MIN_TILES = 16  # of queries, for each of the programs that share out those that see a few keys
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**31 - 1)


def refuses(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernels cannot serve tensors like these, or None."""
    for x in (q, k, v):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(x.dtype).removeprefix('torch.')} inputs"
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return f"head dims above {MAX_DIM}"
    return None


@implements("interval_attention", "triton", refuses=refuses)
def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them."""
    first, stop = (x.int()[None] for x in (first, stop))
    return attend(q, k, v, first, stop, scale=scale, in_order=False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    is_real: Tensor | None = None,
    near: int = 1,
    far: tuple[int, int] = (0, 0),
    in_order: bool = True,
) -> tuple[Tensor, Tensor]:
    """`(out [B, T, H, V], lse [B, T, H])` of the keys in a query's intervals, which share none.

    first, stop  int32 `[R, B, T]`, or `[R, 1, T]` for all rows: the bounds, within 0 and S unless first >= stop
    is_real      bool `[B, S]`, or `[1, S]`, False for a key that nobody sees
    near         the slots from this one on hold only keys from far[0] to before far[1]: a few that many queries see,
                 who are therefore shared out among several programs
    in_order     that the intervals of a near slot move on with the queries; otherwise the GPU finds out whether they
                 do, and where they do not, looks at every tile of queries whether it sees a tile of keys
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    tensors = q.to(dtype), k.to(dtype), v.to(dtype)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # Calling an operator takes longer than a token's kernel, so decoding goes without.
    call = _operator if differentiable or torch.compiler.is_compiling() else _forward
    out, lse = call(*tensors, first, stop, is_real, scale, softcap, near, list(far), in_order)
    return out.to(q.dtype), lse


class _Tiles(NamedTuple):
    """Rows and keys of a program, `(BM, BN)`, and how often what its loop loads is in shared memory."""

    forward: tuple[int, int]
    query: tuple[int, int]
    key: tuple[int, int]
    stages: int


# By the larger head dim. Tiles of 64 and more are multiplied by wgmma, and tiles of 32 in every direction keep it away:
# see linear_attention/kernels.py.
TENSOR_CORE = {
    32: _Tiles((32, 32), (32, 32), (32, 32), 2),
    64: _Tiles((128, 64), (64, 64), (64, 64), 2),
    128: _Tiles((64, 64), (64, 64), (64, 64), 2),
    256: _Tiles((64, 64), (64, 64), (64, 64), 2),
}
# Unrolled into single multiplications.
FLOAT32 = {
    64: _Tiles((32, 32), (32, 32), (16, 32), 1),
    128: _Tiles((32, 16), (32, 16), (16, 32), 1),
    256: _Tiles((16, 16), (16, 16), (16, 16), 1),
}


def tile_rows(q: Tensor, k: Tensor, v: Tensor) -> int:
    """What the rows of every tile divide: the queries of a kv head, those that share it side by side."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    tiles = _tiles(dtype, q.shape[3], v.shape[3])
    return max(tiles.forward[0], tiles.query[0], tiles.key[0])


def _tiles(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> _Tiles:
    by_dim = FLOAT32 if dtype == torch.float32 else TENSOR_CORE
    if dtype != torch.float32 and min(head_dim, v_head_dim) <= 32 < max(head_dim, v_head_dim):
        return TENSOR_CORE[32]
    return next(tiles for dim, tiles in by_dim.items() if max(head_dim, v_head_dim) <= dim)


@triton.jit
def _place(tiles, K: tl.constexpr):
    """`(tile, row of the batch, kv head)` of this program."""
    program = tl.program_id(0)
    pair = program // tiles
    return program % tiles, (pair // K).to(tl.int64), (pair % K).to(tl.int64)


@triton.jit
def _part(low, high, SIZE: tl.constexpr):
    """What this program has of the steps of SIZE from low to high."""
    each = tl.cdiv(tl.maximum(high - low, 0), SIZE * tl.num_programs(1)) * SIZE
    begin = low + tl.program_id(1) * each
    return begin, tl.minimum(begin + each, high)


@triton.jit
def _rows(tile, length, G: tl.constexpr, BM: tl.constexpr):
    """`(inside, token, head)` of each row of a tile; the head counts among those of the kv head."""
    row = tile * BM + tl.arange(0, BM)
    return row < length * G, (row // G).to(tl.int64), (row % G).to(tl.int64)


@triton.jit
def _load(x, at, inside, dim, DIM: tl.constexpr):
    """A tile [row, dim]; rows begin at `at`."""
    return tl.load(x + at[:, None] + dim[None, :], mask=inside[:, None] & (dim < DIM)[None, :], other=0)


@triton.jit
def _store_transposed(x, at, inside, dim, DIM: tl.constexpr, tile):
    """A tile [dim, row]."""
    mask = inside[None, :] & (dim < DIM)[:, None]
    tl.store(x + at[None, :] + dim[:, None], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _span(begin, end, inside):
    """`(low, high, low_all, high_all)`: some row of a tile sees a key from low to before high, and all rows see those
    from low_all to before high_all, if there are any."""
    sees = inside & (begin < end)
    low = tl.min(tl.where(sees, begin, FAR), 0)
    high = tl.max(tl.where(sees, end, 0), 0)
    return low, high, tl.max(tl.where(inside, begin, 0), 0), tl.min(tl.where(inside, end, FAR), 0)


@triton.jit
def _tanh(x):
    """To the last bits: near 0 by its series, elsewhere by an exponential."""
    square = x * x
    series = 0.13333334 + square * (-0.053968254 + square * (0.021869488 - square * 0.008863235))
    near = x + x * square * (-0.33333334 + square * series)
    e = tl.exp2(-2 * LOG2E * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(products, scale, softcap):
    """Binary logits, and under a soft cap the tanh in them."""
    if softcap is None:
        bounded = products
        logits = products * (scale * LOG2E)
    else:
        bounded = _tanh(products * (scale / softcap))
        logits = bounded * (softcap * LOG2E)
    return logits, bounded


@triton.jit
def _slope(d_logits, bounded, softcap):
    if softcap is not None:
        d_logits *= 1 - bounded * bounded
    return d_logits


@triton.jit(do_not_specialize=["length", "key_length", "tiles", "bounds_rows", "real_rows"])
def _forward_kernel(
    q,  # [B, T, H, D]
    k,  # [B, S, K, D]
    v,  # [B, S, K, V]
    first,  # [R, B or 1, T]
    stop,
    is_real,  # [B or 1, S] or None
    out,  # [parts, B, T, H, V], dense
    lse,  # [parts, B, T, H], dense
    length,
    key_length,
    tiles,
    scale,
    softcap,
    stride_q_batch,
    stride_q,
    stride_q_head,
    stride_k_batch,
    stride_k,
    stride_k_head,
    stride_v_batch,
    stride_v,
    stride_v_head,
    bounds_rows,  # B or 1
    real_rows,  # B or 1
    R: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, batch, kv_head = _place(tiles, K)
    tile = tiles - 1 - tile  # causal, the last have most to do
    inside, token, shared = _rows(tile, length, G, BM)
    head = kv_head * G + shared
    dim = tl.arange(0, BD)
    v_dim = tl.arange(0, BV)
    q_tile = _load(q, batch * stride_q_batch + token * stride_q + head * stride_q_head, inside, dim, D)
    k += batch * stride_k_batch + kv_head * stride_k_head
    v += batch * stride_v_batch + kv_head * stride_v_head
    highest = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BV, BM], tl.float32)
    for r in range(0, R):
        at = (r * bounds_rows + batch % bounds_rows) * length + token
        begin = tl.load(first + at, mask=inside, other=0)
        end = tl.load(stop + at, mask=inside, other=0)
        low, high, low_all, high_all = _span(begin, end, inside)
        low, high = _part(low, high, BN)
        for start in range(low, high, BN):
            key = start + tl.arange(0, BN)
            there = key < high
            where = key.to(tl.int64)
            k_tile = _load(k, where * stride_k, there, dim, D)
            v_tile = _load(v, where * stride_v, there, v_dim, V)
            logits, _bounded = _logits(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
            if (start < low_all) | (start + BN > high_all):
                visible = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
                logits = tl.where(visible, logits, -float("inf"))
            if is_real is not None:
                real = tl.load(is_real + batch % real_rows * key_length + where, mask=there, other=0)
                logits = tl.where((real != 0)[None, :], logits, -float("inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            origin = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(logits - origin[:, None])
            shrink = tl.exp2(highest - origin)
            total = total * shrink + tl.sum(p, 1)
            acc *= shrink[None, :]
            acc = tl.dot(tl.trans(v_tile), tl.trans(p.to(v_tile.dtype)), acc, input_precision=PRECISION)
            highest = higher
    empty = total == 0
    acc /= tl.where(empty, 1.0, total)[None, :]
    part = tl.program_id(1) * (tl.num_programs(0) // (tiles * K)) + batch
    row = (part * length + token) * (K * G) + head
    _store_transposed(out, row * V, inside, v_dim, V, acc)
    tl.store(
        lse + row, tl.where(empty, -float("inf"), (highest + tl.log2(tl.where(empty, 1.0, total))) * LN2), mask=inside
    )


@triton.jit(do_not_specialize=["length", "key_length", "tiles", "bounds_rows", "real_rows"])
def _query_kernel(
    q,  # [B, T, H, D]
    k,  # [B, S, K, D]
    v,  # [B, S, K, V]
    first,  # [R, B or 1, T]
    stop,
    is_real,  # [B or 1, S] or None
    out,  # [B, T, H, V], dense
    lse,  # [B, T, H], dense
    d_out,  # [B, T, H, V]
    d_lse,  # [B, T, H], dense, or None
    delta,  # [B, T, H], dense
    d_q,  # [B, T, H, D], dense
    length,
    key_length,
    tiles,
    scale,
    softcap,
    stride_q_batch,
    stride_q,
    stride_q_head,
    stride_k_batch,
    stride_k,
    stride_k_head,
    stride_v_batch,
    stride_v,
    stride_v_head,
    bounds_rows,  # B or 1
    real_rows,  # B or 1
    stride_do_batch,
    stride_do,
    stride_do_head,
    R: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, batch, kv_head = _place(tiles, K)
    tile = tiles - 1 - tile
    inside, token, shared = _rows(tile, length, G, BM)
    head = kv_head * G + shared
    dim = tl.arange(0, BD)
    v_dim = tl.arange(0, BV)
    row = (batch * length + token) * (K * G) + head
    q_tile = _load(q, batch * stride_q_batch + token * stride_q + head * stride_q_head, inside, dim, D)
    do_at = batch * stride_do_batch + token * stride_do + head * stride_do_head
    do_tile = _load(d_out, do_at, inside, v_dim, V)
    shift = tl.load(lse + row, mask=inside, other=-float("inf"))
    empty = shift == -float("inf")
    own = tl.sum(do_tile.to(tl.float32) * _load(out, row * V, inside, v_dim, V).to(tl.float32), 1)
    if d_lse is not None:
        own -= tl.load(d_lse + row, mask=inside, other=0)
    own = tl.where(empty, 0.0, own)  # merging two empty rows gives a NaN gradient for their -inf
    tl.store(delta + row, own, mask=inside)
    shift = tl.where(empty, float("inf"), shift * LOG2E)
    k += batch * stride_k_batch + kv_head * stride_k_head
    v += batch * stride_v_batch + kv_head * stride_v_head
    acc = tl.zeros([BD, BM], tl.float32)
    for r in range(0, R):
        at = (r * bounds_rows + batch % bounds_rows) * length + token
        begin = tl.load(first + at, mask=inside, other=0)
        end = tl.load(stop + at, mask=inside, other=0)
        low, high, low_all, high_all = _span(begin, end, inside)
        for start in range(low, high, BN):
            key = start + tl.arange(0, BN)
            there = key < high
            where = key.to(tl.int64)
            k_tile = _load(k, where * stride_k, there, dim, D)
            v_tile = _load(v, where * stride_v, there, v_dim, V)
            logits, bounded = _logits(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION), scale, softcap)
            p = tl.exp2(logits - shift[None, :])
            if (start < low_all) | (start + BN > high_all):
                visible = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :])
                p = tl.where(visible, p, 0.0)
            if is_real is not None:
                real = tl.load(is_real + batch % real_rows * key_length + where, mask=there, other=0)
                p = tl.where((real != 0)[:, None], p, 0.0)
            d_p = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            d_logits = _slope(p * (d_p - own[None, :]), bounded, softcap)
            acc = tl.dot(tl.trans(k_tile), d_logits.to(k_tile.dtype), acc, input_precision=PRECISION)
    _store_transposed(d_q, row * D, inside, dim, D, acc * scale)


@triton.jit(do_not_specialize=["length", "tiles"])
def _span_kernel(
    first,  # [R, B or 1, T]
    stop,
    spans,  # [4, R, B or 1, tiles]
    length,
    tiles,
    G: tl.constexpr,
    BM: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    inside, token, _shared = _rows(program % tiles, length, G, BM)
    at = program // tiles * length + token
    begin = tl.load(first + at, mask=inside, other=0)
    end = tl.load(stop + at, mask=inside, other=0)
    low, high, low_all, high_all = _span(begin, end, inside)
    number = tl.num_programs(0).to(tl.int64)
    tl.store(spans + program, low)
    tl.store(spans + number + program, high)
    tl.store(spans + 2 * number + program, low_all)
    tl.store(spans + 3 * number + program, high_all)


@triton.jit(
    do_not_specialize=[
        "length",
        "key_length",
        "key_from",
        "keys",
        "slot_from",
        "slot_to",
        "key_tiles",
        "tiles",
        "bounds_rows",
        "real_rows",
    ]
)
def _key_kernel(
    q,  # [B, T, H, D]
    k,  # [B, S, K, D]
    v,  # [B, S, K, V]
    first,  # [R, B or 1, T]
    stop,
    is_real,  # [B or 1, S] or None
    spans,  # [4, R, B or 1, tiles]
    seen_from,  # [slot_to - slot_from, B or 1, key_tiles]: the first tile of rows that may see a tile of keys,
    seen_to,  # and the end of those
    in_order,  # [1], whether all of those do; None if that is known
    lse,  # [B, T, H], dense
    d_out,  # [B, T, H, V]
    delta,  # [B, T, H], dense
    d_k,  # [parts, B, keys, K, D], dense
    d_v,  # [parts, B, keys, K, V], dense
    length,
    key_length,
    key_from,  # the keys in question begin here
    keys,  # and are so many
    slot_from,
    slot_to,
    key_tiles,
    tiles,
    scale,
    softcap,
    stride_q_batch,
    stride_q,
    stride_q_head,
    stride_k_batch,
    stride_k,
    stride_k_head,
    stride_v_batch,
    stride_v,
    stride_v_head,
    bounds_rows,  # B or 1
    real_rows,  # B or 1
    stride_do_batch,
    stride_do,
    stride_do_head,
    R: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_ORDER: tl.constexpr,
    FOR_K: tl.constexpr,
    FOR_V: tl.constexpr,
):
    # Only in a loop without a condition does the compiler load ahead, so there is a launch for either case.
    if in_order is not None:  # noqa: SIM102  (Triton settles only an `if` of its own when it compiles)
        if (tl.load(in_order) != 0) != IN_ORDER:
            return
    tile, batch, kv_head = _place(key_tiles, K)
    start = key_from + tile * BN
    key = start + tl.arange(0, BN)
    there = key < key_from + keys
    where = key.to(tl.int64)
    dim = tl.arange(0, BD)
    v_dim = tl.arange(0, BV)
    k_tile = _load(k, batch * stride_k_batch + kv_head * stride_k_head + where * stride_k, there, dim, D)
    v_tile = _load(v, batch * stride_v_batch + kv_head * stride_v_head + where * stride_v, there, v_dim, V)
    if is_real is not None:
        real = tl.load(is_real + batch % real_rows * key_length + where, mask=there, other=0) != 0
    number = R * bounds_rows * tiles
    d_k_acc = tl.zeros([BD, BN], tl.float32)
    d_v_acc = tl.zeros([BV, BN], tl.float32)
    for r in range(slot_from, slot_to):
        line = r * bounds_rows + batch % bounds_rows
        seen = (line - slot_from * bounds_rows) * key_tiles + tile
        low = tl.load(seen_from + seen)
        high = tl.load(seen_to + seen)
        low, high = _part(low, high, 1)
        for i in range(low, high):
            span = spans + line * tiles + i
            sees = True
            if not IN_ORDER:
                sees = (tl.load(span) < start + BN) & (tl.load(span + number) > start)
            if sees:
                inside, token, shared = _rows(i, length, G, BM)
                head = kv_head * G + shared
                row = (batch * length + token) * (K * G) + head
                at = line * length + token
                q_at = batch * stride_q_batch + token * stride_q + head * stride_q_head
                do_at = batch * stride_do_batch + token * stride_do + head * stride_do_head
                q_tile = _load(q, q_at, inside, dim, D)
                do_tile = _load(d_out, do_at, inside, v_dim, V)
                shift = tl.load(lse + row, mask=inside, other=-float("inf"))
                shift = tl.where(shift == -float("inf"), float("inf"), shift * LOG2E)
                own = tl.load(delta + row, mask=inside, other=0)
                logits, bounded = _logits(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
                p = tl.exp2(logits - shift[:, None])
                if (tl.load(span + 2 * number) > start) | (tl.load(span + 3 * number) < start + BN):
                    begin = tl.load(first + at, mask=inside, other=0)
                    end = tl.load(stop + at, mask=inside, other=0)
                    p = tl.where((key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
                if is_real is not None:
                    p = tl.where(real[None, :], p, 0.0)
                if FOR_V:
                    d_v_acc = tl.dot(tl.trans(do_tile), p.to(do_tile.dtype), d_v_acc, input_precision=PRECISION)
                if FOR_K:
                    d_p = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
                    d_logits = _slope(p * (d_p - own[:, None]), bounded, softcap)
                    d_k_acc = tl.dot(tl.trans(q_tile), d_logits.to(q_tile.dtype), d_k_acc, input_precision=PRECISION)
    part = tl.program_id(1) * (tl.num_programs(0) // (key_tiles * K)) + batch
    row = (part * keys + where - key_from) * K + kv_head
    if FOR_K:
        _store_transposed(d_k, row * D, there, dim, D, d_k_acc * scale)
    if FOR_V:
        _store_transposed(d_v, row * V, there, v_dim, V, d_v_acc)


def _tf32_is_asked_for() -> bool:
    """By torch's own switch, which is off unless somebody calls it."""
    return torch.get_float32_matmul_precision() != "highest"


class _Call:
    """What the kernels need to know of a call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, is_real: Tensor | None) -> None:
        self.batch, self.length, heads, head_dim = q.shape
        self.key_length, self.kv_heads = k.shape[1:3]
        self.shared = heads // self.kv_heads
        self.q, self.k, self.v = (_with_rows(x) for x in (q, k, v))
        self.first, self.stop = first.contiguous(), stop.contiguous()
        self.is_real = None if is_real is None else is_real.contiguous()
        self.rows = (first.shape[1], 1 if is_real is None else len(is_real))
        self.tiles = _tiles(v.dtype, head_dim, v.shape[3])
        self.strides = [stride for x in (self.q, self.k, self.v) for stride in x.stride()[:3]]
        self.options: dict[str, Any] = {
            "R": first.shape[0],
            "G": self.shared,
            "K": self.kv_heads,
            "D": head_dim,
            "V": v.shape[3],
            "BD": _block(head_dim),
            "BV": _block(v.shape[3]),
            "PRECISION": "tf32" if _tf32_is_asked_for() else "ieee",
            "num_warps": 4,
            "num_stages": self.tiles.stages,
        }

    def row_tiles(self, rows: int) -> int:
        return triton.cdiv(self.length * self.shared, rows)

    def grid(self, tiles: int) -> tuple[int]:
        return (self.batch * self.kv_heads * tiles,)


def _block(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    is_real: Tensor | None,
    scale: float,
    softcap: float | None,
    near: int,
    far: list[int],
    in_order: bool,
) -> tuple[Tensor, Tensor]:
    call = _Call(q, k, v, first, stop, is_real)
    rows, keys = call.tiles.forward
    tiles = call.row_tiles(rows)
    (programs,) = call.grid(tiles)
    # Few queries of many keys, as in decoding, are too few programs.
    parts = max(1, min(PROGRAMS // max(1, programs), call.key_length // MIN_KEYS))
    out = torch.empty(parts, *q.shape[:3], v.shape[3], dtype=v.dtype if parts == 1 else torch.float32, device=q.device)
    lse = torch.empty(parts, *q.shape[:3], dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out[0], lse[0]
    _forward_kernel[programs, parts](
        call.q,
        call.k,
        call.v,
        call.first,
        call.stop,
        call.is_real,
        out,
        lse,
        call.length,
        call.key_length,
        tiles,
        scale,
        softcap,
        *call.strides,
        *call.rows,
        **call.options,
        BM=rows,
        BN=keys,
    )
    if parts == 1:
        return out[0], lse[0]
    total = lse.logsumexp(0)
    weights = (lse - total.masked_fill(total == -torch.inf, 0)).exp()
    return (out * weights[..., None]).sum(0).to(v.dtype), total


def _backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    is_real: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    near: int,
    far: list[int],
    in_order: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    call = _Call(q, k, v, first, stop, is_real)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not lse.numel() or not call.key_length:
        return d_q.zero_(), d_k.zero_(), d_v.zero_()
    d_out = torch.zeros_like(out) if d_out is None else _with_rows(d_out)
    d_lse = None if d_lse is None else d_lse.contiguous()
    delta = torch.empty_like(lse)
    rows, keys = call.tiles.query
    tiles = call.row_tiles(rows)
    _query_kernel[call.grid(tiles)](
        call.q,
        call.k,
        call.v,
        call.first,
        call.stop,
        call.is_real,
        out,
        lse,
        d_out,
        d_lse,
        delta,
        d_q,
        call.length,
        call.key_length,
        tiles,
        scale,
        softcap,
        *call.strides,
        *call.rows,
        *d_out.stride()[:3],
        **call.options,
        BM=rows,
        BN=keys,
    )
    rows, keys = call.tiles.key
    tiles = call.row_tiles(rows)
    spans = torch.empty(4, *first.shape[:2], tiles, dtype=torch.int32, device=q.device)
    _span_kernel[(spans[0].numel(),)](
        call.first, call.stop, spans, call.length, tiles, G=call.shared, BM=rows, num_warps=1
    )
    slots = len(first)
    groups = [(0, min(near, slots), 0, call.key_length, 1, in_order)]
    if near < slots and far[0] < far[1]:
        groups.append((near, slots, far[0], far[1] - far[0], max(1, tiles // MIN_TILES), True))
    for slot_from, slot_to, key_from, number, parts, is_ordered in groups:
        key_tiles = triton.cdiv(number, keys)
        parts = min(parts, max(1, PROGRAMS // call.grid(key_tiles)[0]))
        d_keys, d_values = d_k[None], d_v[None]
        if slot_from:
            d_keys, d_values = (
                torch.empty(parts, x.shape[0], number, *x.shape[2:], dtype=torch.float32, device=x.device)
                for x in (k, v)
            )
        *seen, flag = _seen_by(spans[:, slot_from:slot_to], key_from, keys, key_tiles)
        launches: list[tuple[Tensor | None, bool]] = [(flag, True), (flag, False)]
        if is_ordered:
            launches = [(None, True)]
        # Beyond 128 the registers do not hold both sums.
        sums = [(True, True)] if call.options["BD"] <= 128 else [(True, False), (False, True)]
        for (asked, ordered), (for_k, for_v) in product(launches, sums):
            _key_kernel[*call.grid(key_tiles), parts](
                call.q,
                call.k,
                call.v,
                call.first,
                call.stop,
                call.is_real,
                spans,
                *seen,
                asked,
                lse,
                d_out,
                delta,
                d_keys,
                d_values,
                call.length,
                call.key_length,
                key_from,
                number,
                slot_from,
                slot_to,
                key_tiles,
                tiles,
                scale,
                softcap,
                *call.strides,
                *call.rows,
                *d_out.stride()[:3],
                **call.options,
                BM=rows,
                BN=keys,
                IN_ORDER=ordered,
                FOR_K=for_k,
                FOR_V=for_v,
            )
        if slot_from:
            d_k[:, far[0] : far[1]] += d_keys.sum(0)
            d_v[:, far[0] : far[1]] += d_values.sum(0)
    return d_q, d_k, d_v


def _seen_by(spans: Tensor, key_from: int, keys: int, key_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[R, B or 1, key_tiles]` int32, twice: the tiles of rows, from one to before another, that may see each tile of
    keys; and `[1]` int32, whether all of them do, as the spans are in order."""
    low, high = spans[0], spans[1]
    begins = key_from + keys * torch.arange(key_tiles, dtype=low.dtype, device=low.device)
    begins = begins.expand(*low.shape[:2], -1).contiguous()
    furthest = high.cummax(-1).values  # of the tiles of rows up to this one
    nearest = low.flip(-1).cummin(-1).values.flip(-1).contiguous()  # of those from this one on
    start = torch.searchsorted(furthest, begins, right=True, out_int32=True)
    stop = torch.searchsorted(nearest, begins + keys, out_int32=True)
    return start, stop, ((low >= high) | ((furthest == high) & (nearest == low))).all().int()[None]


_operator = torch.library.custom_op("zoo::interval_attention_triton_forward", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("zoo::interval_attention_triton_backward", _backward, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_operator.register_fake
def _(
    d_out: Tensor | None, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.near, ctx.far, ctx.in_order = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    options = ctx.scale, ctx.softcap, ctx.near, ctx.far, ctx.in_order
    return *_backward_operator(d_out, d_lse, *ctx.saved_tensors, *options), *[None] * 8


_operator.register_autograd(outside_autocast(_differentiate), setup_context=_save)
