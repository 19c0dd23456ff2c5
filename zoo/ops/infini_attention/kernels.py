# mypy: disable-error-code="assignment,no-untyped-def"
"""infini_attention on a GPU: attention within segments by softmax_attention, and the memory by kernels.

With s = sigma(k_mem), r = sigma(q_mem), E = (M, z) the memory that enters a segment, f = 1 where z is not 0 and else 0,
g = f sigmoid(gate):

    read     R_t = r_t M / (r_t z)                                o_t = A_dot + g (R_t - A_dot)
    write    v'_t = v_t - f s_t M / (s_t z)  (linear: v_t)        M += sum_t s_t^T v'_t,   z += sum_t s_t

and back, with G = (dM, dz) the gradient of the memory that a segment leaves:

    read     dN_t = g dO_t / (r_t z),  dn_t = -dN_t . R_t         dr_t = dN_t M^T + dn_t z
             dM += sum_t r_t^T dN_t,   dz += sum_t r_t dn_t       dgate = sum_t dO_t . (R_t - A_dot) g (1 - g)
    write    dv_t = s_t dM                                        ds_t = v'_t dM^T + dz
             delta besides: that v' is a read, whose dO is -dv and whose g is f

Every line is one of five kernels, most of which serve several of them:

    _read_kernel      x_t M, divided by x_t z or not, and what is made of it: R and o, v', dv
    _weights_kernel   of each reading token, dN_t = w_t dO_t and dn_t, and what its gate gets
    _features_kernel  y_t M^T + y'_t z, times sigma'(x_t): dq_mem and dk_mem
    _sum_kernel       sum_t x_t^T y_t and sum_t x_t y'_t over a segment
    _chain_kernel     sums of segments become the memories between them, or going back their gradients

Segments are computed all at once, but for the delta update's M: its segments follow each other, in two launches each.

Tiles are multiplied as in linear_attention/kernels.py: bfloat16 in bfloat16, float16 as float32 in TF32, float32 as it
is; memories are float32. With 32 rows on the left-hand side no product takes wgmma, nor a Triton bug with it.

Legend: N memories, H heads that read them, K and V the head dims, C tokens in a tile. A program has C tokens of one
head, or the states of one, and a tile of a head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.dispatch import backend, implements, outside_autocast
from zoo.ops.infini_attention import chunked
from zoo.ops.softmax_attention import softmax_attention
from zoo.ops.tiles import (
    Pieces,
    bound,
    load,
    load_state,
    pieces_of,
    place,
    rows_of,
    store_state,
    store_transposed,
    tf32_is_asked_for,
    tile_size,
)

MAX_DIM = 256


def _refuses(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> str | None:
    for x in (q, k, v):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(x.dtype).removeprefix('torch.')} inputs"
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return f"head dims above {MAX_DIM}"
    return None


@implements("infini_attention", "triton", refuses=_refuses)
def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    *,
    segment: int,
    delta: bool,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    new: bool,
    write_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, memory, normaliser)`; `new` promises an empty memory, and without `write_last` the one returned may lack
    what no query reads."""
    length, key_length = q.shape[1], k.shape[1]
    one_segment = new and key_length <= segment and not write_last
    if length == 1 or (one_segment and cu_seqlens is None):  # a few small products, or none
        with backend("auto"):
            return chunked.infini_attention(
                q, k, v, gate, q_mem, k_mem, memory, normaliser, segment=segment, delta=delta, cu_seqlens=cu_seqlens,
                key_mask=key_mask, new=new, write_last=write_last,
            )  # fmt: skip
    if key_mask is not None:
        # The rows' real tokens, laid end to end, are packed documents.
        real = key_mask.flatten().nonzero()[:, 0]
        if not len(real):
            return torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]), memory, normaliser
        documents = torch.nn.functional.pad(key_mask.sum(1).cumsum(0), (1, 0)).int()
        behind = (0, 0, 0, 0, key_length - length, 0)
        q, q_mem = (torch.nn.functional.pad(x, behind) for x in (q, q_mem))
        q, k, v, q_mem, k_mem = (x.flatten(0, 1).index_select(0, real)[None] for x in (q, k, v, q_mem, k_mem))
        rows, memory, normaliser = _unmasked(q, k, v, q_mem, k_mem, gate, memory, normaliser, segment, delta, documents)
        out = rows.new_zeros(key_mask.numel(), *rows.shape[2:]).index_copy(0, real, rows[0])
        return out.unflatten(0, key_mask.shape)[:, key_length - length :], memory, normaliser
    return _unmasked(q, k, v, q_mem, k_mem, gate, memory, normaliser, segment, delta, cu_seqlens)


