# mypy: disable-error-code="assignment,no-untyped-def"
"""linear_attention on a GPU: chunks of the sequence side by side, joined by the states between them.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T ;  o_t = scale q_t S_t

With the names of chunked.py (c_i the log decays summed up to token i, E the state that enters a chunk, Y the one that
leaves it) and D_ij = e^{c_i - c_j} for j <= i, a chunk computes

    Y    = e^{c_C} E + sum_j e^{c_C - c_j} k_j v_j^T
    dE   = e^{c_C} dY + scale sum_i e^{c_i} q_i dO_i^T

    o_i  = scale (sum_j D_ij (q_i . k_j) v_j + e^{c_i} E^T q_i)
    dv_j = scale sum_i D_ij (q_i . k_j) dO_i + e^{c_C - c_j} dY^T k_j

    dq_i = scale (sum_j D_ij (dO_i . v_j) k_j + e^{c_i} E dO_i)
    dk_j = scale sum_i D_ij (dO_i . v_j) q_i + e^{c_C - c_j} dY v_j

The second of each pair is the first with time reversed, and one kernel serves both:

    _walk_kernel      E of every chunk, one after another; going back, dY
    _chain_kernel     the same from segment to segment, where whole documents are too few programs to fill the GPU
    _mix_kernel       o, all chunks at once; going back, dv
    _gradient_kernel  dq, dk and the gradient of g, all chunks at once

A product of two tiles that has a computed tile among its operands takes it as the right-hand one, hence results come
transposed, [dim, token]. For the tensor cores of Hopper the left-hand one would stay in registers, where Triton before
3.7.1 and ptxas before CUDA 13.3 corrupt it (flash-linear-attention issue 640, triton issues 9433 and 11781).

Operands are bfloat16 for bfloat16 inputs, and so are the states in memory; the state that is carried on stays in
float32. Float16, whose range is too small for states and scores, becomes float32 with products in TF32, which cuts
nothing off a float16. Float32 is multiplied as it is.

Legend: N tokens of all rows, G groups of q and k heads, H heads, K and V the head dims, C tokens in a chunk. A program
has a tile of BK x BV of K x V, and of HEADS heads that share q and k one after another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.dispatch import implements, outside_autocast
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
# Four programs for each of an H100's 132 multiprocessors.
PROGRAMS = 528
# Tokens; cutting documents into shorter segments costs more than it saves.
MIN_SEGMENT = 2048
LOG2E = tl.constexpr(1.4426950408889634)


def _refuses(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    for x in (q, k, v):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(x.dtype).removeprefix('torch.')} inputs"
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return f"head dims above {MAX_DIM}"
    return None


@implements("linear_attention", "triton", refuses=_refuses)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out_dtype = v.dtype
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    inputs = (q, k, v, log_decay, initial_state)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    # Calling an operator takes longer than a token's kernel, so decoding goes without.
    call = _operator if differentiable or torch.compiler.is_compiling() else _forward
    out, state, _ = call(*inputs, scale, cu_seqlens, differentiable)
    return out.to(out_dtype), state


class _Tiles(NamedTuple):
    """Tokens in a chunk, the largest tile of a head dim, that of `_mix_kernel`, and the warps of a program."""

    chunk: int
    dim: int
    mix_dim: int
    warps: int


# Tiles of 64 and more are multiplied by wgmma, Hopper's own. Tiles of 32 in every direction keep it away, since Triton
# 3.6 and 3.7 let it read past the end of such (triton issues 10486 and 11366).
WGMMA = _Tiles(64, 64, 128, 4)
TENSOR_CORE = _Tiles(32, 32, 32, 4)
# Unrolled into single multiplications, larger products take ptxas minutes and then do not fit the registers.
FLOAT32 = _Tiles(32, 16, 16, 8)


def _tiles(dtype: torch.dtype, key_dim: int, value_dim: int) -> _Tiles:
    if dtype == torch.float32:
        return FLOAT32
    return WGMMA if dtype == torch.bfloat16 and min(key_dim, value_dim) > 32 else TENSOR_CORE


@triton.jit
def _slope(log_decay, head, PER_TOKEN: tl.constexpr):
    """The binary log decay of a head's every token, if they are alike."""
    return 0.0 if PER_TOKEN else tl.load(log_decay + head) * LOG2E


