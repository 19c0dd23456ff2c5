# mypy: disable-error-code="assignment,no-untyped-def"
"""block_sparse_attention on a GPU: a query's heads are the rows of a tile, and walk through the blocks chosen for them.

    P = softmax(S),   dV = P^T dO,   dS = P * (dO V^T - delta),   delta = rowsum(dO * O) - dlse
    dQ = dS K,   dK = dS^T Q

    _forward_kernel   out and lse: a program has one query, and the heads that share a key head
    _queries_kernel   dq and delta, the same way
    _keys_kernel      dk and dv: a program has a block of keys and a segment of the list of queries that chose it, of
                      which several are the rows of a tile
    _sum_kernel       adds up the segments of every block

The lists are the choices sorted by block (stable, so that they are in the queries' order). Some blocks are chosen by
nearly every query, as the first one by rule, hence segments: of a fixed number of queries, as many as there may be, and
those beyond the last return at once. No program adds to what another wrote, so a second run gives the same bits.

Bytes bound it: a query reads S C keys and values for 2 S C G D multiplications, from the second level cache, which
holds those of one key head up to some 64k tokens; hence programs go through all queries of a head before the next head.

A tile of queries has 16 or 32 rows, which keeps Hopper's wgmma away; its products go through registers. _keys_kernel
has 128, and a computed tile is the right-hand operand of every product (see linear_attention/kernels.py). Head dims up
to 32 are given to 2 warps, which cannot use wgmma: Triton 3.6 and 3.7 let it read past the end of such.

Legend: N queries of all rows, H heads, K key heads, G = H/K, S blocks per query, C keys per block, L keys of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from zoo.ops.block_sparse_attention.autograd import register
from zoo.ops.block_sparse_attention.places import Places
from zoo.ops.dispatch import implements

MAX_DIM = 256
# Choices in a segment, in terms of those that a block has on the average.
SEGMENT = 2
LOG2E = tl.constexpr(1.4426950408889634)


def _refuses(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    for x in (q, k, v):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(x.dtype).removeprefix('torch.')} inputs"
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return f"head dims above {MAX_DIM}"
    return None


@implements("block_sparse_attention", "triton", refuses=_refuses)
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    queries, keys, values = (x.to(dtype) for x in (q, k, v))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # Calling an operator takes longer than a token's kernel, so decoding goes without.
    call = _operator if differentiable or torch.compiler.is_compiling() else _forward
    out, lse, _ = call(queries, keys, values, block_indices, block_size, scale, cu_seqlens, key_mask)
    return out.to(q.dtype), lse


class _Tiles(NamedTuple):
    """Keys in a tile of one query; keys, rows, warps and stages of a program that has a block."""

    keys: int
    block_keys: int
    rows: int
    warps: int
    stages: int


# Warps, four by four, have 64 rows of every result each, or the keys would be divided among them.
WIDE = _Tiles(64, 64, 128, 8, 2)
WGMMA = _Tiles(64, 64, 64, 4, 2)
TENSOR_CORE = _Tiles(32, 32, 32, 2, 2)
# Multiplied one by one, larger products do not fit the registers.
FLOAT32 = _Tiles(16, 16, 16, 8, 1)
MAX_ROWS = 32  # heads in a tile of one query


def _tiles(dtype: torch.dtype, *dims: int) -> _Tiles:
    if dtype == torch.float32:
        return FLOAT32
    if min(dims) <= 32:
        return TENSOR_CORE
    tiles = WGMMA if min(dims) <= 64 else WIDE
    return tiles if max(dims) <= 128 else tiles._replace(stages=1)  # what shared memory holds


def _power(size: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(size))


@triton.jit
def _stands(query, start, position, length, key_length):
    """`(row, own, begin)`: a query's row, where it stands in its document or among its row's real keys (-1 at none),
    and the column where those begin."""
    row = query // length
    column = key_length - length + query % length
    begin = column * 0
    if start is not None:
        begin = tl.load(start + column)
    own = column - begin
    if position is not None:
        own = tl.load(position + row * key_length + column)
    return row, own, begin


@triton.jit
def _columns(begin, place, order, row, key_length, inside):
    """Where the keys at these places stand, and a mask of those that are."""
    column = begin + place
    inside = inside & (column < key_length)
    if order is not None:
        column = tl.load(order + row * key_length + column, mask=inside, other=0)
    return column, inside


@triton.jit
def _load(x, offset, rows, dim, DIM: tl.constexpr):
    return tl.load(x + offset[:, None] + dim[None, :], mask=rows[:, None] & (dim < DIM)[None, :], other=0)


@triton.jit
def _block_tile(blocks, choice, i, own, begin, order, row, key_length, S, C: tl.constexpr, BC: tl.constexpr):
    """`(column, seen)` of the i-th tile of a query's keys."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    block = tl.load(blocks + choice * S + i // tiles).to(tl.int64)
    inside = (i % tiles) * BC + tl.arange(0, BC)
    place = block * C + inside
    return _columns(begin, place, order, row, key_length, (block >= 0) & (inside < C) & (place <= own))


