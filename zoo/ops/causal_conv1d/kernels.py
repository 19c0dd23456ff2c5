"""causal_conv1d on a GPU: a program walks along the tokens with the last inputs in registers.

    z_t = bias + sum_w weight_w x_{t-W+1+w};   y_t = SiLU(z_t)
    dL/dx_t = sum_w weight_w dL/dz_{t+W-1-w};   dL/dweight_w = sum_t dL/dz_t x_{t-W+1+w}

Bytes bound it (4 an element forward and 6 backward in bfloat16), so each element is read once, but for W-1 tokens where
chunks meet: every thread keeps the last W-1 inputs of its own channels, and going back the last dL/dz too. The backward
computes z again rather than read it, and each of its programs writes its own part of dL/dweight and dL/dbias. A program
has one chunk of one document, so what depends on a document's bounds (its first inputs come from the initial state, its
last ones are the final state) is the same for all threads.

Legend: N tokens (batch x length), D channels, W width, n documents (rows of a batch). A program has a chunk of tokens x
BLOCK channels, and loads STEPS tokens at once.
"""

# mypy: disable-error-code="assignment,misc,no-untyped-def,var-annotated"
# ruff: noqa: RUF005, SIM102  (Triton knows no (*a, b), and settles only an `if` of its own when it compiles)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.causal_conv1d.autograd import register
from zoo.ops.dispatch import implements

BLOCK = 128  # one warp; 16 bytes a thread in float32
STEPS = 4
# Enough programs for 16 on each of an H100's 132 multiprocessors; chunks are no shorter than it takes.
PROGRAMS = 16 * 132
MIN_CHUNK, MAX_CHUNK = 16, 256


def _refuses(x: Tensor, weight: Tensor, *_: object) -> str | None:
    for tensor in (x, weight):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(tensor.dtype).removeprefix('torch.')} inputs"
    return None


@implements("causal_conv1d", "triton", refuses=_refuses)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = x, weight, bias, initial_state
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # Calling an operator takes longer than a token's kernel, so decoding goes without.
    call = _operator if differentiable or torch.compiler.is_compiling() else _forward
    return call(x, weight, bias, activation, initial_state, cu_seqlens)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, state = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, initial_state))
    length, tokens = x.shape[1], _as_rows(x)
    chunk, grid = _chunks(x, len(initial_state), cu_seqlens)
    _forward_kernel[grid](
        tokens,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        initial_state.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        out,
        state,
        length,
        len(initial_state),
        chunk,
        x.shape[2],
        tokens.stride(0),
        WIDTH=weight.shape[1],
        SILU=activation == "silu",
        STEPS=STEPS if length > 1 else 1,
        BLOCK=BLOCK,
        num_warps=1,
    )
    return out, state


def _backward(
    d_out: Tensor,
    d_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x, d_initial_state = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, initial_state))
    tokens, d_tokens = _as_rows(x), _as_rows(d_out)
    chunk, grid = _chunks(x, len(initial_state), cu_seqlens)
    partial = torch.empty(grid[0], weight.shape[1] + 1, x.shape[2], dtype=torch.float32, device=x.device)
    _backward_kernel[grid](
        d_tokens,
        None if d_state is None else d_state.contiguous(),
        tokens,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        initial_state.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        d_x,
        d_initial_state,
        partial,
        x.shape[1],
        len(initial_state),
        chunk,
        x.shape[2],
        d_tokens.stride(0),
        tokens.stride(0),
        WIDTH=weight.shape[1],
        SILU=activation == "silu",
        STEPS=STEPS,
        BLOCK=BLOCK,
        num_warps=1,
    )
    d_weight = partial[:, :-1].sum(0).t().to(weight.dtype).contiguous()
    d_bias = partial[:, -1].sum(0).to((weight if bias is None else bias).dtype)
    return d_x, d_weight, d_bias, d_initial_state


def _as_rows(x: Tensor) -> Tensor:
    """`[B,T,D]` to `[B*T,D]` with adjacent channels, copied only where it must be."""
    x = x.flatten(0, 1)
    return x if x.stride(1) == 1 else x.contiguous()