@triton.jit
def _decays(slope, log_decay, start, tokens, head, H: tl.constexpr, C: tl.constexpr, PER_TOKEN: tl.constexpr):
    """`(high, low, into, out_of, total)` of a chunk. Logarithms are binary.

    into     [C]  e^{c_i}, from the chunk's start to each token
    out_of   [C]  e^{c_C - c_j}, from each token to the chunk's end
    total         the whole chunk's log decay
    high, low     [C], whose sum is c where tokens differ: a difference of two float32 sums of strong decays has lost
                  the weak ones between them
    """
    step = tl.arange(0, C)
    if PER_TOKEN:
        g = tl.load(log_decay + (start + step) * H + head, mask=step < tokens, other=0).to(tl.float64) * LOG2E
        sums = tl.cumsum(g, 0)
        whole = tl.sum(g, 0)
        high = sums.to(tl.float32)
        low = (sums - high.to(tl.float64)).to(tl.float32)
        into = tl.exp2(high)
        out_of = tl.exp2(tl.minimum((whole - sums).to(tl.float32), 0))
        total = whole.to(tl.float32)
    else:
        high = step.to(tl.float32)
        low = high
        into = tl.exp2(slope * (step + 1))
        out_of = tl.exp2(slope * tl.maximum(tokens - 1 - step, 0))
        total = slope * tokens
    return high, low, into, out_of, total


@triton.jit
def _within(slope, high, low, C: tl.constexpr, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr):
    """D^T [j, i], or D [i, j] in REVERSE."""
    step = tl.arange(0, C)
    if REVERSE:
        distance = step[:, None] - step[None, :]
        exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    else:
        distance = step[None, :] - step[:, None]
        exponent = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
    if PER_TOKEN:
        exponent = tl.minimum(exponent, 0)
    else:
        exponent = slope * tl.maximum(distance, 0)
    return tl.where(distance >= 0, tl.exp2(exponent), 0)