@triton.jit(do_not_specialize=["length", "key_length", "queries", "S"])
def _forward_kernel(
    q,  # [B, T, H, D]
    k,  # [B, L, K, D]
    v,  # [B, L, K, DV]
    blocks,  # [N, K, S], -1 is none
    start,  # [L] or None
    position,  # [B, L] or None
    order,  # [B, L] or None
    out,  # [N, H, DV]
    lse,  # [N, H]
    scale,
    length,
    key_length,
    queries,
    S,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    G: tl.constexpr = H // K
    row_tiles: tl.constexpr = (G + ROWS - 1) // ROWS
    program = tl.program_id(0).to(tl.int64)
    query = program % queries
    program = program // queries
    group = program // row_tiles
    head = (program % row_tiles) * ROWS + tl.arange(0, ROWS)
    real = head < G
    head += group * G
    row, own, begin = _stands(query, start, position, length, key_length)
    dim = tl.arange(0, BD)
    dim_v = tl.arange(0, BDV)
    q_tile = _load(q + row * q_row + (query % length) * q_token, head * q_head, real, dim, D)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BDV], tl.float32)
    for i in range(0, S * ((C + BC - 1) // BC)):
        column, seen = _block_tile(blocks, query * K + group, i, own, begin, order, row, key_length, S, C, BC)
        k_tile = _load(k + row * k_row + group * k_head, column * k_token, seen, dim, D)
        v_tile = _load(v + row * v_row + group * v_head, column * v_token, seen, dim_v, DV)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(logits - level[:, None])
        shrunk = tl.exp2(highest - level)
        total = total * shrunk + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrunk[:, None], input_precision=PRECISION)
        highest = higher
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    at = query * H + head
    mask = real[:, None] & (dim_v < DV)[None, :]
    tl.store(out + at[:, None] * DV + dim_v[None, :], acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at, tl.where(total > 0, (highest + tl.log2(total)) / LOG2E, float("-inf")), mask=real)


@triton.jit(do_not_specialize=["length", "key_length", "queries", "S"])
def _queries_kernel(
    q,
    k,
    v,
    blocks,
    start,
    position,
    order,
    out,  # [N, H, DV]
    lse,  # [N, H]
    d_out,  # [N, H, DV]
    d_lse,  # [N, H] or None
    d_q,  # [N, H, D]
    delta,  # [N, H]
    scale,
    length,
    key_length,
    queries,
    S,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    G: tl.constexpr = H // K
    row_tiles: tl.constexpr = (G + ROWS - 1) // ROWS
    program = tl.program_id(0).to(tl.int64)
    query = program % queries
    program = program // queries
    group = program // row_tiles
    head = (program % row_tiles) * ROWS + tl.arange(0, ROWS)
    real = head < G
    head += group * G
    row, own, begin = _stands(query, start, position, length, key_length)
    dim = tl.arange(0, BD)
    dim_v = tl.arange(0, BDV)
    at = query * H + head
    q_tile = _load(q + row * q_row + (query % length) * q_token, head * q_head, real, dim, D)
    d_out_tile = _load(d_out, at * DV, real, dim_v, DV)
    out_tile = _load(out, at * DV, real, dim_v, DV)
    level = tl.load(lse + at, mask=real, other=0.0)
    change = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if d_lse is not None:
        change -= tl.where(level == float("-inf"), 0.0, tl.load(d_lse + at, mask=real, other=0.0))
    tl.store(delta + at, change, mask=real)
    level *= LOG2E
    acc = tl.zeros([ROWS, BD], tl.float32)
    for i in range(0, S * ((C + BC - 1) // BC)):
        column, seen = _block_tile(blocks, query * K + group, i, own, begin, order, row, key_length, S, C, BC)
        k_tile = _load(k + row * k_row + group * k_head, column * k_token, seen, dim, D)
        v_tile = _load(v + row * v_row + group * v_head, column * v_token, seen, dim_v, DV)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.where(seen[None, :], tl.exp2(logits - level[:, None]), 0.0)
        d_p = tl.dot(d_out_tile, tl.trans(v_tile), input_precision=PRECISION)
        d_logits = p * (d_p - change[:, None])
        acc = tl.dot(d_logits.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    mask = real[:, None] & (dim < D)[None, :]
    tl.store(d_q + at[:, None] * D + dim[None, :], (acc * scale).to(d_q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "key_length", "S", "lists", "size"])
def _keys_kernel(
    q,
    k,
    v,
    blocks,
    start,
    position,
    order,
    lse,
    d_out,
    delta,
    choices,  # [N*K*S] places in `blocks`, those of one list after those of another
    first_choice,  # [lists + 1], of each list
    first_segment,  # [lists + 1], of each list
    list_of,  # [segments]
    part_k,  # [segments, C, D]
    part_v,  # [segments, C, DV]
    scale,
    length,
    key_length,
    S,
    lists,
    size,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`ROWS` rows are as many queries with `GROUP` heads each, of them H // K real."""
    G: tl.constexpr = H // K
    tiles: tl.constexpr = (C + BC - 1) // BC
    at_once: tl.constexpr = ROWS // GROUP
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    inside = (tl.program_id(0) % tiles) * BC + tl.arange(0, BC)
    mine = tl.minimum(tl.load(list_of + segment), lists - 1)
    first = tl.load(first_choice + mine) + (segment - tl.load(first_segment + mine)) * size
    stop = tl.minimum(first + size, tl.load(first_choice + mine + 1))
    if first >= stop:
        return
    group = mine % K
    choice = tl.load(choices + first)
    row, _own, begin = _stands(choice // (K * S), start, position, length, key_length)
    place = tl.load(blocks + choice).to(tl.int64) * C + inside
    column, there = _columns(begin, place, order, row, key_length, inside < C)
    dim = tl.arange(0, BD)
    dim_v = tl.arange(0, BDV)
    k_tile = _load(k + row * k_row + group * k_head, column * k_token, there, dim, D)
    v_tile = _load(v + row * v_row + group * v_head, column * v_token, there, dim_v, DV)
    sum_k = tl.zeros([BD, BC], tl.float32)
    sum_v = tl.zeros([BDV, BC], tl.float32)
    for i in range(first, stop, at_once):
        index = i + tl.arange(0, ROWS) // GROUP
        head = tl.arange(0, ROWS) % GROUP
        real = (index < stop) & (head < G)
        head += group * G
        query = tl.load(choices + index, mask=real, other=0) // (K * S)
        at = query * H + head
        token = query - row * length
        own = key_length - length + token - begin
        if position is not None:
            own = tl.load(position + row * key_length + key_length - length + token, mask=real, other=0)
        q_tile = _load(q + row * q_row, token * q_token + head * q_head, real, dim, D)
        d_out_tile = _load(d_out, at * DV, real, dim_v, DV)
        level = tl.load(lse + at, mask=real, other=0.0) * LOG2E
        change = tl.load(delta + at, mask=real, other=0.0)
        seen = real[:, None] & there[None, :] & (place[None, :] <= own[:, None])
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.where(seen, tl.exp2(logits - level[:, None]), 0.0)
        d_p = tl.dot(d_out_tile, tl.trans(v_tile), input_precision=PRECISION)
        d_logits = p * (d_p - change[:, None])
        sum_v = tl.dot(tl.trans(d_out_tile), p.to(d_out_tile.dtype), sum_v, input_precision=PRECISION)
        sum_k = tl.dot(tl.trans(q_tile), d_logits.to(q_tile.dtype), sum_k, input_precision=PRECISION)
    at = segment * C + inside
    tl.store(part_k + at[None, :] * D + dim[:, None], sum_k * scale, mask=(dim < D)[:, None] & (inside < C)[None, :])
    tl.store(part_v + at[None, :] * DV + dim_v[:, None], sum_v, mask=(dim_v < DV)[:, None] & (inside < C)[None, :])


@triton.jit(do_not_specialize=["keys"])
def _sum_kernel(
    part,  # [segments, C, D]
    first_segment,  # [lists + 1]
    slot,  # [B*L], where each key stands in the blocks of all documents; -1 where it is masked
    grad,  # [B*L, K, D]
    keys,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program % K
    key = (program // K) * BN + tl.arange(0, BN)
    dim = tl.arange(0, BD)
    at = tl.load(slot + key, mask=key < keys, other=-1)
    real = at >= 0
    mine = at // C * K + group
    first = tl.load(first_segment + mine, mask=real, other=0)
    stop = tl.load(first_segment + mine + 1, mask=real, other=0)
    acc = tl.zeros([BN, BD], tl.float32)
    for i in range(0, tl.max(stop - first, 0)):
        acc += _load(part, ((first + i) * C + at % C) * D, real & (first + i < stop), dim, D)
    mask = (key < keys)[:, None] & (dim < D)[None, :]
    tl.store(grad + (key * K + group)[:, None] * D + dim[None, :], acc.to(grad.dtype.element_ty), mask=mask)


def _arguments(q: Tensor, k: Tensor, v: Tensor, places: Places) -> tuple[list[int], dict[str, Any]]:
    """Strides, and constants of all kernels but the last."""
    heads, kv_heads = q.shape[2], k.shape[2]
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    constants = {
        "H": heads,
        "K": kv_heads,
        "D": q.shape[3],
        "DV": v.shape[3],
        "C": places.block_size,
        "BD": _power(q.shape[3]),
        "BDV": _power(v.shape[3]),
        "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee",
    }
    return strides, constants


def _adjacent(x: Tensor) -> Tensor:
    """With adjacent dims, copied only where it must be: a cache is not."""
    return x if x.stride(3) == 1 else x.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and the blocks as the kernels read them."""
    q, k, v = (_adjacent(x) for x in (q, k, v))
    places = Places(q, k, block_size, cu_seqlens, key_mask)
    blocks = places.blocks(block_indices)
    queries, kv_heads, chosen = blocks.shape
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    strides, constants = _arguments(q, k, v, places)
    tiles = _tiles(q.dtype, q.shape[3], v.shape[3])
    rows = min(MAX_ROWS, _power(q.shape[2] // kv_heads))
    _forward_kernel[(queries * kv_heads * triton.cdiv(q.shape[2] // kv_heads, rows),)](
        q, k, v, blocks, places.start, places.position, places.order, out, lse,
        scale, q.shape[1], k.shape[1], queries, chosen, *strides,
        **constants, ROWS=rows, BC=min(tiles.keys, _power(block_size)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse, blocks


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v = (_adjacent(x) for x in (q, k, v))
    d_out, d_lse = d_out.contiguous(), None if d_lse is None else d_lse.contiguous()
    places = Places(q, k, block_size, cu_seqlens, key_mask)
    queries, kv_heads, chosen = blocks.shape
    group = q.shape[2] // kv_heads
    strides, constants = _arguments(q, k, v, places)
    tiles = _tiles(q.dtype, q.shape[3], v.shape[3])
    tables = places.start, places.position, places.order
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    rows = min(MAX_ROWS, _power(group))
    _queries_kernel[(queries * kv_heads * triton.cdiv(group, rows),)](
        q, k, v, blocks, *tables, out, lse, d_out, d_lse, d_q, delta,
        scale, q.shape[1], k.shape[1], queries, chosen, *strides,
        **constants, ROWS=rows, BC=min(tiles.keys, _power(block_size)), num_warps=4, num_stages=2,
    )  # fmt: skip

    choices, first_choice = places.lists(blocks)
    lists = first_choice.numel() - 1
    size = max(1, int(SEGMENT * chosen * block_size))
    first_segment = pad(((first_choice.diff() + size - 1) // size).cumsum(0), (1, 0))
    segments = choices.numel() // size + min(lists, choices.numel())
    list_of = torch.searchsorted(first_segment[1:], torch.arange(segments, device=q.device), right=True)
    parts = [q.new_empty(segments, block_size, x.shape[3], dtype=torch.float32) for x in (k, v)]
    if segments:
        keys = min(tiles.block_keys, _power(block_size))
        _keys_kernel[(segments * triton.cdiv(block_size, keys),)](
            q, k, v, blocks, *tables, lse, d_out, delta, choices, first_choice, first_segment, list_of, *parts,
            scale, q.shape[1], k.shape[1], chosen, lists, size, *strides,
            **constants, ROWS=max(tiles.rows, _power(group)), GROUP=_power(group, 1), BC=keys,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    position, (base, _) = places.per_key(), places.base()
    slot = torch.where(position < 0, -1, base * block_size + position).flatten()
    grads = []
    for part, x in zip(parts, (k, v), strict=True):
        grads.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
        dim = _power(x.shape[3])
        rows = max(1, 2048 // dim)
        _sum_kernel[(triton.cdiv(slot.numel(), rows) * kv_heads,)](
            part, first_segment, slot, grads[-1], slot.numel(), kv_heads, x.shape[3], block_size, rows, dim
        )  # fmt: skip
    return d_q, grads[0], grads[1]


_operator, _backward_operator = register("block_sparse_attention_triton", _forward, _backward)
