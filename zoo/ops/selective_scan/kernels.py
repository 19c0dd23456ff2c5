# mypy: disable-error-code="assignment,no-untyped-def,var-annotated"
# ruff: noqa: RUF005
# (A kernel is Triton's language: untyped, its tuples grow from empty, and it has no starred expressions.)
"""The selective scan on a GPU: chunks of the sequence side by side, one token after another inside a chunk.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t ;  y_t = C_t h_t + D u_t

A chunk maps the state it begins with to exp(A sum(delta)) times it plus what its own tokens add. So the forward takes
three passes: every chunk finds what its tokens add, a short scan over the chunks finds the state each begins with, and
every chunk walks again and writes y. The gradient of the state goes the same way from the last token to the first.
There are as many chunks as fill the GPU; where batch and channels fill it alone, a chunk is a whole row and one pass
serves. Packed documents are rows of different lengths, and a chunk never crosses from one into the next.

The forward keeps the state before each block of INTERVAL tokens. The backward walks a block again, notes the state
before every STEPS tokens in a scratch buffer, and comes back with only STEPS decays and states in registers.

The cost is one exponential for each (token, channel, state) and pass, of which a multiprocessor does 16 a clock, and in
the backward some 25 other instructions; bytes come after that. Hence exp2 of a prescaled A, B and C in float32
(converted once, not in each channel tile), warps that share nothing, and tiles whose sums stay short.

Legend: T length, N state, D channels; a row is a batch row or a document; a tile is the channels of one warp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from zoo.ops.dispatch import implements, outside_autocast

# Tokens between two states kept for the backward: with 16 states that is a byte for each token and channel, next to
# the 4 of u and delta in bfloat16.
INTERVAL = 64
STEPS = 4
# Programs are single warps: this is 16 on each of an H100's 132 multiprocessors, twice what the backward's registers
# let it hold.
PROGRAMS = 2112
# Channels over which one program of the backward adds up the gradients of B and C, where there is work enough: the
# sums of all programs then take up to N / 256 of what u takes in bfloat16, twice as much in float32.
COVER = 128
# Numbers that differ from call to call: no reason to compile again.
COUNTS = ["length", "size", "interval", "tokens", "row_chunks", "row_places", "chunk_places"]
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def _refuses(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: object) -> str | None:
    for x in (u, delta, A, B, C):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(x.dtype).removeprefix('torch.')} inputs"
    return None


@implements("selective_scan", "triton", refuses=_refuses)
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, state)` as the public function documents them."""
    inputs = [x for x in (u, delta, A, B, C, D, initial_state) if x is not None]
    keep_states = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    u, delta = u.contiguous(), delta.contiguous()
    A, B, C = (x.float().contiguous() for x in (A, B, C))
    D, initial_state = (None if x is None else x.float().contiguous() for x in (D, initial_state))
    launchable = not (keep_states or u.is_meta or torch.compiler.is_compiling())
    if launchable and u.shape[1] == 1 and cu_seqlens is None:
        return _step(u, delta, A, B, C, D, initial_state)
    out, state, _ = _forward(u, delta, A, B, C, D, initial_state, cu_seqlens, keep_states)
    return out, state