def _unmasked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    gate: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    segment: int,
    delta: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with backend("auto"):  # who asks for triton means the memory
        if cu_seqlens is None:
            local = chunked.within_segments(q, k, v, segment)
        else:
            local = softmax_attention(q, k, v, cu_seqlens=_segment_bounds(cu_seqlens, q.shape[1], segment))
    shared = memory.shape[1] // v.shape[2]
    if shared > 1:  # every memory is written by itself
        k_mem, v = (x.repeat_interleave(shared, 2) for x in (k_mem, v))
    dtype = torch.promote_types(torch.promote_types(q_mem.dtype, k_mem.dtype), v.dtype)
    inputs = (x.to(dtype) for x in (local, q_mem, k_mem, v))
    out, memory, normaliser, *_ = _operator(*inputs, gate, memory, normaliser, segment, delta, cu_seqlens)
    return out.to(q.dtype), memory, normaliser


def _segment_bounds(cu_seqlens: Tensor, length: int, segment: int) -> Tensor:
    """Segments as documents of their own; some are empty, as how many there are stays on the device."""
    pieces = pieces_of(cu_seqlens.numel() - 1, length, segment, cu_seqlens)
    assert pieces.document is not None and pieces.first is not None
    index = torch.arange(pieces.number, device=cu_seqlens.device) - pieces.first[pieces.document]
    starts = torch.minimum(cu_seqlens[pieces.document] + index * segment, cu_seqlens[pieces.document + 1])
    return torch.cat([starts, cu_seqlens[-1:]]).int()


class _Tiles(NamedTuple):
    """Tokens in a tile, the largest tile of a head dim, and the warps of a program."""

    tokens: int
    dim: int
    warps: int


TENSOR_CORE = _Tiles(64, 32, 4)
# Unrolled into single multiplications, larger products take ptxas minutes and then do not fit the registers.
FLOAT32 = _Tiles(32, 16, 8)


@triton.jit
def _sigma(x):
    return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0)))