@triton.jit(do_not_specialize=["length", "size"])
def _walk_kernel(
    x,  # [N, G, K]: k, or q going back
    y,  # [N, H, V]: v, or dO going back
    log_decay,  # [H] or [N, H]
    entering,  # [segments, H, K, V]: what each segment begins with; None is zeros
    states,  # [chunks, H, K, V]: what each chunk begins with
    leaving,  # [documents, H, K, V]; in a SUMMARY [segments, H, K, V]
    totals,  # [segments, H]: in a SUMMARY, the log decay of each segment
    document_of,
    first_of,
    first_chunk_of,
    cu_seqlens,
    length,
    size,
    scale,
    stride_x,
    stride_x_head,
    stride_y,
    stride_y_head,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """A segment from chunk to chunk. A SUMMARY begins at zero and keeps only where it arrives; it leaves out the
    segments that no other of their document follows."""
    tiles_k: tl.constexpr = (K + BK - 1) // BK
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    v = (program % tiles_v) * BV + tl.arange(0, BV)
    program = program // tiles_v
    k = (program % tiles_k) * BK + tl.arange(0, BK)
    program = program // tiles_k
    head = (program % H).to(tl.int64)
    document, start, tokens, index, last = place(program // H, document_of, first_of, cu_seqlens, length, size)
    segment = (program // H).to(tl.int64)
    if REVERSE:
        last = index == 0
    if ((tokens <= 0) & (index > 0)) | (last & SUMMARY):
        return
    if first_chunk_of is None:
        chunk = document * tl.cdiv(length, C) + index * (size // C)
    else:
        chunk = tl.load(first_chunk_of + document) + index * (size // C)

    x += (head // (H // G)) * stride_x_head
    y += head * stride_y_head
    state = tl.zeros([BK, BV], tl.float32)
    if entering is not None:
        state += load_state(entering, segment * H + head, k, v, K, V, tl.float32)
    slope = _slope(log_decay, head, PER_TOKEN)
    passed = 0.0
    chunks = tl.cdiv(tokens, C)
    for n in range(0, chunks):
        i = chunks - 1 - n if REVERSE else n
        if states is not None:
            store_state(states, (chunk + i) * H + head, k, v, K, V, state)
        here = start + i * C
        left = tl.minimum(tokens - i * C, C)
        step = tl.arange(0, C)
        x_tile = load(x, here + step, step < left, stride_x, k, K, DTYPE)
        y_tile = load(y, here + step, step < left, stride_y, v, V, DTYPE)
        _high, _low, into, out_of, total = _decays(slope, log_decay, here, left, head, H, C, PER_TOKEN)
        weight = into * scale if REVERSE else out_of
        y_tile = (y_tile * weight[:, None]).to(DTYPE)
        state = tl.dot(tl.trans(x_tile), y_tile, state * tl.exp2(total), input_precision=PRECISION)
        passed += total
    if SUMMARY:
        store_state(leaving, segment * H + head, k, v, K, V, state)
        tl.store(totals + segment * H + head, passed)
    elif last:
        store_state(leaving, document * H + head, k, v, K, V, state)


@triton.jit(do_not_specialize=["per_row"])
def _chain_kernel(
    states,  # [segments, H, STATE]: what each segment adds; becomes what each begins with
    totals,  # [segments, H]
    entering,  # [documents, H, STATE]; None is zeros
    first_of,
    per_row,
    H: tl.constexpr,
    STATE: tl.constexpr,
    TILE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The segments of a document in turn."""
    tiles: tl.constexpr = (STATE + TILE - 1) // TILE
    program = tl.program_id(0)
    at = (program % tiles) * TILE + tl.arange(0, TILE)
    program = program // tiles
    head = program % H
    document = (program // H).to(tl.int64)
    if first_of is None:
        first = document * per_row
        count = per_row
    else:
        first = tl.load(first_of + document)
        count = tl.load(first_of + document + 1) - first
    state = tl.zeros([TILE], tl.float32)
    if entering is not None:
        state += tl.load(entering + (document * H + head) * STATE + at, mask=at < STATE, other=0)
    for n in range(0, count):
        index = (first + (count - 1 - n if REVERSE else n)) * H + head
        there = (at < STATE) & (n < count - 1)
        added = tl.load(states + index * STATE + at, mask=there, other=0)
        total = tl.load(totals + index, mask=n < count - 1, other=0)
        tl.store(states + index * STATE + at, state, mask=at < STATE)
        state = state * tl.exp2(total) + added


@triton.jit(do_not_specialize=["length"])
def _mix_kernel(
    x,  # [N, G, K]: q, or k going back
    s,  # [N, G, K]: k, or q going back
    y,  # [N, H, V]: v, or dO going back
    log_decay,  # [H] or [N, H]
    states,  # [chunks, H, K, V]: E, or dY going back
    out,  # [N, H, V]: o, or dv going back
    document_of,
    first_of,
    cu_seqlens,
    length,
    scale,
    stride_x,
    stride_x_head,
    stride_s,
    stride_s_head,
    stride_y,
    stride_y_head,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    REVERSE: tl.constexpr,
):
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    v = (program % tiles_v) * BV + tl.arange(0, BV)
    program = program // tiles_v
    first_head = (program % (H // HEADS)).to(tl.int64) * HEADS
    _, start, tokens, _, _ = place(program // (H // HEADS), document_of, first_of, cu_seqlens, length, C)
    if tokens <= 0:
        return
    chunk = (program // (H // HEADS)).to(tl.int64)

    group = first_head // (H // G)
    step = tl.arange(0, C)
    token = start + step
    inside = step < tokens
    scores = tl.zeros([C, C], tl.float32)
    x_tiles = ()
    for begin in tl.static_range(0, K, BK):
        k = begin + tl.arange(0, BK)
        x_tile = load(x + group * stride_x_head, token, inside, stride_x, k, K, DTYPE)
        s_tile = load(s + group * stride_s_head, token, inside, stride_s, k, K, DTYPE)
        scores = tl.dot(s_tile, tl.trans(x_tile), scores, input_precision=PRECISION)
        x_tiles += (x_tile,)
    scores *= scale
    for n in range(HEADS):
        head = first_head + n
        y_tile = load(y + head * stride_y_head, token, inside, stride_y, v, V, DTYPE)
        result = tl.zeros([BV, C], tl.float32)
        for i in tl.static_range((K + BK - 1) // BK):
            k = i * BK + tl.arange(0, BK)
            state = load_state(states, chunk * H + head, k, v, K, V, DTYPE)
            result = tl.dot(tl.trans(state), tl.trans(x_tiles[i]), result, input_precision=PRECISION)
        slope = _slope(log_decay, head, PER_TOKEN)
        high, low, into, out_of, _total = _decays(slope, log_decay, start, tokens, head, H, C, PER_TOKEN)
        factor = out_of if REVERSE else into * scale
        weights = scores * _within(slope, high, low, C, PER_TOKEN, REVERSE)
        result = tl.dot(tl.trans(y_tile), weights.to(DTYPE), result * factor[None, :], input_precision=PRECISION)
        store_transposed(out + head * V, token, inside, H * V, v, V, result)


@triton.jit(do_not_specialize=["length"])
def _gradient_kernel(
    q,  # [N, G, K]
    k,  # [N, G, K]
    v,  # [N, H, V]
    d_out,  # [N, H, V]
    log_decay,  # [H] or [N, H]
    states,  # [chunks, H, K, V]: E
    d_states,  # [chunks, H, K, V]: dY
    dq,  # [parts, N, G, K]
    dk,  # [parts, N, G, K]
    d_decay,  # [tiles of K, chunks, H] or [tiles of K, N, H]; None where it is not wanted
    document_of,
    first_of,
    cu_seqlens,
    length,
    scale,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_d_out,
    stride_d_out_head,
    stride_part,
    stride_d_decay,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """dq and dk summed over HEADS heads, and each head's gradient of the log decay as far as this tile of K goes.

    A token's log decay gets the sum over everything that decayed across it: what token j gave token i, what the
    entering state gave each token, what each token gave the leaving state, and what the one state gave the other. Only
    the terms concerned are ever added: as the difference of larger sums, the gradient of a strong decay, which is
    tiny, would drown in rounding.
    """
    tiles_k: tl.constexpr = (K + BK - 1) // BK
    parts: tl.constexpr = H // G // HEADS
    program = tl.program_id(0)
    tile = (program % tiles_k).to(tl.int64)
    program = program // tiles_k
    first_head = (program % (H // HEADS)).to(tl.int64) * HEADS
    _, start, tokens, _, _ = place(program // (H // HEADS), document_of, first_of, cu_seqlens, length, C)
    if tokens <= 0:
        return
    chunk = (program // (H // HEADS)).to(tl.int64)

    group = first_head // (H // G)
    part = (first_head // HEADS) % parts
    step = tl.arange(0, C)
    token = start + step
    inside = step < tokens
    dim = tile * BK + tl.arange(0, BK)
    q_tile = load(q + group * stride_q_head, token, inside, stride_q, dim, K, DTYPE)
    k_tile = load(k + group * stride_k_head, token, inside, stride_k, dim, K, DTYPE)
    dq_tile = tl.zeros([BK, C], tl.float32)
    dk_tile = tl.zeros([BK, C], tl.float32)
    for n in range(HEADS):
        head = first_head + n
        d_scores = tl.zeros([C, C], tl.float32)
        v_tiles = ()
        d_tiles = ()
        for begin in tl.static_range(0, V, BV):
            value = begin + tl.arange(0, BV)
            v_tile = load(v + head * stride_v_head, token, inside, stride_v, value, V, DTYPE)
            d_tile = load(d_out + head * stride_d_out_head, token, inside, stride_d_out, value, V, DTYPE)
            d_scores = tl.dot(d_tile, tl.trans(v_tile), d_scores, input_precision=PRECISION)
            v_tiles += (v_tile,)
            d_tiles += (d_tile,)
        slope = _slope(log_decay, head, PER_TOKEN)
        high, low, into, out_of, total = _decays(slope, log_decay, start, tokens, head, H, C, PER_TOKEN)
        d_scores *= _within(slope, high, low, C, PER_TOKEN, True) * scale
        weights = d_scores.to(DTYPE)
        distance = step[:, None] - step[None, :]
        if d_decay is not None:
            pairs = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * d_scores
            if PER_TOKEN:
                gradient = tl.sum(tl.where(distance > 0, tl.cumsum(pairs, 0, reverse=True), 0), 1)
            else:
                gradient = tl.sum(tl.sum(pairs * tl.maximum(distance, 0), 1), 0)

        dq_head = tl.zeros([BK, C], tl.float32)
        through = tl.zeros([BK], tl.float32)
        for i in tl.static_range((V + BV - 1) // BV):
            value = i * BV + tl.arange(0, BV)
            state = load_state(states, chunk * H + head, dim, value, K, V, DTYPE)
            dq_head = tl.dot(state, tl.trans(d_tiles[i]), dq_head, input_precision=PRECISION)
            if d_decay is not None:
                d_state = load_state(d_states, chunk * H + head, dim, value, K, V, DTYPE)
                through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        dq_head *= (into * scale)[None, :]
        if d_decay is not None:
            from_state = tl.sum(tl.trans(q_tile).to(tl.float32) * dq_head, 0)
        dq_tile = tl.dot(tl.trans(k_tile), tl.trans(weights), dq_tile + dq_head, input_precision=PRECISION)

        dk_head = tl.zeros([BK, C], tl.float32)
        for i in tl.static_range((V + BV - 1) // BV):
            d_state = load_state(d_states, chunk * H + head, dim, i * BV + tl.arange(0, BV), K, V, DTYPE)
            dk_head = tl.dot(d_state, tl.trans(v_tiles[i]), dk_head, input_precision=PRECISION)
        dk_head *= out_of[None, :]
        if d_decay is not None:
            to_state = tl.sum(tl.trans(k_tile).to(tl.float32) * dk_head, 0)
        dk_tile = tl.dot(tl.trans(q_tile), weights, dk_tile + dk_head, input_precision=PRECISION)

        if d_decay is not None:
            whole = tl.sum(through, 0) * tl.exp2(total)
            if PER_TOKEN:
                gradient += tl.sum(tl.where(distance > 0, to_state[None, :], from_state[None, :]), 1) + whole
                tl.store(d_decay + tile * stride_d_decay + token * H + head, gradient, mask=inside)
            else:
                gradient += tl.sum(from_state * (step + 1) + to_state * tl.maximum(tokens - 1 - step, 0), 0)
                tl.store(d_decay + tile * stride_d_decay + chunk * H + head, gradient + whole * tokens)
    store_transposed(dq + part * stride_part + group * K, token, inside, G * K, dim, K, dq_tile)
    store_transposed(dk + part * stride_part + group * K, token, inside, G * K, dim, K, dk_tile)


@triton.jit
def _step_kernel(
    q,  # [B, G, K]
    k,  # [B, G, K]
    v,  # [B, H, V]
    log_decay,  # [H] or [B, H]
    entering,  # [B, H, K, V]
    out,  # [B, H, V]
    leaving,  # [B, H, K, V]
    scale,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """One token: the recurrence itself."""
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    value = (program % tiles_v) * BV + tl.arange(0, BV)
    program = program // tiles_v
    head = (program % H).to(tl.int64)
    row = (program // H).to(tl.int64)
    group = head // (H // G)
    dim = tl.arange(0, BK)
    q_row = tl.load(q + row * stride_q + group * stride_q_head + dim, mask=dim < K, other=0).to(tl.float32)
    k_row = tl.load(k + row * stride_k + group * stride_k_head + dim, mask=dim < K, other=0).to(tl.float32)
    v_row = tl.load(v + row * stride_v + head * stride_v_head + value, mask=value < V, other=0).to(tl.float32)
    decay = tl.exp2(tl.load(log_decay + (row * H if PER_TOKEN else 0) + head) * LOG2E)
    state = load_state(entering, row * H + head, dim, value, K, V, tl.float32)
    state = state * decay + k_row[:, None] * v_row[None, :]
    store_state(leaving, row * H + head, dim, value, K, V, state)
    result = tl.sum(q_row[:, None] * state, 0) * scale
    tl.store(out + (row * H + head) * V + value, result.to(out.dtype.element_ty), mask=value < V)


class _Sizes:
    """What the kernels need to know of a call: its sizes, the tables of its documents, and how operands multiply."""

    def __init__(self, q: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.length, self.groups, self.key_dim = q.shape
        self.heads, self.value_dim = v.shape[2:]
        self.documents = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.tiles = _tiles(v.dtype, self.key_dim, self.value_dim)
        self.chunks = pieces_of(self.documents, self.length, self.tiles.chunk, self.cu_seqlens)
        self.state = (self.heads, self.key_dim, self.value_dim)
        self.state_dtype = _state_dtype(v)
        self.options = {
            "G": self.groups,
            "H": self.heads,
            "K": self.key_dim,
            "V": self.value_dim,
            "PER_TOKEN": log_decay.dim() == 3,
            "C": self.tiles.chunk,
            "DTYPE": tl.bfloat16 if self.state_dtype == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32" if v.dtype == torch.float16 or tf32_is_asked_for() else "ieee",
            "num_warps": self.tiles.warps,
        }

    def segments(self, tiles: int) -> Pieces:
        """Whole documents, or where those are too few programs, as many segments as fill the GPU."""
        rows = self.batch if self.cu_seqlens is None else 1
        wanted = max(1, PROGRAMS // max(1, rows * self.heads * tiles))
        size = max(triton.cdiv(self.length, wanted), min(self.length, MIN_SEGMENT))
        chunk = self.tiles.chunk
        return pieces_of(self.documents, self.length, triton.cdiv(size, chunk) * chunk, self.cu_seqlens)

    def heads_per_program(self, tiles: int) -> int:
        """As many heads of a group as leave enough programs."""
        shared = self.heads // self.groups
        programs = self.chunks.number * self.heads * tiles
        return next(n for n in range(shared, 0, -1) if shared % n == 0 and (n == 1 or programs // n >= 2 * PROGRAMS))


def _state_dtype(v: Tensor) -> torch.dtype:
    return torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32


def _walk(
    sizes: _Sizes,
    x: Tensor,
    y: Tensor,
    log_decay: Tensor,
    entering: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The states that enter all chunks, and those that leave the documents."""
    block_k, block_v = (tile_size(dim, sizes.tiles.dim) for dim in (sizes.key_dim, sizes.value_dim))
    tiles = triton.cdiv(sizes.key_dim, block_k) * triton.cdiv(sizes.value_dim, block_v)
    segments = sizes.segments(tiles)

    def run(entering: Tensor | None, states: Tensor | None, leaving: Tensor, totals: Tensor | None) -> None:
        _walk_kernel[(segments.number * sizes.heads * tiles,)](
            x,
            y,
            log_decay,
            entering,
            states,
            leaving,
            totals,
            segments.document,
            segments.first,
            sizes.chunks.first,
            sizes.cu_seqlens,
            sizes.length,
            segments.size,
            scale,
            *x.stride()[:2],
            *y.stride()[:2],
            **sizes.options,
            BK=block_k,
            BV=block_v,
            REVERSE=reverse,
            SUMMARY=states is None,
        )

    if segments.size < sizes.length:
        ends = log_decay.new_empty(segments.number, *sizes.state)
        totals = log_decay.new_empty(segments.number, sizes.heads)
        run(None, None, ends, totals)
        state_size, tile = sizes.key_dim * sizes.value_dim, 512
        _chain_kernel[(sizes.documents * sizes.heads * triton.cdiv(state_size, tile),)](
            ends,
            totals,
            entering,
            segments.first,
            triton.cdiv(sizes.length, segments.size),
            H=sizes.heads,
            STATE=state_size,
            TILE=tile,
            REVERSE=reverse,
        )
        entering = ends
    states = log_decay.new_empty(sizes.chunks.number, *sizes.state, dtype=sizes.state_dtype)
    leaving = log_decay.new_empty(sizes.documents, *sizes.state)
    run(entering, states, leaving, None)
    return states, leaving


def _mix(
    sizes: _Sizes, x: Tensor, s: Tensor, y: Tensor, log_decay: Tensor, states: Tensor, scale: float, reverse: bool
) -> Tensor:
    largest = sizes.tiles.mix_dim
    block_k = tile_size(sizes.key_dim, largest)
    # All of K is in shared memory at once, which leaves less for V.
    block_v = tile_size(sizes.value_dim, largest if sizes.key_dim <= largest else sizes.tiles.dim)
    tiles = triton.cdiv(sizes.value_dim, block_v)
    heads = sizes.heads_per_program(tiles)
    out = y.new_empty(sizes.batch, sizes.length, sizes.heads, sizes.value_dim)
    _mix_kernel[(sizes.chunks.number * sizes.heads // heads * tiles,)](
        x,
        s,
        y,
        log_decay,
        states,
        out,
        sizes.chunks.document,
        sizes.chunks.first,
        sizes.cu_seqlens,
        sizes.length,
        scale,
        *x.stride()[:2],
        *s.stride()[:2],
        *y.stride()[:2],
        **sizes.options,
        BK=block_k,
        BV=block_v,
        HEADS=heads,
        REVERSE=reverse,
        num_stages=1,
    )
    return out


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, the final state, and if they are to be kept the states that enter the chunks `[chunks, H, K, V]`."""
    log_decay, initial_state = log_decay.contiguous(), initial_state.contiguous()
    if q.shape[1] == 1 and cu_seqlens is None and not keep_states:
        return *_step(q, k, v, log_decay, initial_state, scale), log_decay.new_empty(0)
    sizes = _Sizes(q, v, log_decay, cu_seqlens)
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    states, state = _walk(sizes, k, v, log_decay, initial_state, 1.0, reverse=False)
    out = _mix(sizes, q, k, v, log_decay, states, scale, reverse=False)
    return out, state, states if keep_states else log_decay.new_empty(0)


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, _, heads, value_dim = v.shape
    groups, key_dim = q.shape[2:]
    out, state = v.new_empty(v.shape), torch.empty_like(initial_state)
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    block_k = triton.next_power_of_2(key_dim)
    block_v = min(triton.next_power_of_2(value_dim), max(16, 4096 // block_k))
    _step_kernel[(batch * heads * triton.cdiv(value_dim, block_v),)](
        q,
        k,
        v,
        log_decay,
        initial_state,
        out,
        state,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        G=groups,
        H=heads,
        K=key_dim,
        V=value_dim,
        BK=block_k,
        BV=block_v,
        PER_TOKEN=log_decay.dim() == 3,
    )
    return out, state


def _backward(
    d_out: Tensor | None,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    decay_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty unless wanted) and the initial state."""
    sizes = _Sizes(q, v, log_decay, cu_seqlens)
    shape, dtype = q.shape, q.dtype
    d_out = torch.zeros_like(v) if d_out is None else d_out
    d_state = None if d_state is None else d_state.contiguous()
    log_decay = log_decay.contiguous()
    q, k, v, d_out = rows_of(q), rows_of(k), rows_of(v), rows_of(d_out)
    d_states, d_initial = _walk(sizes, q, d_out, log_decay, d_state, scale, reverse=True)
    dv = _mix(sizes, k, q, d_out, log_decay, d_states, scale, reverse=True)

    block_k, block_v = (tile_size(dim, sizes.tiles.dim) for dim in (sizes.key_dim, sizes.value_dim))
    tiles = triton.cdiv(sizes.key_dim, block_k)
    heads = sizes.heads_per_program(tiles)
    parts = sizes.heads // sizes.groups // heads
    dq, dk = (q.new_empty(parts, *shape, dtype=dtype if parts == 1 else torch.float32) for _ in range(2))
    rows = sizes.chunks.number if log_decay.dim() == 1 else q.shape[0]
    # Zeros, for the pieces beyond the last.
    d_decay = log_decay.new_zeros(tiles, rows, sizes.heads) if decay_wanted else None
    _gradient_kernel[(sizes.chunks.number * sizes.heads // heads * tiles,)](
        q,
        k,
        v,
        d_out,
        log_decay,
        states,
        d_states,
        dq,
        dk,
        d_decay,
        sizes.chunks.document,
        sizes.chunks.first,
        sizes.cu_seqlens,
        sizes.length,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *d_out.stride()[:2],
        dq.stride(0),
        rows * sizes.heads,
        **sizes.options,
        BK=block_k,
        BV=block_v,
        HEADS=heads,
        num_stages=1,
    )
    dq, dk = (x[0] if parts == 1 else x.sum(0).to(dtype) for x in (dq, dk))
    if d_decay is None:
        return dq, dk, dv, log_decay.new_empty(0), d_initial
    d_decay = d_decay.sum((0, 1)) if log_decay.dim() == 1 else d_decay.sum(0).view(log_decay.shape)
    return dq, dk, dv, d_decay, d_initial


_operator = torch.library.custom_op("zoo::linear_attention_triton_forward", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("zoo::linear_attention_triton_backward", _backward, mutates_args=())


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    chunk = _tiles(v.dtype, q.shape[3], v.shape[3]).chunk
    if cu_seqlens is None:
        chunks = q.shape[0] * ((q.shape[1] + chunk - 1) // chunk)
    else:
        chunks = bound(cu_seqlens.numel() - 1, q.shape[1], chunk)
    if keep_states:
        states = log_decay.new_empty(chunks, *initial_state.shape[1:], dtype=_state_dtype(v))
    else:
        states = log_decay.new_empty(0)
    return v.new_empty(v.shape), log_decay.new_empty(initial_state.shape), states


@_backward_operator.register_fake
def _(
    d_out: Tensor | None,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    decay_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    d_decay = log_decay.new_empty(log_decay.shape if decay_wanted else 0)
    d_initial = log_decay.new_empty(documents, *states.shape[1:])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_decay, d_initial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, _, ctx.scale, cu_seqlens, _ = inputs
    states = output[2]
    ctx.mark_non_differentiable(states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_decay, states, cu_seqlens)


def _differentiate(ctx: Any, d_out: Tensor | None, d_state: Tensor | None, _: None) -> tuple[Any, ...]:
    q, k, v, log_decay, states, cu_seqlens = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    dq, dk, dv, d_decay, d_initial = _backward_operator(
        d_out, d_state, q, k, v, log_decay, states, ctx.scale, cu_seqlens, wanted
    )
    return dq, dk, dv, d_decay if wanted else None, d_initial, None, None, None


_operator.register_autograd(outside_autocast(_differentiate), setup_context=_save)
