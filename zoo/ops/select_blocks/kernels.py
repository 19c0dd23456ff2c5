# mypy: disable-error-code="assignment,no-untyped-def"
"""select_blocks on a GPU, for so many queries at a time that their scores are no more than MAX_SCORES numbers.

    _lse_kernel    lse of every query and head over the compressed keys that it sees, unless it is given
    _score_kernel  score_j = sum_o w_o sum_heads exp(s q . k_(r j + o) - lse),   o = 1 - l/d ... r - 1,   r = l'/d
    _top_kernel    the best blocks one after another

where w_o is how many strides compressed block r j + o has in selected block j. Each o is a product of its own whose
columns are blocks to choose: nothing is pooled from one column to another, for (r + l/d - 1) / r times the
multiplications, 1.25 in NSA. No product has a computed operand.

Blocks are compared as whole numbers that hold the score and then the block, so that of equal scores the latest is the
best, whatever the chunk. torch.topk of them would read a row once for every two bits.

Legend: B batch, T queries, H heads, K key heads, G = H/K, C compressed keys, J blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.dispatch import implements

MAX_DIM = 256
MAX_SCORES = 2**25
LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**62)


def _refuses(q: Tensor, k: Tensor, *_: Any) -> str | None:
    for x in (q, k):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(x.dtype).removeprefix('torch.')} inputs"
    return f"head dims above {MAX_DIM}" if q.shape[3] > MAX_DIM else None


class _Tiles(NamedTuple):
    """Rows (heads of queries), columns (keys) and warps of a program."""

    rows: int
    columns: int
    warps: int


# Below 64 in any direction wgmma must not be used, and 2 warps cannot: see block_sparse_attention/kernels.py.
WGMMA = _Tiles(64, 64, 4)
TENSOR_CORE = _Tiles(32, 32, 2)
FLOAT32 = _Tiles(16, 16, 4)


def _tiles(dtype: torch.dtype, dim: int) -> _Tiles:
    if dtype == torch.float32:
        return FLOAT32
    return WGMMA if dim > 32 else TENSOR_CORE


@triton.jit
def _rows_of(tile, first, visible, row, length, queries, G: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """`(query, head, real, begin, count)` of a tile's rows: begin and count are those of the keys that each sees."""
    query = tile * (ROWS // GROUP) + tl.arange(0, ROWS) // GROUP
    head = tl.arange(0, ROWS) % GROUP
    real = (query < queries) & (head < G)
    begin = tl.load(first + row * length + query, mask=real, other=0)
    count = tl.load(visible + row * length + query, mask=real, other=0)
    return query, head, real, begin, count


@triton.jit(do_not_specialize=["length", "keys"])
def _lse_kernel(
    q,  # [B, T, H, D]
    k,  # [B, C, K, D]
    first,  # [B, T]
    visible,  # [B, T]
    lse,  # [B, T, H]
    scale,
    length,
    keys,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    G: tl.constexpr = H // K
    tiles = tl.cdiv(length, ROWS // GROUP)
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    group = (program // tiles) % K
    row = program // tiles // K
    query, head, real, begin, count = _rows_of(tile, first, visible, row, length, length, G, GROUP, ROWS)
    dim = tl.arange(0, BD)
    inside = (dim < D)[None, :]
    at = row * q_row + query * q_token + (group * G + head) * q_head
    q_tile = tl.load(q + at[:, None] + dim[None, :], mask=real[:, None] & inside, other=0)
    low = tl.min(tl.where(count > 0, begin, FAR), 0)
    high = tl.max(tl.where(count > 0, begin + count, 0), 0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(low, high, BC):
        column = start + tl.arange(0, BC)
        at = row * k_row + group * k_head + column * k_token
        k_tile = tl.load(k + at[:, None] + dim[None, :], mask=(column < high)[:, None] & inside, other=0)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        seen = (column[None, :] >= begin[:, None]) & (column[None, :] < (begin + count)[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(highest - level) + tl.sum(tl.exp2(logits - level[:, None]), 1)
        highest = higher
    found = tl.where(count > 0, (highest + tl.log2(tl.where(count > 0, total, 1.0))) / LOG2E, 0.0)
    tl.store(lse + (row * length + query) * H + group * G + head, found, mask=real)


@triton.jit(do_not_specialize=["length", "keys", "start", "queries", "blocks"])
def _score_kernel(
    q,
    k,
    first,
    visible,
    position,  # [B, T]
    lse,
    scores,  # [B, K, queries, blocks]
    scale,
    length,
    keys,
    start,  # the first of these queries
    queries,
    blocks,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    RATIO: tl.constexpr,  # strides in a selected block
    REACH: tl.constexpr,  # and in a compressed one
    SELECT: tl.constexpr,
    RECENT: tl.constexpr,
):
    G: tl.constexpr = H // K
    at_once: tl.constexpr = ROWS // GROUP
    block = tl.program_id(1) * BC + tl.arange(0, BC)
    tiles = tl.cdiv(queries, at_once)
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    group = (program // tiles) % K
    row = program // tiles // K
    # Queries are counted from `start`.
    first, visible = first + start, visible + start
    query, head, real, begin, count = _rows_of(tile, first, visible, row, length, queries, G, GROUP, ROWS)
    own = tl.load(position + start + row * length + query, mask=real, other=-1)
    own = tl.where(own < 0, -1, own // SELECT)
    # Tiles with nothing to choose are not read either.
    needed = own >= tl.program_id(1) * BC
    if RECENT is not None:
        needed = needed & (own - RECENT < (tl.program_id(1) + 1) * BC)
    if tl.max(needed.to(tl.int32), 0) == 0:
        return
    dim = tl.arange(0, BD)
    inside = (dim < D)[None, :]
    at = row * q_row + (start + query) * q_token + (group * G + head) * q_head
    q_tile = tl.load(q + at[:, None] + dim[None, :], mask=real[:, None] & inside, other=0)
    at = (row * length + start + query) * H + group * G + head
    level = tl.load(lse + at, mask=real, other=0.0) * LOG2E
    score = tl.zeros([at_once, BC], tl.float32)
    # One document after another, of those that the tile's queries are in.
    lowest = tl.min(tl.where(count > 0, begin, FAR), 0)
    while lowest < FAR:
        mine = tl.where(begin == lowest, count, 0)
        for o in range(1 - REACH, RATIO):
            rank = block * RATIO + o
            column = lowest + rank
            at = row * k_row + group * k_head + column * k_token
            there = (rank >= 0) & (column < keys)
            k_tile = tl.load(k + at[:, None] + dim[None, :], mask=there[:, None] & inside, other=0)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            seen = there[None, :] & (rank[None, :] < mine[:, None])
            p = tl.where(seen, tl.exp2(logits - level[:, None]), 0.0)
            weight = tl.minimum(o + REACH, RATIO) - tl.maximum(o, 0)
            score += tl.sum(tl.reshape(p, [at_once, GROUP, BC]), 1) * weight.to(tl.float32)
        lowest = tl.min(tl.where((count > 0) & (begin > lowest), begin, FAR), 0)
    query = tile * at_once + tl.arange(0, at_once)
    at = ((row * K + group) * queries + query) * blocks
    mask = (query < queries)[:, None] & (block < blocks)[None, :]
    tl.store(scores + at[:, None] + block[None, :], score, mask=mask)


@triton.jit(do_not_specialize=["length", "start", "queries", "blocks"])
def _top_kernel(
    scores,  # [B, K, queries, blocks]
    position,  # [B, T]
    chosen,  # [B, T, K, TOP]
    length,
    start,
    queries,
    blocks,
    K: tl.constexpr,
    TOP: tl.constexpr,
    SELECT: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    RECENT: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    query = program % queries
    group = (program // queries) % K
    row = program // queries // K
    own = tl.load(position + row * length + start + query)
    own = tl.where(own < 0, -1, own // SELECT)
    last = own * 0 + FAR
    for n in range(0, TOP):
        best = own * 0 - 1
        for begin in range(0, own + 1, TILE):
            block = begin + tl.arange(0, TILE).to(tl.int64)
            forced = (block < FIRST) | (block > own - LOCAL)
            allowed = block <= own
            if RECENT is not None:
                allowed = allowed & (forced | (block > own - RECENT))
            score = tl.load(scores + program * blocks + block, mask=allowed & (block < blocks), other=0.0)
            score = tl.where(forced, float("inf"), score)
            # Floats from 0 on are in the order of their bits.
            key = score.to(tl.int32, bitcast=True).to(tl.int64) * 2**31 + block
            best = tl.maximum(best, tl.max(tl.where(allowed & (key < last), key, -1), 0))
        tl.store(chosen + ((row * length + start + query) * K + group) * TOP + n, tl.where(best < 0, -1, best % 2**31))
        last = best


def _select_blocks(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    position: Tensor,
    lse: Tensor | None,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    top_n: int,
    first_blocks: int,
    local_blocks: int,
    recent_blocks: int | None,
    scale: float,
) -> Tensor:
    (batch, length, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k = (x.to(dtype) if x.stride(3) == 1 else x.to(dtype).contiguous() for x in (q, k))
    first, position = first.contiguous(), position.contiguous()
    visible = ((position + 1 - compress_block + compress_stride) // compress_stride).clamp(min=0)
    tiles = _tiles(dtype, dim)
    group = triton.next_power_of_2(heads // kv_heads)
    constants = {
        "H": heads,
        "K": kv_heads,
        "D": dim,
        "GROUP": group,
        "ROWS": max(tiles.rows, group),
        "BC": tiles.columns,
        "BD": max(16, triton.next_power_of_2(dim)),
        "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee",
        "num_warps": tiles.warps,
        "num_stages": 2,
    }
    strides = (*q.stride()[:3], *k.stride()[:3])
    at_once = constants["ROWS"] // group
    if lse is None:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _lse_kernel[(batch * kv_heads * triton.cdiv(length, at_once),)](
            q, k, first, visible, lse, scale, length, keys, *strides, **constants
        )
    lse = lse.float().contiguous()
    # So many tokens complete no more compressed blocks than there are.
    blocks = (keys * compress_stride + compress_block - 2) // select_block + 1
    chosen = torch.empty(batch, length, kv_heads, top_n, dtype=torch.int64, device=q.device)
    size = max(1, MAX_SCORES // max(1, batch * kv_heads * blocks))
    scores = lse.new_empty(batch * kv_heads * min(size, length) * blocks)
    for start in range(0, length, size):
        queries = min(size, length - start)
        _score_kernel[(batch * kv_heads * triton.cdiv(queries, at_once), triton.cdiv(blocks, tiles.columns))](
            q, k, first, visible, position, lse, scores, scale, length, keys, start, queries, blocks, *strides,
            **constants, RATIO=select_block // compress_stride, REACH=compress_block // compress_stride,
            SELECT=select_block, RECENT=recent_blocks,
        )  # fmt: skip
        _top_kernel[(batch * kv_heads * queries,)](
            scores, position, chosen, length, start, queries, blocks, kv_heads, top_n, select_block, first_blocks,
            local_blocks, recent_blocks, TILE=min(1024, triton.next_power_of_2(blocks)),
        )  # fmt: skip
    return chosen


_operator = torch.library.custom_op("zoo::select_blocks_triton", _select_blocks, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, first: Tensor, position: Tensor, lse: Tensor | None, *rule: Any) -> Tensor:
    return position.new_empty(*q.shape[:2], k.shape[2], rule[3])


@implements("select_blocks", "triton", refuses=_refuses)
def select_blocks(q: Tensor, k: Tensor, first: Tensor, position: Tensor, lse: Tensor | None, *rule: Any) -> Tensor:
    """The blocks as the public function documents them."""
    # Calling an operator takes longer than a token's kernel, so decoding goes without.
    call = _operator if torch.compiler.is_compiling() else _select_blocks
    return call(q, k, first, position, lse, *rule)