@triton.jit
def _features(x, token, inside, stride, dim, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """sigma of a tile [token, dim] of one head of x; 0 outside."""
    mask = inside[:, None] & (dim < DIM)[None, :]
    return tl.where(mask, _sigma(load(x, token, inside, stride, dim, DIM, tl.float32)), 0).to(DTYPE)


@triton.jit
def _normaliser(x, z, token, inside, stride, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """`[C]`: x_t z of a head's tokens, 1 where z is empty or no token is; and whether z is not empty."""
    total = tl.zeros([C], tl.float32)
    most = tl.zeros([BK], tl.float32)
    for begin in range(0, K, BK):
        k = begin + tl.arange(0, BK)
        z_tile = tl.load(z + k, mask=k < K, other=0)
        x_tile = _features(x, token, inside, stride, k, K, DTYPE)
        total += tl.sum(x_tile.to(tl.float32) * z_tile[None, :], 1)
        most = tl.maximum(most, tl.abs(z_tile))
    filled = tl.max(most, 0) > 0
    return tl.where(inside, tl.where(filled, total, 1), 1), filled


@triton.jit
def _product(x, states, index, token, inside, stride, v, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
             BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x_t M of a head's tokens, [v, token]."""
    result = tl.zeros([BV, C], tl.float32)
    for begin in range(0, K, BK):
        k = begin + tl.arange(0, BK)
        state = load_state(states, index, k, v, K, V, DTYPE)
        x_tile = _features(x, token, inside, stride, k, K, DTYPE)
        result = tl.dot(tl.trans(state), tl.trans(x_tile), result, input_precision=PRECISION)
    return result


@triton.jit
def _segment(index, chosen, document_of, first_of, cu_seqlens, length, size, past):
    """`(segment, document, start, tokens, first, last)` of the index-th segment, or if segments are `chosen` the
    index-th of them, of which -1 has no tokens. Queries begin `past` tokens behind the keys: `start` is the segment's
    first among all the queries, and its tokens before `first` are none."""
    segment = index.to(tl.int64)
    if chosen is not None:
        segment = tl.load(chosen + index)
    document, start, tokens, place_of, last = place(
        tl.maximum(segment, 0), document_of, first_of, cu_seqlens, length, size
    )
    tokens = tl.where(segment < 0, 0, tokens)
    return segment, document, start - (document + 1) * past, tokens, past - place_of * size, last


@triton.jit(do_not_specialize=["length", "size", "past"])
def _read_kernel(
    x,  # [., Hx, K]
    states,  # [segments, N, K, V]
    zs,  # [segments, N, K]; None does not divide
    local,  # [., Hx, V]: what is mixed in, or subtracted from; None is the product alone
    gate,  # [Hx]; None subtracts
    out,  # [., Hx, V]
    chosen, document_of, first_of, cu_seqlens, length, size, past,
    stride_x, stride_x_head, stride_local, stride_local_head,
    NX: tl.constexpr, N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    COMPLETE: tl.constexpr,  # whether segments that are not are left out
):  # fmt: skip
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    v = (program % tiles_v) * BV + tl.arange(0, BV)
    program = program // tiles_v
    head = (program % NX).to(tl.int64)
    program = program // NX
    chunks = tl.cdiv(size, C)
    begin = (program % chunks) * C
    segment, _d, start, tokens, first, _l = _segment(
        program // chunks, chosen, document_of, first_of, cu_seqlens, length, size, past
    )
    if (begin >= tokens) | (begin + C <= first) | ((tokens < size) & COMPLETE):
        return
    step = begin + tl.arange(0, C)
    inside = (step < tokens) & (step >= first)
    token = start + step
    memory = segment * N + head // (NX // N)
    x += head * stride_x_head
    result = _product(x, states, memory, token, inside, stride_x, v, K, V, C, BK, BV, DTYPE, PRECISION)
    if zs is not None:
        norm, filled = _normaliser(x, zs + memory * K, token, inside, stride_x, K, C, BK, DTYPE)
        result = tl.where(filled, result / norm[None, :], 0)
        if gate is not None:
            other = tl.trans(load(local + head * stride_local_head, token, inside, stride_local, v, V, tl.float32))
            share = tl.where(filled, tl.sigmoid(tl.load(gate + head)), 0)
            result = other + share * (result - other)
        else:
            result = -result
            if local is not None:
                result += tl.trans(
                    load(local + head * stride_local_head, token, inside, stride_local, v, V, tl.float32)
                )
    store_transposed(out + head * V, token, inside, NX * V, v, V, result)


@triton.jit(do_not_specialize=["length", "size", "past"])
def _weights_kernel(
    x,  # [., Hx, K]
    states,  # [segments, N, K, V]
    zs,  # [segments, N, K]
    local,  # [., Hx, V]; None, with `gate`, for g = -f
    gate,  # [Hx]
    d_out,  # [., Hx, V]
    d_local,  # [., Hx, V]
    weights,  # [., Hx]: w_t
    d_norms,  # [., Hx]: dn_t
    d_gates,  # [., Hx]
    document_of, first_of, cu_seqlens, length, size, past,
    stride_x, stride_x_head, stride_local, stride_local_head, stride_d_out, stride_d_out_head,
    NX: tl.constexpr, N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, COMPLETE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program % NX).to(tl.int64)
    program = program // NX
    chunks = tl.cdiv(size, C)
    begin = (program % chunks) * C
    segment, _d, start, tokens, first, _l = _segment(
        program // chunks, None, document_of, first_of, cu_seqlens, length, size, past
    )
    if (begin >= tokens) | (begin + C <= first) | ((tokens < size) & COMPLETE):
        return
    step = begin + tl.arange(0, C)
    inside = (step < tokens) & (step >= first)
    token = start + step
    memory = segment * N + head // (NX // N)
    x += head * stride_x_head
    d_out += head * stride_d_out_head
    norm, filled = _normaliser(x, zs + memory * K, token, inside, stride_x, K, C, BK, DTYPE)
    share = tl.where(filled, -1.0, 0.0)
    if gate is not None:
        share = tl.where(filled, tl.sigmoid(tl.load(gate + head)), 0)
    read = tl.zeros([C], tl.float32)
    alone = tl.zeros([C], tl.float32)
    for start_v in range(0, V, BV):
        v = start_v + tl.arange(0, BV)
        result = _product(x, states, memory, token, inside, stride_x, v, K, V, C, BK, BV, DTYPE, PRECISION)
        grad = tl.trans(load(d_out, token, inside, stride_d_out, v, V, tl.float32))
        result = tl.where(filled, result / norm[None, :], 0)
        read += tl.sum(grad * result, 0)
        if gate is not None:
            other = tl.trans(load(local + head * stride_local_head, token, inside, stride_local, v, V, tl.float32))
            alone += tl.sum(tl.where(filled, grad * (result - other), 0), 0)
            store_transposed(d_local + head * V, token, inside, NX * V, v, V, grad * (1 - share))
    at = token * NX + head
    tl.store(weights + at, share / norm, mask=inside)
    tl.store(d_norms + at, -share * read / norm, mask=inside)
    if gate is not None:
        tl.store(d_gates + at, alone * share * (1 - share), mask=inside)


@triton.jit(do_not_specialize=["length", "size", "past"])
def _features_kernel(
    x,  # [., Hx, K]
    y,  # [., Hx, V]
    weights,  # [., Hx]: of y; None is 1
    norms,  # [., Hx]: y'; None is 1
    states,  # [segments, N, K, V]
    zs,  # [segments, N, K]
    dx,  # [., Hx, K], float32 if added to
    document_of, first_of, cu_seqlens, length, size, past,
    stride_x, stride_x_head, stride_y, stride_y_head,
    NX: tl.constexpr, N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, COMPLETE: tl.constexpr,
    ADD: tl.constexpr,  # to what dx holds
):  # fmt: skip
    tiles_k: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    k = (program % tiles_k) * BK + tl.arange(0, BK)
    program = program // tiles_k
    head = (program % NX).to(tl.int64)
    program = program // NX
    chunks = tl.cdiv(size, C)
    begin = (program % chunks) * C
    segment, _d, start, tokens, first, _l = _segment(
        program // chunks, None, document_of, first_of, cu_seqlens, length, size, past
    )
    if (begin >= tokens) | (begin + C <= first) | ((tokens < size) & COMPLETE):
        return
    step = begin + tl.arange(0, C)
    inside = (step < tokens) & (step >= first)
    token = start + step
    memory = segment * N + head // (NX // N)
    weight = tl.full([C], 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + token * NX + head, mask=inside, other=0)
    norm = tl.full([C], 1.0, tl.float32)
    if norms is not None:
        norm = tl.load(norms + token * NX + head, mask=inside, other=0)
    result = tl.zeros([BK, C], tl.float32)
    for start_v in range(0, V, BV):
        v = start_v + tl.arange(0, BV)
        state = load_state(states, memory, k, v, K, V, DTYPE)
        y_tile = load(y + head * stride_y_head, token, inside, stride_y, v, V, tl.float32)
        y_tile = (y_tile * weight[:, None]).to(DTYPE)
        result = tl.dot(state, tl.trans(y_tile), result, input_precision=PRECISION)
    z = tl.load(zs + memory * K + k, mask=k < K, other=0)
    result += z[:, None] * norm[None, :]
    x_tile = load(x + head * stride_x_head, token, inside, stride_x, k, K, tl.float32)
    result *= tl.trans(tl.where(x_tile > 0, 1, tl.exp(tl.minimum(x_tile, 0))))
    if ADD:
        result += tl.trans(load(dx + head * K, token, inside, NX * K, k, K, tl.float32))
    store_transposed(dx + head * K, token, inside, NX * K, k, K, result)


@triton.jit(do_not_specialize=["length", "size", "past", "step_to_next"])
def _sum_kernel(
    x,  # [., Hx, K]
    y,  # [., Hx, V]; None has no `sums`
    weights,  # [., Hx]: of y; None is 1
    norms,  # [., Hx]: y'; None is 1
    sums,  # [segments, N, K, V]
    z_sums,  # [segments, N, K]; None for no sums of y'
    added,  # [segments, N, K, V]: what else the memory gets; None is nothing
    leaving,  # [documents, N, K, V]: behind a document's last segment
    chosen, document_of, first_of, cu_seqlens, length, size, past, step_to_next,
    stride_x, stride_x_head, stride_y, stride_y_head,
    NX: tl.constexpr, N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, COMPLETE: tl.constexpr,
):  # fmt: skip
    """The sums of every segment; of `chosen` ones, `sums` holds what enters them, and the segment `step_to_next`
    further gets that and the sum."""
    tiles_v: tl.constexpr = (V + BV - 1) // BV if y is not None else 1
    tiles_k: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    tile_v = program % tiles_v
    v = tile_v * BV + tl.arange(0, BV)
    program = program // tiles_v
    k = (program % tiles_k) * BK + tl.arange(0, BK)
    program = program // tiles_k
    memory = (program % N).to(tl.int64)
    segment, document, start, tokens, first, last = _segment(
        program // N, chosen, document_of, first_of, cu_seqlens, length, size, past
    )
    if segment < 0:
        return
    tokens = tl.maximum(tokens, 0)
    if COMPLETE:
        tokens = tl.where(tokens < size, 0, tokens)
    total = tl.zeros([BK, BV], tl.float32)
    z_total = tl.zeros([BK], tl.float32)
    heads: tl.constexpr = NX // N
    for n in range(0, heads * tl.cdiv(tokens, C)):
        head = memory * heads + n % heads
        step = (n // heads) * C + tl.arange(0, C)
        inside = (step < tokens) & (step >= first)
        token = start + step
        x_tile = _features(x + head * stride_x_head, token, inside, stride_x, k, K, DTYPE)
        if y is not None:
            y_tile = load(y + head * stride_y_head, token, inside, stride_y, v, V, DTYPE)
            if weights is not None:
                weight = tl.load(weights + token * NX + head, mask=inside, other=0)
                y_tile = (y_tile.to(tl.float32) * weight[:, None]).to(DTYPE)
            total = tl.dot(tl.trans(x_tile), y_tile, total, input_precision=PRECISION)
        if z_sums is not None:
            if norms is None:
                z_total += tl.sum(x_tile.to(tl.float32), 0)
            else:
                norm = tl.load(norms + token * NX + head, mask=inside, other=0)
                z_total += tl.sum(x_tile.to(tl.float32) * norm[:, None], 0)
    at = segment * N + memory
    if z_sums is not None:
        tl.store(z_sums + at * K + k, z_total, mask=(k < K) & (tile_v == 0))
    if y is not None:
        if chosen is None:
            store_state(sums, at, k, v, K, V, total)
        else:
            total += load_state(sums, at, k, v, K, V, tl.float32)
            if added is not None:
                total += load_state(added, at, k, v, K, V, tl.float32)
            if first_of is None:
                begins = segment % tl.cdiv(length, size) == 0
            else:
                begins = segment == tl.load(first_of + document)
            if tl.where(step_to_next > 0, last, begins):
                store_state(leaving, document * N + memory, k, v, K, V, total)
            else:
                store_state(sums, at + step_to_next * N, k, v, K, V, total)


@triton.jit(do_not_specialize=["per_row"])
def _chain_kernel(
    sums,  # [segments, N, STATE]: what each segment adds; becomes what enters it, or going back leaves it
    entering,  # [documents, N, STATE]; None is zeros
    leaving,  # [documents, N, STATE]
    first_of,
    per_row,
    N: tl.constexpr,
    STATE: tl.constexpr,
    TILE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The segments of a document in turn."""
    tiles: tl.constexpr = (STATE + TILE - 1) // TILE
    program = tl.program_id(0)
    at = (program % tiles) * TILE + tl.arange(0, TILE)
    program = program // tiles
    memory = program % N
    document = (program // N).to(tl.int64)
    if first_of is None:
        first = document * per_row
        count = per_row
    else:
        first = tl.load(first_of + document)
        count = tl.load(first_of + document + 1) - first
    state = tl.zeros([TILE], tl.float32)
    if entering is not None:
        state += tl.load(entering + (document * N + memory) * STATE + at, mask=at < STATE, other=0)
    for n in range(0, count):
        here = sums + ((first + (count - 1 - n if REVERSE else n)) * N + memory) * STATE + at
        added = tl.load(here, mask=at < STATE, other=0)
        tl.store(here, state, mask=at < STATE)
        state += added
    tl.store(leaving + (document * N + memory) * STATE + at, state, mask=at < STATE)


class _Side(NamedTuple):
    """Tokens `[., heads, dim]` that read or write, of which the first stands `past` tokens behind a segment's start;
    writers write complete segments only."""

    x: Tensor
    past: int
    writes: bool

    def new(self, width: int, dtype: torch.dtype) -> Tensor:
        """For a result of each token; what no kernel comes to is 0."""
        make = self.x.new_zeros if self.writes else self.x.new_empty
        return make(*self.x.shape[:2], width, dtype=dtype)


class _Call:
    """The sizes of a call, and the launches. Memories between segments are `[segments, N, K, V]`."""

    def __init__(
        self, q_mem: Tensor, k_mem: Tensor, v: Tensor, memories: int, segment: int, cu_seqlens: Tensor | None
    ) -> None:
        self.batch, length = k_mem.shape[:2]
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.documents = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.length, self.memories, self.key_dim, self.value_dim = length, memories, q_mem.shape[3], v.shape[3]
        self.segments: Pieces = pieces_of(self.documents, length, segment, self.cu_seqlens)
        self.readers = _Side(rows_of(q_mem), length - q_mem.shape[1], False)
        self.writers = _Side(rows_of(k_mem), 0, True)
        self.wide = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
        self.tiles = FLOAT32 if v.dtype == torch.float32 else TENSOR_CORE
        self.block_k, self.block_v = (tile_size(dim, self.tiles.dim) for dim in (self.key_dim, self.value_dim))
        self.options = {
            "N": memories,
            "K": self.key_dim,
            "V": self.value_dim,
            "C": self.tiles.tokens,
            "BK": self.block_k,
            "BV": self.block_v,
            "DTYPE": tl.bfloat16 if self.wide == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32" if v.dtype == torch.float16 or tf32_is_asked_for() else "ieee",
            "num_warps": self.tiles.warps,
        }

    def _places(self, side: _Side) -> tuple[Any, ...]:
        segments = self.segments
        return segments.document, segments.first, self.cu_seqlens, self.length, segments.size, side.past

    def _options(self, side: _Side) -> dict[str, Any]:
        return {**self.options, "NX": side.x.shape[1], "COMPLETE": side.writes}

    def _programs(self, side: _Side, segments: int) -> int:
        return segments * triton.cdiv(self.segments.size, self.tiles.tokens) * side.x.shape[1]

    def new_states(self, z: bool = False) -> Tensor:
        state = (self.key_dim,) if z else (self.key_dim, self.value_dim)
        return self.readers.x.new_empty(self.segments.number, self.memories, *state, dtype=torch.float32)

    def read(
        self,
        side: _Side,
        states: Tensor,
        zs: Tensor | None,
        out: Tensor,
        local: Tensor | None = None,
        gate: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        programs = self._programs(side, self.segments.number if chosen is None else len(chosen))
        _read_kernel[(programs * triton.cdiv(self.value_dim, self.block_v),)](
            side.x, states, zs, local, gate, out, chosen, *self._places(side), *side.x.stride()[:2],
            *((0, 0) if local is None else local.stride()[:2]), **self._options(side),
        )  # fmt: skip
        return out

    def weights(
        self, side: _Side, states: Tensor, zs: Tensor, d_out: Tensor, local: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """w, dn, and where there is a gate what each token's gate gets and dlocal."""
        weights, d_norms = (side.new(1, torch.float32) for _ in range(2))
        d_gates = d_local = None
        if local is not None:
            d_gates, d_local = (
                side.new(1, torch.float32),
                torch.empty_like(local, memory_format=torch.contiguous_format),
            )
        _weights_kernel[(self._programs(side, self.segments.number),)](
            side.x, states, zs, local, gate, d_out, d_local, weights, d_norms, d_gates, *self._places(side),
            *side.x.stride()[:2], *((0, 0) if local is None else local.stride()[:2]), *d_out.stride()[:2],
            **self._options(side),
        )  # fmt: skip
        return weights, d_norms, d_gates, d_local

    def features(
        self,
        side: _Side,
        y: Tensor,
        weights: Tensor | None,
        norms: Tensor | None,
        states: Tensor,
        zs: Tensor,
        dx: Tensor,
        add: bool = False,
    ) -> Tensor:
        programs = self._programs(side, self.segments.number) * triton.cdiv(self.key_dim, self.block_k)
        _features_kernel[(programs,)](
            side.x, y, weights, norms, states, zs, dx, *self._places(side), *side.x.stride()[:2], *y.stride()[:2],
            **self._options(side), ADD=add,
        )  # fmt: skip
        return dx

    def sum(
        self,
        side: _Side,
        y: Tensor | None = None,
        weights: Tensor | None = None,
        norms: Tensor | None = None,
        sums: Tensor | None = None,
        z_sums: Tensor | None = None,
        added: Tensor | None = None,
        leaving: Tensor | None = None,
        chosen: Tensor | None = None,
        step_to_next: int = 0,
    ) -> None:
        segments = self.segments.number if chosen is None else len(chosen)
        tiles = triton.cdiv(self.key_dim, self.block_k)
        tiles *= 1 if y is None else triton.cdiv(self.value_dim, self.block_v)
        _sum_kernel[(segments * self.memories * tiles,)](
            side.x, y, weights, norms, sums, z_sums, added, leaving, chosen, *self._places(side), step_to_next,
            *side.x.stride()[:2], *((0, 0) if y is None else y.stride()[:2]), **self._options(side),
        )  # fmt: skip

    def chain(self, sums: Tensor, entering: Tensor | None, reverse: bool = False) -> Tensor:
        """`sums` becomes what enters each segment (in reverse, what leaves it); returns what leaves the documents."""
        state, tile = sums[0, 0].numel(), 512
        leaving = sums.new_empty(self.documents, *sums.shape[1:])
        _chain_kernel[(self.documents * self.memories * triton.cdiv(state, tile),)](
            sums, None if entering is None else entering.contiguous(), leaving, self.segments.first,
            triton.cdiv(self.length, self.segments.size), N=self.memories, STATE=state, TILE=tile, REVERSE=reverse,
        )  # fmt: skip
        return leaving

    def walk(
        self, zs: Tensor, entering: Tensor, v: Tensor | None = None, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The delta update from segment to segment, `v` written: what enters each, and what leaves the documents. Going
        back nothing is written, but the memory gets what is `added` after each segment: then what leaves each."""
        states, leaving = self.new_states(), entering.new_empty(entering.shape)
        steps, ends = self._steps()
        forward = v is not None
        states[steps[0] if forward else ends] = entering
        values = self.writers.new(self.value_dim, self.wide)
        for chosen in steps if forward else steps.flip(0):
            self.read(self.writers, states, zs, values, v, chosen=chosen)
            self.sum(
                self.writers, values, sums=states, added=added, leaving=leaving, chosen=chosen,
                step_to_next=1 if forward else -1,
            )  # fmt: skip
        return states, leaving

    def _steps(self) -> tuple[Tensor, Tensor]:
        """`[most, documents]`: the n-th segment of each document, -1 behind its last; and `[documents]`, the last."""
        first = self.segments.first
        if first is None:
            per_row = triton.cdiv(self.length, self.segments.size)
            rows = torch.arange(self.documents, device=self.readers.x.device) * per_row
            return torch.arange(per_row, device=rows.device)[:, None] + rows, rows + (per_row - 1)
        counts = first.diff()
        index = torch.arange(int(counts.max()), device=first.device)[:, None]
        return torch.where(index < counts, first[:-1] + index, -1), first[1:] - 1


def _forward(
    local: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    v: Tensor,
    gate: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    segment: int,
    delta: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, the memory behind the last segments, and that before each."""
    call = _Call(q_mem, k_mem, v, memory.shape[1], segment, cu_seqlens)
    v, zs = rows_of(v), call.new_states(z=True)
    if delta:
        call.sum(call.writers, z_sums=zs)
        z = call.chain(zs, normaliser)
        states, m = call.walk(zs, memory, v)
    else:
        states = call.new_states()
        call.sum(call.writers, v, sums=states, z_sums=zs)
        z, m = call.chain(zs, normaliser), call.chain(states, memory)
    out = local.new_empty(local.shape)
    call.read(call.readers, states, zs, out, rows_of(local), gate.contiguous())
    return out, m, z, states, zs


def _backward(
    d_out: Tensor | None,
    d_m: Tensor | None,
    d_z: Tensor | None,
    local: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    v: Tensor,
    gate: Tensor,
    states: Tensor,
    zs: Tensor,
    segment: int,
    delta: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of local, q_mem, k_mem, v, gate, the memory and its normaliser."""
    call = _Call(q_mem, k_mem, v, states.shape[1], segment, cu_seqlens)
    readers, writers, dtype, key_dim = call.readers, call.writers, v.dtype, call.key_dim
    d_out = rows_of(torch.zeros_like(local) if d_out is None else d_out)
    v_rows = rows_of(v)
    w, d_norms, d_gates, d_local = call.weights(readers, states, zs, d_out, rows_of(local), gate.contiguous())
    assert d_gates is not None and d_local is not None
    dq = call.features(readers, d_out, w, d_norms, states, zs, readers.new(key_dim, dtype))
    d_states, d_zs = call.new_states(), call.new_states(z=True)
    call.sum(readers, d_out, w, d_norms, d_states, d_zs)
    dk = writers.new(key_dim, torch.float32 if delta else dtype)
    if delta:
        if d_m is None:
            d_m = states.new_zeros(call.documents, *states.shape[1:])
        d_states, d_memory = call.walk(zs, d_m, added=d_states)
        dv = call.read(writers, d_states, None, writers.new(call.value_dim, dtype))
        w, d_norms, *_ = call.weights(writers, states, zs, dv, None, None)
        dk = call.features(writers, dv, w, d_norms, states, zs, dk)
        d_written = torch.empty_like(d_zs)
        call.sum(writers, norms=d_norms, z_sums=d_written)
        d_zs += d_written
        v_rows = call.read(writers, states, zs, writers.new(call.value_dim, call.wide), v_rows)
    else:
        d_memory = call.chain(d_states, d_m, reverse=True)
        dv = call.read(writers, d_states, None, writers.new(call.value_dim, dtype))
    d_normaliser = call.chain(d_zs, d_z, reverse=True)
    dk = call.features(writers, v_rows, None, None, d_states, d_zs, dk, add=delta)
    return (
        d_local.view(local.shape),
        dq.view(q_mem.shape),
        dk.to(dtype).view(k_mem.shape),
        dv.view(v.shape),
        d_gates.sum((0, 2)),
        d_memory,
        d_normaliser,
    )


_operator = torch.library.custom_op("zoo::infini_attention_triton_forward", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("zoo::infini_attention_triton_backward", _backward, mutates_args=())


@_operator.register_fake
def _(
    local: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    v: Tensor,
    gate: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    segment: int,
    delta: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    length = k_mem.shape[1]
    if cu_seqlens is None:
        segments = k_mem.shape[0] * ((length + segment - 1) // segment)
    else:
        segments = bound(cu_seqlens.numel() - 1, length, segment)
    ends = memory.new_empty(memory.shape), normaliser.new_empty(normaliser.shape)
    between = memory.new_empty(segments, *memory.shape[1:]), memory.new_empty(segments, *normaliser.shape[1:])
    return local.new_empty(local.shape), *ends, *between


@_backward_operator.register_fake
def _(
    d_out: Tensor | None,
    d_m: Tensor | None,
    d_z: Tensor | None,
    local: Tensor,
    q_mem: Tensor,
    k_mem: Tensor,
    v: Tensor,
    gate: Tensor,
    states: Tensor,
    zs: Tensor,
    segment: int,
    delta: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    documents = k_mem.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    tokens = (x.new_empty(x.shape) for x in (local, q_mem, k_mem, v))
    memory = (x.new_empty(documents, *x.shape[1:]) for x in (states, zs))
    d_local, dq, dk, dv = tokens
    d_memory, d_normaliser = memory
    return d_local, dq, dk, dv, gate.new_empty(gate.shape), d_memory, d_normaliser


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    local, q_mem, k_mem, v, gate, _, _, ctx.segment, ctx.delta, cu_seqlens = inputs
    states, zs = output[3:]
    ctx.mark_non_differentiable(states, zs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(local, q_mem, k_mem, v, gate, states, zs, cu_seqlens)


def _differentiate(
    ctx: Any, d_out: Tensor | None, d_m: Tensor | None, d_z: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    gradients = _backward_operator(d_out, d_m, d_z, *tensors, ctx.segment, ctx.delta, cu_seqlens)
    return *gradients, None, None, None


_operator.register_autograd(outside_autocast(_differentiate), setup_context=_save)