def _step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token, without what an operator costs to call."""
    channels, size = A.shape
    padded = _padded(size)
    tile = max(1, 512 // padded)
    out, state = torch.empty_like(u), A.new_empty(u.shape[0], channels, size)
    _step_kernel[(u.shape[0] * triton.cdiv(channels, tile),)](
        u, delta, A, B, C, D, initial_state, out, state, channels, size, padded, tile, num_warps=2
    )  # fmt: skip
    return out, state


def _padded(size: int) -> int:
    return max(4, triton.next_power_of_2(size))


@triton.jit
def _within(index, size: tl.constexpr, tile: tl.constexpr):
    """A mask, and none where the tiles fit."""
    return (index < size) | (size % tile == 0)


@triton.jit
def _load(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def _step_kernel(
    u, delta, A, B, C, skip, initial_state, out, state,
    D: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (D + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    d = (program % tiles) * TILE + tl.arange(0, TILE)[:, None]
    n = tl.arange(0, PADDED)[None, :]
    ours, real = _within(d, D, TILE), _within(n, N, PADDED)
    dt, x = _load(delta, row * D + d, ours), _load(u, row * D + d, ours)
    h = dt * x * _load(B, row * N + n, real)
    if initial_state is not None:
        a = _load(A, d * N + n, ours & real) * LOG2E
        h += tl.exp2(dt * a) * _load(initial_state, row * D * N + d * N + n, ours & real)
    tl.store(state + row * D * N + d * N + n, h, mask=ours & real)
    y = tl.sum(h * _load(C, row * N + n, real), 1, keep_dims=True)
    if skip is not None:
        y += _load(skip, d, ours) * x
    tl.store(out + row * D + d, y, mask=ours)


class _Plan(NamedTuple):
    """Chunks of `size` tokens made of blocks of `interval`.

    With packed documents the chunks and the blocks of one document follow those of another. `chunks` and `blocks` are
    then the most there can be: how many there are is known on the GPU alone, and those too many have no tokens.
    """

    rows: int
    length: int  # of a row, or of all documents together
    size: int
    interval: int
    chunks: int
    blocks: int
    chunk_row: Tensor | None  # [chunks], the row of each, and these three only with packed documents
    row_start: Tensor | None  # [rows + 1], each row's first token
    row_chunk: Tensor | None  # [rows + 1], each row's first chunk
    row_block: Tensor | None  # [rows + 1], each row's first block

    @property
    def places(self) -> tuple[Any, ...]:
        """What `_place` needs to know."""
        return self.chunk_row, self.row_start, self.row_chunk, self.row_block, self.length, self.size, self.interval

    @property
    def even(self) -> bool:
        """No chunk ends within STEPS tokens."""
        return self.chunk_row is None and self.length % STEPS == 0

    @property
    def whole(self) -> bool:
        """Each chunk is a row."""
        return self.chunk_row is None and self.chunks == self.rows


def _plan(u: Tensor, cu_seqlens: Tensor | None, across: int, keep_states: bool) -> _Plan:
    """For kernels with `across` programs side by side over the channels."""
    batch, length, _ = u.shape
    parts = max(1, PROGRAMS // max(1, batch * across))
    size = triton.cdiv(triton.cdiv(length, parts), INTERVAL) * INTERVAL
    interval = INTERVAL if keep_states else size
    if cu_seqlens is None:
        chunks, blocks = (batch * triton.cdiv(length, x) for x in (size, interval))
        return _Plan(batch, length, size, interval, chunks, blocks, None, None, None, None)
    rows = cu_seqlens.numel() - 1
    lengths = cu_seqlens.diff()
    row_chunk, row_block = (pad(((lengths + (x - 1)) // x).cumsum(0), (1, 0)) for x in (size, interval))
    chunks, blocks = (length // x + rows for x in (size, interval))
    chunk = torch.arange(chunks, device=u.device)
    chunk_row = torch.searchsorted(row_chunk[1:], chunk, right=True).clamp_(max=rows - 1)
    return _Plan(rows, length, size, interval, chunks, blocks, chunk_row, cu_seqlens.contiguous(), row_chunk, row_block)


@triton.jit
def _place(chunk, chunk_row, row_start, row_chunk, row_block, length, size, interval):
    """`(row, first, last, token, count, block)` of a chunk: its row, whether it is the first and the last of that, its
    first token, its tokens (none or fewer where there is no such chunk) and its first block."""
    if chunk_row is not None:
        row = tl.load(chunk_row + chunk)
        start = tl.load(row_start + row).to(tl.int64)
        length = tl.load(row_start + row + 1).to(tl.int64) - start
        block = tl.load(row_block + row)
        offset = (chunk - tl.load(row_chunk + row)) * size
    else:
        chunks = tl.cdiv(length, size)
        row = chunk // chunks
        start = row * length
        block = row * tl.cdiv(length, interval)
        offset = (chunk % chunks) * size
    count = tl.minimum(length - offset, size)
    first = (count > 0) & (offset == 0)
    last = (count > 0) & (offset + size >= length)
    return row, first, last, start + offset, count, block + offset // interval


def _forward_tile(padded: int) -> tuple[int, int]:
    """`(channels, warps)`. Triton gives each thread of a warp one of 32 channels and all its states: the sum over
    states stays in the thread. That takes 2 registers a state; more states than 64 are spread over the threads."""
    return (32, 1) if padded <= 64 else (8, padded // 128)


@triton.jit(do_not_specialize=COUNTS)
def _local_kernel(
    u, delta, A, B, states, delta_sums,
    chunk_row, row_start, row_chunk, row_block, length, size, interval,
    D: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """The state that each chunk's tokens add, at the place of its first block, and the sum of their delta."""
    tiles: tl.constexpr = (D + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.int64)
    chunk = program // tiles
    d = (program % tiles) * TILE + tl.arange(0, TILE)[:, None]
    n = tl.arange(0, PADDED)[None, :]
    ours, real = _within(d, D, TILE), _within(n, N, PADDED)
    _row, _first, last, token, count, block = _place(
        chunk, chunk_row, row_start, row_chunk, row_block, length, size, interval
    )
    # No chunk begins with what the last one of a row adds; the others are full.
    count = tl.where(last, 0, count)
    a = _load(A, d * N + n, ours & real) * LOG2E
    h = tl.zeros([TILE, PADDED], tl.float32)
    total = tl.zeros([TILE, 1], tl.float32)
    for t in range(0, count, STEPS):
        # Loads first, or each would wait for the one before it.
        dts, xs, bs = (), (), ()
        for i in tl.static_range(STEPS):
            at = token + t + i
            bs = bs + (_load(B, at * N + n, real),)
            dt = _load(delta, at * D + d, ours)
            dts = dts + (dt,)
            xs = xs + (dt * _load(u, at * D + d, ours),)
        for i in tl.static_range(STEPS):
            h = tl.exp2(dts[i] * a) * h + xs[i] * bs[i]
            total += dts[i]
    tl.store(states + block * D * N + d * N + n, h, mask=ours & real & (count > 0))
    tl.store(delta_sums + chunk * D + d, total, mask=ours)


