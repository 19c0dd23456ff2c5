"""gated_rms_norm on a GPU: a row is read once and its result written once, forward and backward.

    N(u) = u / sqrt(mean(u^2) + eps);   y = N(x a) weight   or   y = N(x) weight a,   a = activation(gate)

and back, with the names of chunked.py:

    d = dL/dy r,  p = d x a,  dL/dweight = sum over rows of p,  c = -r^2 mean(p weight)
    gate first:  e = d weight + c x a,   dL/dx = e a             gate last:  e = d weight,   dL/dx = e a + c x
    dL/dgate = e x activation'(gate)

Bytes bound it (6 an element forward and 10 backward in bfloat16), so a program keeps its rows in registers between the
sum and the result. A group of more than MAX_BLOCK channels does not fit: the forward then reads it twice, the second
time from the cache, and the backward finds c in a kernel of its own. Each program of the backward adds up dL/dweight
over all its rows and writes one partial sum.

Legend: R rows (batch x length), G groups, C channels of one group. A program has tiles of ROWS rows x BLOCK channels of
one group.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.gated_rms_norm.autograd import register

# 8 elements a thread, a load of 16 bytes in bfloat16, keep the backward's registers below 128; the longest groups
# have 16.
PER_WARP = 256
TILE = 4 * PER_WARP
MAX_WARPS = 16
MAX_BLOCK = 2 * MAX_WARPS * PER_WARP
# Warps of the backward: 16 for each of an H100's 132 multiprocessors, as many as 128 registers each allow.
WARPS = 16 * 132


def _refuses(x: Tensor, gate: Tensor, *_: object) -> str | None:
    for tensor in (x, gate):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(tensor.dtype).removeprefix('torch.')} inputs"
    return None


@implements("gated_rms_norm", "triton", refuses=_refuses)
def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, num_groups: int, activation: str, gate_first: bool
) -> Tensor:
    differentiable = torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad or weight.requires_grad)
    # Calling an operator takes longer than a token's kernel, so decoding goes without.
    call = _operator if differentiable or torch.compiler.is_compiling() else _forward
    return call(x, gate, weight, eps, num_groups, activation, gate_first)[0]


def _forward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, num_groups: int, activation: str, gate_first: bool
) -> tuple[Tensor, Tensor]:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    r = torch.empty(*x.shape[:2], num_groups, dtype=torch.float32, device=x.device)
    x, gate = _as_rows(x), _as_rows(gate)
    channels = x.shape[1] // num_groups
    rows, block, warps = _tile(channels)
    _forward_kernel[(triton.cdiv(x.shape[0], rows), num_groups)](
        x,
        gate,
        weight.contiguous(),
        out,
        r,
        x.shape[0],
        x.stride(0),
        gate.stride(0),
        num_groups,
        eps,
        CHANNELS=channels,
        SILU=activation == "silu",
        GATE_FIRST=gate_first,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return out, r


def _backward(
    d_out: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    r: Tensor,
    num_groups: int,
    activation: str,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_gate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
    d_out, x, gate, weight = _as_rows(d_out), _as_rows(x), _as_rows(gate), weight.contiguous()
    channels = x.shape[1] // num_groups
    rows, block, warps = _tile(channels)
    row_blocks, channel_blocks = triton.cdiv(x.shape[0], rows), triton.cdiv(channels, block)
    programs = min(row_blocks, triton.cdiv(WARPS // warps, num_groups * channel_blocks))
    partial = torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device)
    arguments = d_out, x, gate, weight, r
    sizes = x.shape[0], d_out.stride(0), x.stride(0), gate.stride(0), num_groups
    options = {"CHANNELS": channels, "SILU": activation == "silu", "ROWS": rows, "BLOCK": block, "num_warps": warps}
    c = None
    if channel_blocks > 1:
        c = torch.empty_like(r)
        _mean_kernel[(row_blocks, num_groups)](*arguments, c, *sizes, **options)
    _backward_kernel[(programs, channel_blocks, num_groups)](
        *arguments, c, d_x, d_gate, partial, *sizes, GATE_FIRST=gate_first, **options
    )
    return d_x, d_gate, partial.sum(0).to(weight.dtype)


def _as_rows(x: Tensor) -> Tensor:
    """`[B,T,C]` to `[B*T,C]` with adjacent channels, copied only where it must be."""
    x = x.flatten(0, 1)
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(channels: int) -> tuple[int, int, int]:
    """Rows, channels and warps of a tile."""
    block = min(triton.next_power_of_2(channels), MAX_BLOCK)
    rows = max(1, TILE // block)
    return rows, block, min(MAX_WARPS, rows * block // PER_WARP)


@triton.jit
def _activate(gate, SILU: tl.constexpr):
    sigmoid = tl.sigmoid(gate)
    if SILU:
        a = gate * sigmoid
        slope = sigmoid + a * (1 - sigmoid)
    else:
        a = sigmoid
        slope = sigmoid * (1 - sigmoid)
    return a, slope


@triton.jit
def _load(tensor, row, stride, column, mask):
    """A tile `[ROWS, BLOCK]` in float32."""
    return tl.load(tensor + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, row, stride, column, mask, tile):
    tl.store(tensor + row[:, None] * stride + column[None, :], tile.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x,  # [R, G*C], rows stride_x apart
    gate,  # [R, G*C], rows stride_gate apart
    weight,  # [G*C]
    out,  # [R, G*C]
    r,  # [R, G]
    num_rows,
    stride_x,
    stride_gate,
    num_groups,
    eps,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    channel = tl.arange(0, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, CHANNELS, BLOCK):
        column = group * CHANNELS + start + channel
        mask = in_rows[:, None] & (start + channel < CHANNELS)[None, :]
        x_tile = _load(x, row, stride_x, column, mask)
        a, _ = _activate(_load(gate, row, stride_gate, column, mask), SILU)
        u = x_tile * a if GATE_FIRST else x_tile
        squares += u * u
    scale = tl.rsqrt(tl.sum(squares, 1) / CHANNELS + eps)
    tl.store(r + row * num_groups + group, scale, mask=in_rows)
    for start in tl.static_range(0, CHANNELS, BLOCK):
        if CHANNELS > BLOCK:
            column = group * CHANNELS + start + channel
            mask = in_rows[:, None] & (start + channel < CHANNELS)[None, :]
            x_tile = _load(x, row, stride_x, column, mask)
            a, _ = _activate(_load(gate, row, stride_gate, column, mask), SILU)
        w = tl.load(weight + column, mask=start + channel < CHANNELS, other=0.0).to(tl.float32)
        _store(out, row, num_groups * CHANNELS, column, mask, x_tile * a * scale[:, None] * w[None, :])


@triton.jit
def _mean_kernel(
    d_out,  # [R, G*C], rows stride_d apart
    x,  # [R, G*C], rows stride_x apart
    gate,  # [R, G*C], rows stride_gate apart
    weight,  # [G*C]
    r,  # [R, G]
    c,  # [R, G]
    num_rows,
    stride_d,
    stride_x,
    stride_gate,
    num_groups,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c of groups that do not fit in one tile."""
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        column = group * CHANNELS + channel
        mask = in_rows[:, None] & (channel < CHANNELS)[None, :]
        a, _ = _activate(_load(gate, row, stride_gate, column, mask), SILU)
        w = tl.load(weight + column, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        p = _load(d_out, row, stride_d, column, mask) * _load(x, row, stride_x, column, mask) * a
        products += p * w[None, :]
    scale = tl.load(r + row * num_groups + group, mask=in_rows, other=0.0)
    mean = tl.sum(products, 1) / CHANNELS
    tl.store(c + row * num_groups + group, -scale * scale * scale * mean, mask=in_rows)


@triton.jit
def _backward_kernel(
    d_out,  # [R, G*C], rows stride_d apart
    x,  # [R, G*C], rows stride_x apart
    gate,  # [R, G*C], rows stride_gate apart
    weight,  # [G*C]
    r,  # [R, G]
    c,  # [R, G], or None where a group fits in one tile
    d_x,  # [R, G*C]
    d_gate,  # [R, G*C]
    partial,  # [programs, G*C], the sum of p over the rows of each program
    num_rows,
    stride_d,
    stride_x,
    stride_gate,
    num_groups,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_channels = channel < CHANNELS
    column = group * CHANNELS + channel
    w = tl.load(weight + column, mask=in_channels, other=0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    start = tl.program_id(0).to(tl.int64) * ROWS
    while start < num_rows:
        row = start + tl.arange(0, ROWS)
        in_rows = row < num_rows
        mask = in_rows[:, None] & in_channels[None, :]
        scale = tl.load(r + row * num_groups + group, mask=in_rows, other=0.0)
        d = _load(d_out, row, stride_d, column, mask) * scale[:, None]
        x_tile = _load(x, row, stride_x, column, mask)
        a, slope = _activate(_load(gate, row, stride_gate, column, mask), SILU)
        p = d * x_tile * a
        d_weight += p
        if c is None:
            factor = -scale * scale * (tl.sum(p * w[None, :], 1) / CHANNELS)
        else:
            factor = tl.load(c + row * num_groups + group, mask=in_rows, other=0.0)
        e = d * w[None, :]
        if GATE_FIRST:
            e += factor[:, None] * x_tile * a
            d_x_tile = e * a
        else:
            d_x_tile = e * a + factor[:, None] * x_tile
        _store(d_x, row, num_groups * CHANNELS, column, mask, d_x_tile)
        _store(d_gate, row, num_groups * CHANNELS, column, mask, e * x_tile * slope)
        start += tl.num_programs(0) * ROWS
    out = partial + tl.program_id(0).to(tl.int64) * num_groups * CHANNELS + column
    tl.store(out, tl.sum(d_weight, 0), mask=in_channels)


_operator = register("gated_rms_norm_triton", _forward, _backward)