def _chunks(x: Tensor, documents: int, cu_seqlens: Tensor | None) -> tuple[int, tuple[int, int]]:
    """The tokens of a chunk, and the grid. Packed documents have chunks of their own, how many the GPU alone knows."""
    batch, length, channels = x.shape
    tiles = triton.cdiv(channels, BLOCK)
    chunk = batch * length * tiles // PROGRAMS // MIN_CHUNK * MIN_CHUNK
    chunk = min(max(chunk, MIN_CHUNK), MAX_CHUNK)
    if cu_seqlens is None:
        return chunk, (batch * triton.cdiv(length, chunk), tiles)
    return chunk, (length // chunk + documents, tiles)


@triton.jit
def _find_chunk(cu_seqlens, length, documents, chunk):
    """The document of this program, its bounds, and the bounds of the chunk in it.

    Document i has cu[i+1] // chunk - cu[i] // chunk + 1 programs: enough, one even if it is empty, and the first is
    found without a sum. The last may have nothing left, and then begins at the end.
    """
    program = tl.program_id(0)
    if cu_seqlens is None:
        chunks = tl.cdiv(length, chunk)
        document = (program // chunks).to(tl.int64)
        start = document * length
        end = start + length
        begin = start + (program % chunks) * chunk
    else:
        low = program * 0
        high = low + documents
        while high - low > 1:
            middle = (low + high) // 2
            after = tl.load(cu_seqlens + middle) // chunk + middle > program
            low = tl.where(after, low, middle)
            high = tl.where(after, middle, high)
        document = low.to(tl.int64)
        start = tl.load(cu_seqlens + low).to(tl.int64)
        end = tl.load(cu_seqlens + low + 1).to(tl.int64)
        begin = tl.minimum(start + (program - start // chunk - low) * chunk, end)
    return document, start, end, begin


@triton.jit
def _where(condition, channel, channels):
    """The channels' mask, empty unless a condition that is the same for all threads holds."""
    return channel < tl.where(condition, channels, 0)


@triton.jit
def _inputs_before(token, x, state, start, document, channels, stride_x, channel, WIDTH: tl.constexpr):
    """The W-1 inputs before a token, oldest first; those before its document's start are in the state."""
    inputs = ()
    for w in tl.static_range(WIDTH - 1):
        row = token - (WIDTH - 1) + w
        now = tl.load(x + row * stride_x + channel, mask=_where(row >= start, channel, channels), other=0.0).to(
            tl.float32
        )
        slot = (document * channels + channel) * (WIDTH - 1) + row - start + WIDTH - 1
        inputs = inputs + (now + tl.load(state + slot, mask=_where(row < start, channel, channels), other=0.0),)
    return inputs


@triton.jit
def _load_weights(weight, bias, channel, mask, WIDTH: tl.constexpr):
    columns = ()
    for w in tl.static_range(WIDTH):
        columns = columns + (tl.load(weight + channel * WIDTH + w, mask=mask, other=0.0).to(tl.float32),)
    if bias is None:
        offset = columns[0] * 0.0
    else:
        offset = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    return columns, offset


@triton.jit
def _forward_kernel(
    x,  # [N, D], rows stride_x apart
    weight,  # [D, W]
    bias,  # [D] or None
    initial_state,  # [n, D, W-1]
    cu_seqlens,  # [n+1] or None
    out,  # [N, D]
    state,  # [n, D, W-1]
    length,
    documents,
    chunk,
    channels,
    stride_x,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    document, start, end, begin = _find_chunk(cu_seqlens, length, documents, chunk)
    stop = tl.minimum(begin + chunk, end)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    columns, offset = _load_weights(weight, bias, channel, mask, WIDTH)
    inputs = _inputs_before(begin, x, initial_state, start, document, channels, stride_x, channel, WIDTH)
    token = begin
    while token < stop:
        for i in tl.static_range(STEPS):
            row = token + i
            now = tl.load(x + row * stride_x + channel, mask=_where(row < stop, channel, channels), other=0.0)
            inputs = inputs + (now.to(tl.float32),)
        for i in tl.static_range(STEPS):
            row = token + i
            z = offset
            for w in tl.static_range(WIDTH):
                z += columns[w] * inputs[i + w]
            if SILU:
                z *= tl.sigmoid(z)
            tl.store(
                out + row * channels + channel, z.to(out.dtype.element_ty), mask=_where(row < stop, channel, channels)
            )
        inputs = inputs[STEPS:]
        token += STEPS
    if stop == end:
        last = _inputs_before(end, x, initial_state, start, document, channels, stride_x, channel, WIDTH)
        for w in tl.static_range(WIDTH - 1):
            tl.store(state + (document * channels + channel) * (WIDTH - 1) + w, last[w], mask=mask)


@triton.jit
def _backward_kernel(
    d_out,  # [N, D], rows stride_d apart
    d_state,  # [n, D, W-1] or None
    x,  # [N, D], rows stride_x apart
    weight,  # [D, W]
    bias,  # [D] or None
    initial_state,  # [n, D, W-1]
    cu_seqlens,  # [n+1] or None
    d_x,  # [N, D]
    d_initial_state,  # [n, D, W-1]
    partial,  # [programs, W+1, D]: of dL/dweight, then of dL/dbias
    length,
    documents,
    chunk,
    channels,
    stride_d,
    stride_x,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    document, start, end, begin = _find_chunk(cu_seqlens, length, documents, chunk)
    stop = tl.minimum(begin + chunk, end)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    slot = (document * channels + channel) * (WIDTH - 1)
    columns, offset = _load_weights(weight, bias, channel, mask, WIDTH)
    inputs = _inputs_before(begin, x, initial_state, start, document, channels, stride_x, channel, WIDTH)
    slopes = ()  # the last dL/dz
    for _ in tl.static_range(WIDTH - 1):
        slopes = slopes + (tl.zeros((BLOCK,), tl.float32),)
    sums = ()
    for _ in tl.static_range(WIDTH + 1):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)

    # The gradient of an input is known W-1 tokens later, so the walk goes on for as many past the chunk, and past the
    # document's end, where the final state stands in for the tokens that follow.
    token = begin
    while token < stop + WIDTH - 1:
        gradients = ()
        for i in tl.static_range(STEPS):
            row = token + i
            here = _where(row < tl.minimum(stop + WIDTH - 1, end), channel, channels)
            inputs = inputs + (tl.load(x + row * stride_x + channel, mask=here, other=0.0).to(tl.float32),)
            gradients = gradients + (tl.load(d_out + row * stride_d + channel, mask=here, other=0.0).to(tl.float32),)
        for i in tl.static_range(STEPS):
            row = token + i
            slope = gradients[i]
            if SILU:
                z = offset
                for w in tl.static_range(WIDTH):
                    z += columns[w] * inputs[i + w]
                sigmoid = tl.sigmoid(z)
                slope *= sigmoid * (1 + z * (1 - sigmoid))
            slopes = slopes + (slope,)
            own = tl.where(row < stop, slope, 0.0)
            added = ()
            for w in tl.static_range(WIDTH):
                added = added + (sums[w] + own * inputs[i + w],)
            sums = added + (sums[WIDTH] + own,)

            d_input = columns[0] * slopes[i + WIDTH - 1]
            for w in tl.static_range(1, WIDTH):
                d_input += columns[w] * slopes[i + WIDTH - 1 - w]
            back = row - (WIDTH - 1)
            if d_state is not None:
                if (row >= end) & (back < stop):
                    d_input += tl.load(d_state + slot + row - end, mask=mask, other=0.0)
            if back >= begin:
                d_row = d_x + back * channels + channel
                tl.store(d_row, d_input.to(d_x.dtype.element_ty), mask=_where(back < stop, channel, channels))
            else:
                if begin == start:
                    tl.store(d_initial_state + slot + row - start, d_input, mask=mask)
        inputs = inputs[STEPS:]
        slopes = slopes[STEPS:]
        token += STEPS
    for w in tl.static_range(WIDTH + 1):
        place = (tl.program_id(0).to(tl.int64) * (WIDTH + 1) + w) * channels + channel
        tl.store(partial + place, sums[w], mask=mask)


_operator = register("causal_conv1d_triton", _forward, _backward)