@triton.jit(do_not_specialize=COUNTS)
def _carry_kernel(
    A, delta_sums, initial, states, row_chunk, row_place, row_chunks, row_places, chunk_places,
    D: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state becomes, in place, the state it begins with."""
    tiles: tl.constexpr = (D + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    d = (program % tiles) * TILE + tl.arange(0, TILE)[:, None]
    n = tl.arange(0, PADDED)[None, :]
    ours, real = _within(d, D, TILE), _within(n, N, PADDED)
    if row_chunk is not None:
        first = tl.load(row_chunk + row)
        chunks = tl.load(row_chunk + row + 1) - first
        place = tl.load(row_place + row)
    else:
        first = row * row_chunks
        chunks = row_chunks.to(tl.int64)
        place = row * row_places
    a = _load(A, d * N + n, ours & real) * LOG2E
    h = tl.zeros([TILE, PADDED], tl.float32)
    if initial is not None:
        h += _load(initial, row * D * N + d * N + n, ours & real)
    for begin in range(0, chunks, AHEAD):
        # Loads first, or each would wait for the one before it.
        offsets, sums, added = (), (), ()
        for i in tl.static_range(AHEAD):
            there = begin + i < chunks
            k = chunks - 1 - begin - i if REVERSE else begin + i
            offset = (place + k * chunk_places) * D * N + d * N + n
            offsets = offsets + (offset,)
            sums = sums + (_load(delta_sums, (first + k) * D + d, ours & there),)
            added = added + (_load(states, offset, ours & real & there),)
        for i in tl.static_range(AHEAD):
            tl.store(states + offsets[i], h, mask=ours & real & (begin + i < chunks))
            h = tl.exp2(sums[i] * a) * h + added[i]


@triton.jit(do_not_specialize=COUNTS)
def _output_kernel(
    u, delta, A, B, C, skip, initial_state, states, out, state,
    chunk_row, row_start, row_chunk, row_block, length, size, interval,
    D: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (D + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.int64)
    chunk = program // tiles
    d = (program % tiles) * TILE + tl.arange(0, TILE)[:, None]
    n = tl.arange(0, PADDED)[None, :]
    ours, real = _within(d, D, TILE), _within(n, N, PADDED)
    row, _first, last, token, count, block = _place(
        chunk, chunk_row, row_start, row_chunk, row_block, length, size, interval
    )
    a = _load(A, d * N + n, ours & real) * LOG2E
    if skip is not None:
        direct = _load(skip, d, ours)
    if not WHOLE:
        h = _load(states, block * D * N + d * N + n, ours & real & (count > 0))
    elif initial_state is not None:
        h = _load(initial_state, row * D * N + d * N + n, ours & real)
    else:
        h = tl.zeros([TILE, PADDED], tl.float32)
    for k in range(0, tl.cdiv(count, interval)):
        if KEEP:
            tl.store(states + (block + k) * D * N + d * N + n, h, mask=ours & real)
        end = tl.minimum((k + 1) * interval, count)
        for t in range(k * interval, end, STEPS):
            dts, us, bs, cs = (), (), (), ()
            for i in tl.static_range(STEPS):
                at = token + t + i
                there = (t + i < end) | EVEN
                bs = bs + (_load(B, at * N + n, real & there),)
                cs = cs + (_load(C, at * N + n, real & there),)
                dts = dts + (_load(delta, at * D + d, ours & there),)
                us = us + (_load(u, at * D + d, ours & there),)
            for i in tl.static_range(STEPS):
                h = tl.exp2(dts[i] * a) * h + (dts[i] * us[i]) * bs[i]
                y = tl.sum(h * cs[i], 1, keep_dims=True)
                if skip is not None:
                    y += direct * us[i]
                there = (t + i < end) | EVEN
                tl.store(out + (token + t + i) * D + d, y, mask=ours & there)
    tl.store(state + row * D * N + d * N + n, h, mask=ours & real & last)


# Opaque operators: torch.compile has no need to look inside, and the backward is ours.


@torch.library.custom_op("zoo::selective_scan_triton_forward", mutates_args=())
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, state [rows,D,N], block_states [blocks,D,N])`; no block states unless `keep_states`. All contiguous."""
    channels, size = A.shape
    padded = _padded(size)
    tile, warps = _forward_tile(padded)
    across = triton.cdiv(channels, tile)
    plan = _plan(u, cu_seqlens, across, keep_states)
    out, state = torch.empty_like(u), _row_states(A, plan, initial_state)
    states = A.new_empty(0 if plan.whole and not keep_states else plan.blocks, channels, size)
    if not plan.whole:
        delta_sums = A.new_empty(plan.chunks, channels)
        _local_kernel[(plan.chunks * across,)](
            u, delta, A, B, states, delta_sums, *plan.places,
            channels, size, padded, tile, STEPS, num_warps=warps,
        )  # fmt: skip
        _carry(A, delta_sums, initial_state, states, plan, reverse=False)
    _output_kernel[(plan.chunks * across,)](
        u, delta, A, B, C, D, initial_state, states, out, state, *plan.places,
        channels, size, padded, tile, STEPS, plan.even, plan.whole, keep_states, num_warps=warps,
    )  # fmt: skip
    return out, state, states if keep_states else A.new_empty(0, channels, size)


def _carry(A: Tensor, delta_sums: Tensor, initial: Tensor | None, states: Tensor, plan: _Plan, reverse: bool) -> None:
    """`states` has a place for each block, a chunk's being that of its first; in reverse, a place for each chunk."""
    channels, size = A.shape
    padded = _padded(size)
    tile = max(1, 512 // padded)
    interval, row_place = (plan.size, plan.row_chunk) if reverse else (plan.interval, plan.row_block)
    row_chunks, row_places = (triton.cdiv(plan.length, x) for x in (plan.size, interval))
    _carry_kernel[(plan.rows * triton.cdiv(channels, tile),)](
        A, delta_sums, initial, states, plan.row_chunk, row_place, row_chunks, row_places, plan.size // interval,
        channels, size, padded, tile, 8, reverse, num_warps=2,
    )  # fmt: skip


def _row_states(A: Tensor, plan: _Plan, empty: Tensor | None) -> Tensor:
    """`[rows,D,N]` for a kernel to fill, which writes nothing for an empty document: that has `empty`, or zeros."""
    if plan.chunk_row is None:
        return A.new_empty(plan.rows, *A.shape)
    return A.new_zeros(plan.rows, *A.shape) if empty is None else empty.clone()


@triton.jit(do_not_specialize=COUNTS)
def _local_back_kernel(
    grad_out, delta, A, C, carries, delta_sums,
    chunk_row, row_start, row_chunk, row_block, length, size, interval,
    D: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What each chunk's outputs add to the gradient of the state it begins with, and the sum of its delta."""
    tiles: tl.constexpr = (D + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.int64)
    chunk = program // tiles
    d = (program % tiles) * TILE + tl.arange(0, TILE)[:, None]
    n = tl.arange(0, PADDED)[None, :]
    ours, real = _within(d, D, TILE), _within(n, N, PADDED)
    _row, first, _last, token, count, _block = _place(
        chunk, chunk_row, row_start, row_chunk, row_block, length, size, interval
    )
    # Nothing comes before the first chunk of a row.
    count = tl.where(first, 0, count)
    a = _load(A, d * N + n, ours & real) * LOG2E
    g = tl.zeros([TILE, PADDED], tl.float32)
    total = tl.zeros([TILE, 1], tl.float32)
    strides = tl.cdiv(count, STEPS)
    for stride in range(0, strides):
        t = (strides - 1 - stride) * STEPS
        dts, dys, cs = (), (), ()
        for i in tl.static_range(STEPS):
            at = token + t + i
            there = (t + i < count) | EVEN
            cs = cs + (_load(C, at * N + n, real & there),)
            dts = dts + (_load(delta, at * D + d, ours & there),)
            dys = dys + (_load(grad_out, at * D + d, ours & there),)
        for i in tl.static_range(STEPS - 1, -1, -1):
            g = tl.exp2(dts[i] * a) * (dys[i] * cs[i] + g)
            total += dts[i]
    tl.store(carries + chunk * D * N + d * N + n, g, mask=ours & real)
    tl.store(delta_sums + chunk * D + d, total, mask=ours)


def _backward_tile(padded: int) -> tuple[int, int, int]:
    """`(groups, lanes, planes)`, their product the channels of a tile.

    Gradients of B and C are sums over channels, those of u and delta sums over states, and either costs a shuffle for
    every halving of the lanes it runs over. With 16 states, Triton gives a thread 4 states of `planes` channels, four
    lanes to the states and eight to the channels. The groups come one after another, so that one is in registers at a
    time, and sums over channels are over all groups and planes before they leave the thread.
    """
    return (2 if padded <= 64 else 1), max(1, min(16, 128 // padded)), (2 if 16 <= padded <= 128 else 1)


@triton.jit(do_not_specialize=COUNTS)
def _gradients_kernel(
    grad_out, grad_state, u, delta, A, B, C, skip, states, carries, scratch,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_skip, grad_initial,
    chunk_row, row_start, row_chunk, row_block, length, size, interval, tokens, parts,
    D: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr,
    GROUPS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr,
    STEPS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """With g_t = dL/dh_t:  g_t = C_t dy_t + a_{t+1} g_{t+1},  and  w_t = dL/d(delta_t A) = g_t a_t h_{t-1}.

    A program has one chunk and `parts` tiles of channels in turn. Its gradients of A and D are sums over its tokens,
    those of B and C over its channels.
    """
    WIDTH: tl.constexpr = LANES * PLANES
    TILE: tl.constexpr = GROUPS * WIDTH
    tiles: tl.constexpr = (D + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(tiles, parts)
    chunk = program // across
    column = program % across
    lane = tl.arange(0, LANES)[:, None, None]
    channel = lane * PLANES + tl.arange(0, PLANES)[None, :, None]
    n = tl.arange(0, PADDED)[None, None, :]
    real = _within(n, N, PADDED)
    # B and C in every lane, as the states are.
    wide = tl.broadcast_to(n, [LANES, 1, PADDED])
    row, first, _last, token, count, block = _place(
        chunk, chunk_row, row_start, row_chunk, row_block, length, size, interval
    )
    scratch += program * (interval // STEPS) * (TILE * PADDED) + channel * PADDED + n
    blocks = tl.cdiv(count, interval)

    for part in range(0, tl.minimum(parts, tiles - column * parts)):
        ds, rates, directs, carried, sums_A, sums_skip = (), (), (), (), (), ()
        for group in tl.static_range(GROUPS):
            d = (column * parts + part) * TILE + group * WIDTH + channel
            ours = _within(d, D, TILE)
            ds = ds + (d,)
            rates = rates + (_load(A, d * N + n, ours & real) * LOG2E,)
            if skip is not None:
                directs = directs + (_load(skip, d, ours),)
            if not WHOLE:
                carried = carried + (_load(carries, chunk * D * N + d * N + n, ours & real),)
            elif grad_state is not None:
                carried = carried + (_load(grad_state, row * D * N + d * N + n, ours & real),)
            else:
                carried = carried + (tl.zeros([LANES, PLANES, PADDED], tl.float32),)
            sums_A = sums_A + (tl.zeros([LANES, PLANES, PADDED], tl.float32),)
            sums_skip = sums_skip + (tl.zeros([LANES, PLANES, 1], tl.float32),)

        for back in range(0, blocks):
            k = blocks - 1 - back
            begin = k * interval
            end = tl.minimum(begin + interval, count)
            strides = tl.cdiv(end - begin, STEPS)
            # Who reads the scratch, or the sums of the part before, is not who wrote them.
            tl.debug_barrier()
            heads = ()
            for group in tl.static_range(GROUPS):
                ours = _within(ds[group], D, TILE)
                h = _load(states, (block + k) * D * N + ds[group] * N + n, ours & real)
                tl.store(scratch + group * WIDTH * PADDED, h)
                heads = heads + (h,)
            for s in range(1, strides):
                dts, xs, bs, next_heads = (), (), (), ()
                for i in tl.static_range(STEPS):
                    at = token + begin + (s - 1) * STEPS + i
                    bs = bs + (_load(B, at * N + wide, real),)
                    for group in tl.static_range(GROUPS):
                        ours = _within(ds[group], D, TILE)
                        dt = _load(delta, at * D + ds[group], ours)
                        dts = dts + (dt,)
                        xs = xs + (dt * _load(u, at * D + ds[group], ours),)
                for group in tl.static_range(GROUPS):
                    h = heads[group]
                    for i in tl.static_range(STEPS):
                        h = tl.exp2(dts[i * GROUPS + group] * rates[group]) * h + xs[i * GROUPS + group] * bs[i]
                    tl.store(scratch + (s * GROUPS + group) * WIDTH * PADDED, h)
                    next_heads = next_heads + (h,)
                heads = next_heads
            tl.debug_barrier()

            for stride in range(0, strides):
                s = strides - 1 - stride
                t = begin + s * STEPS
                bs, cs, sums_B, sums_C = (), (), (), ()
                for i in tl.static_range(STEPS):
                    at = token + t + i
                    there = (t + i < end) | EVEN
                    bs = bs + (_load(B, at * N + wide, real & there),)
                    cs = cs + (_load(C, at * N + wide, real & there),)
                    # What the parts before have, in the first lane.
                    place = (column * tokens + at) * N + wide
                    there = real & there & (part > 0) & (lane == 0)
                    sums_B = sums_B + (_load(grad_B, place, there),)
                    sums_C = sums_C + (_load(grad_C, place, there),)
                next_carried, next_sums_A, next_sums_skip = (), (), ()
                for group in tl.static_range(GROUPS):
                    d, rate, g = ds[group], rates[group], carried[group]
                    sum_A, sum_skip = sums_A[group], sums_skip[group]
                    dts, us, dys = (), (), ()
                    for i in tl.static_range(STEPS):
                        at = token + t + i
                        there = _within(d, D, TILE) & ((t + i < end) | EVEN)
                        dts = dts + (_load(delta, at * D + d, there),)
                        us = us + (_load(u, at * D + d, there),)
                        dys = dys + (_load(grad_out, at * D + d, there),)
                    h = tl.load(scratch + (s * GROUPS + group) * WIDTH * PADDED)
                    decays, hs = (), (h,)
                    for i in tl.static_range(STEPS):
                        decay = tl.exp2(dts[i] * rate)
                        h = decay * h + (dts[i] * us[i]) * bs[i]
                        decays = decays + (decay,)
                        hs = hs + (h,)
                    group_B, group_C = (), ()
                    for i in tl.static_range(STEPS - 1, -1, -1):
                        g += dys[i] * cs[i]
                        group_B = (tl.sum(g * (dts[i] * us[i]), 1, keep_dims=True),) + group_B
                        group_C = (tl.sum(hs[i + 1] * dys[i], 1, keep_dims=True),) + group_C
                        grad_x = tl.sum(g * bs[i], 2, keep_dims=True)
                        g *= decays[i]
                        w = g * hs[i]
                        sum_A += w * dts[i]
                        at = token + t + i
                        there = _within(d, D, TILE) & ((t + i < end) | EVEN)
                        grad = tl.sum(w * rate, 2, keep_dims=True) * LN2 + grad_x * us[i]
                        tl.store(grad_delta + at * D + d, grad, mask=there)
                        grad = grad_x * dts[i]
                        if skip is not None:
                            grad += directs[group] * dys[i]
                            sum_skip += us[i] * dys[i]
                        tl.store(grad_u + at * D + d, grad, mask=there)
                    next_carried = next_carried + (g,)
                    next_sums_A = next_sums_A + (sum_A,)
                    next_sums_skip = next_sums_skip + (sum_skip,)
                    sums_B, sums_C = _add(sums_B, group_B, STEPS), _add(sums_C, group_C, STEPS)
                carried, sums_A, sums_skip = next_carried, next_sums_A, next_sums_skip
                for i in tl.static_range(STEPS):
                    at = column * tokens + token + t + i
                    there = real & ((t + i < end) | EVEN)
                    tl.store(grad_B + at * N + n, tl.sum(sums_B[i], 0, keep_dims=True), mask=there)
                    tl.store(grad_C + at * N + n, tl.sum(sums_C[i], 0, keep_dims=True), mask=there)

        for group in tl.static_range(GROUPS):
            d = ds[group]
            ours = _within(d, D, TILE)
            tl.store(grad_A + chunk * D * N + d * N + n, sums_A[group], mask=ours & real)
            if grad_initial is not None:
                tl.store(grad_initial + row * D * N + d * N + n, carried[group], mask=ours & real & first)
            if skip is not None:
                tl.store(grad_skip + chunk * D + d, sums_skip[group], mask=ours)


@triton.jit
def _add(xs, ys, COUNT: tl.constexpr):
    added = ()
    for i in tl.static_range(COUNT):
        added = added + (xs[i] + ys[i],)
    return added


@torch.library.custom_op("zoo::selective_scan_triton_backward", mutates_args=())
def _backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    block_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and the initial state; of the last two, nothing where there is none."""
    batch, length, channels = u.shape
    size = A.shape[1]
    padded = _padded(size)
    grad_out = torch.zeros_like(u) if grad_out is None else grad_out.contiguous()
    grad_state = None if grad_state is None else grad_state.contiguous()
    groups, lanes, planes = _backward_tile(padded)
    tile = groups * lanes * planes
    tiles = triton.cdiv(channels, tile)
    parts = max(1, min(triton.cdiv(COVER, tile), batch * triton.cdiv(length, INTERVAL) * tiles // PROGRAMS))
    across = triton.cdiv(tiles, parts)
    plan = _plan(u, cu_seqlens, across, True)
    carries = None
    if not plan.whole:
        carries, delta_sums = A.new_empty(plan.chunks, *A.shape), A.new_empty(plan.chunks, channels)
        local_tile, warps = _forward_tile(padded)
        _local_back_kernel[(plan.chunks * triton.cdiv(channels, local_tile),)](
            grad_out, delta, A, C, carries, delta_sums, *plan.places,
            channels, size, padded, local_tile, STEPS, plan.even, num_warps=warps,
        )  # fmt: skip
        _carry(A, delta_sums, grad_state, carries, plan, reverse=True)

    scratch = A.new_empty(plan.chunks * across, INTERVAL // STEPS, tile, padded)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_A = A.new_empty(plan.chunks, *A.shape)
    grad_B, grad_C = (A.new_empty(across, *x.shape) for x in (B, C))
    grad_D = None if D is None else A.new_empty(plan.chunks, channels)
    grad_initial = None if initial_state is None else _row_states(A, plan, grad_state)
    _gradients_kernel[(plan.chunks * across,)](
        grad_out, grad_state, u, delta, A, B, C, D, block_states, carries, scratch,
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_initial, *plan.places, batch * length, parts,
        channels, size, padded, groups, lanes, planes, STEPS, plan.even, plan.whole, num_warps=1,
    )  # fmt: skip
    nothing = A.new_empty(0)
    return (
        grad_u,
        grad_delta,
        grad_A.sum(0),
        grad_B.sum(0),
        grad_C.sum(0),
        nothing if grad_D is None else grad_D.sum(0),
        nothing.clone() if grad_initial is None else grad_initial,
    )


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _ = u.shape
    if cu_seqlens is None:
        rows, blocks = batch, batch * ((length + INTERVAL - 1) // INTERVAL)
    else:
        rows = cu_seqlens.numel() - 1
        blocks = length // INTERVAL + rows
    return torch.empty_like(u), A.new_empty(rows, *A.shape), A.new_empty(blocks if keep_states else 0, *A.shape)


@_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    block_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    same = (torch.empty_like(x) for x in (u, delta, A, B, C))
    optional = (A.new_empty(0) if x is None else torch.empty_like(x) for x in (D, initial_state))
    return *same, *optional  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    block_states = output[2]
    ctx.mark_non_differentiable(block_states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, block_states)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, _: None) -> tuple[Any, ...]:
    D, initial_state = ctx.saved_tensors[5:7]
    *grads, grad_D, grad_initial = _backward(grad_out, grad_state, *ctx.saved_tensors)
    return *grads, None if D is None else grad_D, None if initial_state is None else grad_initial, None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
