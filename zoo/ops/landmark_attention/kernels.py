# mypy: disable-error-code="assignment,no-untyped-def"
"""landmark_attention on a GPU: tiles of queries against block after block, forward and backward.

In the names of chunked.py, with Z the log-sum-exp of a query's softmax over blocks, D = dO . out and
c_b = sum_{j in b} a_j dP_j,

    own block      P_j = exp(s_j - Z),          ds_j = P_j (dP_j - D)
    earlier block  P_j = pi_b exp(s_j - L_b),   ds_j = P_j (dP_j - c_b),   ds_landmark(b) = pi_b (c_b - D)

L_b and c_b of a query and an earlier block are a sum over the block alone, so a tile that holds the block has them at
once, and none is ever stored. The backward reads a longer block, of t tiles, once more for them with each tile of
queries, and for dk and dv with each of its own t tiles too: t + 1 times. No memory is of the length squared; the work
is.

    _forward_kernel   out and Z, a tile of queries over all blocks it sees
    _query_kernel     dq, the same way
    _key_kernel       dk and dv of a tile of a block's keys, and dk of its landmark, over all queries that see it

With top_k, chosen.py makes lists of the queries that read a block, and two kernels serve them, for blocks that are one
tile (longer ones are left to PyTorch): the choice is a product and a top-k of its own.

    _list_kernel      what some entries of a list read, and their log-sum-exps
    _group_kernel     dk and dv of a block, over all of its lists, and each entry's part of dq

Padding is taken out before; then the ordinary keys of a block lie side by side, its landmark behind them. As in
linear_attention, a computed tile is the right-hand operand of a product on wgmma, hence results come transposed.
Operands are of the inputs' dtype, sums float32; logarithms binary.

A program has 4 warps where every tile has 64 in both directions, else 2, which cannot use wgmma (both for the sake of
Triton 3.6 and 3.7: see interval_attention and block_sparse_attention). Of landmarks there are fewer: as the 16 rows of
a left-hand operand they keep wgmma away by themselves.

Legend: N queries, S keys, H heads, K kv heads, D and V the head dims, B blocks. A program has M queries, and keys in
tiles of KEYS. Landmarks are compared GROUP at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.dispatch import implements, outside_autocast
from zoo.ops.landmark_attention import chosen
from zoo.ops.landmark_attention.chosen import _Blocks, _Size

MAX_DIM = 256
GROUP = tl.constexpr(16)  # the least that the tensor cores take
LOG2E = 1.4426950408889634


def _refuses(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    for x in (q, k, v):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(x.dtype).removeprefix('torch.')} inputs"
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return f"head dims above {MAX_DIM}"
    return None


@implements("landmark_attention", "triton", refuses=_refuses)
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    top_k: int | None,
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    inputs = q.to(dtype), k.to(dtype), v.to(dtype)
    if top_k is None:
        out = _forward(*inputs, is_landmark, scale, cu_seqlens, key_mask)[0]
    else:
        out = chosen.landmark_attention(*inputs, is_landmark, scale, cu_seqlens, key_mask, top_k, fused=True)
    return out.to(q.dtype)


class _Tiles(NamedTuple):
    """Queries, keys and warps of a program."""

    queries: int
    keys: int
    warps: int


WGMMA = _Tiles(64, 64, 4)


def _tiles(dtype: torch.dtype, dims: tuple[int, int], longest: int) -> _Tiles:
    """For blocks of up to so many keys."""
    dim = max(_power(x) for x in dims)
    if dtype == torch.float32:
        # Unrolled into single multiplications, larger products do not fit the registers.
        tiles = _Tiles(16, 32 if dim <= 128 else 16, 4 if _precision() == "ieee" else 2)
    elif longest > 32 and dim <= 128 and min(dims) > 32:
        tiles = WGMMA
    else:
        tiles = _Tiles(32 if dim <= 64 else 16, min(64, 4096 // dim), 2)
    return tiles._replace(keys=min(tiles.keys, _power(longest)))


def _power(size: int) -> int:
    """The least tile that holds so many."""
    return max(16, triton.next_power_of_2(size))


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class _Launch:
    """What all kernels get.

    rows      of the padded batch that are real: `blocks`' query_row and key_row
    by_query  int32 `[3, N]`: the first block of its sequence, its own block, its own key
    by_block  int32 `[5, B]`: first key, ordinary keys, whether a landmark stands for them, the queries that see it from
              first to last (exclusive)
    by_tile   int32 `[2, tiles]`: the block, and how many of its keys come before
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_landmark: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
        key_mask: Tensor | None,
    ) -> None:
        self.blocks = blocks = _Blocks(q, is_landmark, cu_seqlens, key_mask)
        self.heads, self.kv_heads = q.shape[2], k.shape[2]
        longest = int(blocks.count.max()) if len(blocks.count) else 1
        tiles = _tiles(q.dtype, (q.shape[3], v.shape[3]), longest)
        keys = tiles.keys
        self.by_query = torch.stack([blocks.first_block, blocks.own, blocks.place]).int()
        index = torch.arange(len(blocks.count), device=q.device)
        seen = torch.searchsorted(blocks.own, index), torch.searchsorted(blocks.first_block, index, right=True)
        self.by_block = torch.stack([blocks.start, blocks.count, (blocks.landmark >= 0).long(), *seen]).int()
        counts = (blocks.count + keys - 1) // keys
        block = index.repeat_interleave(counts)
        before = (torch.arange(len(block), device=q.device) - (counts.cumsum(0) - counts)[block]) * keys
        self.by_tile = torch.stack([block, before]).int()
        self.queries = len(blocks.own)
        self.options = {
            "H": self.heads,
            "K": self.kv_heads,
            "DIM": q.shape[3],
            "V_DIM": v.shape[3],
            "BD": _power(q.shape[3]),
            "BV": _power(v.shape[3]),
            "M": tiles.queries,
            "KEYS": keys,
            "WHOLE": longest <= keys,
            "PRECISION": _precision(),
            "num_warps": tiles.warps,
        }
        self.sizes = self.queries, self.by_block.shape[1], scale * LOG2E

    def of_queries(self, x: Tensor) -> Tensor:
        """`[b, T, H, ...]` to `[N, H, ...]`, contiguous."""
        return self.blocks.of(x.flatten(0, 1), self.blocks.query_row).contiguous()

    def of_keys(self, x: Tensor) -> Tensor:
        return self.blocks.keys(x).contiguous()

    @property
    def query_grid(self) -> tuple[int, int]:
        return triton.cdiv(self.queries, self.options["M"]), self.heads


@torch.library.custom_op("zoo::landmark_attention_triton_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out and Z `[b, T, H]`, which of a query that sees nothing is inf."""
    launch = _Launch(q, k, v, is_landmark, scale, cu_seqlens, key_mask)
    queries, keys, values = launch.of_queries(q), launch.of_keys(k), launch.of_keys(v)
    out = queries.new_empty(*queries.shape[:2], v.shape[3])
    lse = queries.new_empty(queries.shape[:2], dtype=torch.float32)
    if launch.queries:
        _forward_kernel[launch.query_grid](
            queries, keys, values, out, lse, launch.by_query, launch.by_block, *launch.sizes, **launch.options
        )
    return _padded(launch, out, q), _padded(launch, lse, q)


def _padded(launch: _Launch, x: Tensor, q: Tensor) -> Tensor:
    """`[N, H, ...]` to `[b, T, H, ...]`."""
    rows = launch.blocks.query_row
    if rows is not None:
        x = x.new_zeros(q.shape[0] * q.shape[1], *x.shape[1:]).index_copy_(0, rows, x)
    return x.unflatten(0, q.shape[:2])


@torch.library.custom_op("zoo::landmark_attention_triton_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    launch = _Launch(q, k, v, is_landmark, scale, cu_seqlens, key_mask)
    queries, keys, values = launch.of_queries(q), launch.of_keys(k), launch.of_keys(v)
    grads, sums = launch.of_queries(grad_out.to(q.dtype)), launch.of_queries(lse)
    totals = (launch.of_queries(out).float() * grads.float()).sum(-1)
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    arguments = queries, keys, values, grads, sums, totals
    if launch.queries:
        _query_kernel[launch.query_grid](
            *arguments, grad_q, launch.by_query, launch.by_block, *launch.sizes, scale, **launch.options
        )
    if launch.by_tile.shape[1]:
        _key_kernel[(launch.by_tile.shape[1], launch.kv_heads)](
            *arguments, grad_k, grad_v, launch.by_query, launch.by_block, launch.by_tile, *launch.sizes, scale,
            **launch.options,
        )  # fmt: skip
    return _padded(launch, grad_q, q), launch.blocks.of_keys(grad_k, k), launch.blocks.of_keys(grad_v, v)


@triton.jit
def _load(x, row, inside, head, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A tile [row, dim] of a head of x [rows, HEADS, DIM]."""
    dim = tl.arange(0, BLOCK)
    offset = (row.to(tl.int64) * HEADS + head) * DIM
    return tl.load(x + offset[:, None] + dim[None, :], mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _load_one(x, row, inside, head, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One row of a head, float32."""
    dim = tl.arange(0, BLOCK)
    offset = (row.to(tl.int64) * HEADS + head) * DIM
    return tl.load(x + offset + dim, mask=inside & (dim < DIM), other=0.0).to(tl.float32)


@triton.jit
def _store_transposed(x, row, inside, head, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, tile):
    """A tile [dim, row] into a head of x [rows, HEADS, DIM]."""
    dim = tl.arange(0, BLOCK)
    offset = (row.to(tl.int64) * HEADS + head) * DIM
    mask = inside[None, :] & (dim < DIM)[:, None]
    tl.store(x + offset[None, :] + dim[:, None], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _finite(x):
    """A largest logit to subtract: 0 where all are -inf."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _queries(by_query, row, num_queries):
    """`(first block, own block, own key)`; of rows beyond the last, such that they see nothing."""
    inside = row < num_queries
    first = tl.load(by_query + row, mask=inside, other=2147483647)
    own = tl.load(by_query + num_queries + row, mask=inside, other=-1)
    place = tl.load(by_query + 2 * num_queries + row, mask=inside, other=-1)
    return first, own, place


@triton.jit
def _landmarks(keys, by_block, block, last, num_blocks, head, K: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr):
    """`(keys [GROUP, dim], whether they stand for anything)` of the landmarks of some blocks, up to `last`."""
    inside = block <= last
    start = tl.load(by_block + block, mask=inside, other=0)
    count = tl.load(by_block + num_blocks + block, mask=inside, other=0)
    stands = tl.load(by_block + 2 * num_blocks + block, mask=inside, other=0) > 0
    return _load(keys, start + count, stands, head, K, DIM, BD), stands


@triton.jit
def _logits(
    q,
    keys,
    start,
    first,
    count,
    place,
    head,
    factor,
    K: tl.constexpr,
    DIM: tl.constexpr,
    BD: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`(keys [key, dim], logits [key, query])` of a block's keys from its first-th on."""
    index = first + tl.arange(0, KEYS)
    k = _load(keys, start + index, index < count, head, K, DIM, BD)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
    seen = (index < count)[:, None] & ((start + index)[:, None] <= place[None, :])
    return k, tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=["num_queries", "num_blocks"])
def _forward_kernel(
    queries,  # [N, H, DIM]
    keys,  # [S, K, DIM]
    values,  # [S, K, V_DIM]
    out,  # [N, H, V_DIM]
    lse,  # [N, H]
    by_query,
    by_block,
    num_queries,
    num_blocks,
    factor,
    H: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    M: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last tiles, which see the most, begin first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * M + tl.arange(0, M)
    head = tl.program_id(1)
    kv_head = head // (H // K)
    first, own, place = _queries(by_query, row, num_queries)
    q = _load(queries, row, row < num_queries, head, H, DIM, BD)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([BV, M], tl.float32)
    last = tl.max(own, 0)
    for group in range(tl.min(first, 0), last + 1, GROUP):
        block_of = group + tl.arange(0, GROUP)
        landmark, stands = _landmarks(keys, by_block, block_of, last, num_blocks, kv_head, K, DIM, BD)
        scores = tl.dot(landmark, tl.trans(q), input_precision=PRECISION) * factor
        seen = stands[:, None] & (block_of[:, None] >= first[None, :]) & (block_of[:, None] < own[None, :])
        scores = tl.where(seen, scores, float("-inf"))
        for block in range(group, tl.minimum(group + GROUP, last + 1)):
            start = tl.load(by_block + block)
            count = tl.load(by_block + num_blocks + block)
            m = tl.full([M], float("-inf"), tl.float32)
            sums = tl.zeros([M], tl.float32)
            read = tl.zeros([BV, M], tl.float32)
            for i in range(0, KEYS if WHOLE else count, KEYS):
                _k, s = _logits(q, keys, start, i, count, place, kv_head, factor, K, DIM, BD, KEYS, PRECISION)
                new = tl.maximum(m, tl.max(s, 0))
                p = tl.exp2(s - _finite(new)[None, :])
                shrink = tl.exp2(m - _finite(new))
                sums = sums * shrink + tl.sum(p, 0)
                index = i + tl.arange(0, KEYS)
                v = _load(values, start + index, index < count, kv_head, K, V_DIM, BV)
                read = tl.dot(tl.trans(v), p.to(v.dtype), read * shrink[None, :], input_precision=PRECISION)
                m = new
            z = tl.max(tl.where(block_of[:, None] == block, scores, float("-inf")), 0)
            z = tl.where(own == block, m + tl.log2(tl.where(sums > 0, sums, 1.0)), z)
            new = tl.maximum(largest, z)
            shrink = tl.exp2(largest - _finite(new))
            share = tl.exp2(z - _finite(new))
            total = total * shrink + share
            acc = acc * shrink[None, :] + read * (share / tl.where(sums > 0, sums, 1.0))[None, :]
            largest = new
    sees = total > 0
    acc = acc / tl.where(sees, total, 1.0)[None, :]
    _store_transposed(out, row, row < num_queries, head, H, V_DIM, BV, acc)
    z = tl.where(sees, largest + tl.log2(tl.where(sees, total, 1.0)), float("inf"))
    tl.store(lse + row.to(tl.int64) * H + head, z, mask=row < num_queries)


@triton.jit(do_not_specialize=["num_queries", "num_blocks"])
def _query_kernel(
    queries,  # [N, H, DIM]
    keys,  # [S, K, DIM]
    values,  # [S, K, V_DIM]
    grads,  # [N, H, V_DIM], of out
    lse,  # [N, H]
    totals,  # [N, H], D
    grad_q,  # [N, H, DIM]
    by_query,
    by_block,
    num_queries,
    num_blocks,
    factor,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    M: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * M + tl.arange(0, M)
    head = tl.program_id(1)
    kv_head = head // (H // K)
    inside = row < num_queries
    first, own, place = _queries(by_query, row, num_queries)
    q = _load(queries, row, inside, head, H, DIM, BD)
    grad = _load(grads, row, inside, head, H, V_DIM, BV)
    z_sum = tl.load(lse + row.to(tl.int64) * H + head, mask=inside, other=float("inf"))
    total = tl.load(totals + row.to(tl.int64) * H + head, mask=inside, other=0.0)
    acc = tl.zeros([BD, M], tl.float32)
    last = tl.max(own, 0)
    for group in range(tl.min(first, 0), last + 1, GROUP):
        block_of = group + tl.arange(0, GROUP)
        landmark, stands = _landmarks(keys, by_block, block_of, last, num_blocks, kv_head, K, DIM, BD)
        scores = tl.dot(landmark, tl.trans(q), input_precision=PRECISION) * factor
        seen = stands[:, None] & (block_of[:, None] >= first[None, :]) & (block_of[:, None] < own[None, :])
        pi = tl.where(seen, tl.exp2(tl.where(seen, scores, 0.0) - z_sum[None, :]), 0.0)
        for block in range(group, tl.minimum(group + GROUP, last + 1)):
            start = tl.load(by_block + block)
            count = tl.load(by_block + num_blocks + block)
            is_own = own == block
            index = tl.arange(0, KEYS)
            if WHOLE:
                k, s = _logits(q, keys, start, 0, count, place, kv_head, factor, K, DIM, BD, KEYS, PRECISION)
                v = _load(values, start + index, index < count, kv_head, K, V_DIM, BV)
                grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                m = _finite(tl.max(s, 0))
                p = tl.exp2(s - m[None, :])
                sums = tl.sum(p, 0)
                sums = tl.where(sums > 0, sums, 1.0)
                products = tl.sum(p * grad_p, 0) / sums
            else:
                m, sums, products = _within(
                    q, grad, keys, values, start, count, place, kv_head, factor, K, DIM, V_DIM, BD, BV, M, KEYS,
                    PRECISION,
                )  # fmt: skip
            share = tl.sum(tl.where(block_of[:, None] == block, pi, 0.0), 0)
            centre = tl.where(is_own, total, products)
            stands_here = tl.load(by_block + 2 * num_blocks + block) > 0
            one = _load_one(keys, start + count, stands_here, kv_head, K, DIM, BD)
            acc += one[:, None] * tl.where(is_own, 0.0, share * (centre - total))[None, :]
            base = tl.where(is_own, z_sum, m + tl.log2(sums))
            share = tl.where(is_own, 1.0, share)
            if WHOLE:
                grad_s = tl.exp2(s - base[None, :]) * share[None, :] * (grad_p - centre[None, :])
                acc = tl.dot(tl.trans(k), grad_s.to(k.dtype), acc, input_precision=PRECISION)
            else:
                for i in range(0, count, KEYS):
                    k, s = _logits(q, keys, start, i, count, place, kv_head, factor, K, DIM, BD, KEYS, PRECISION)
                    v = _load(values, start + i + index, i + index < count, kv_head, K, V_DIM, BV)
                    grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                    grad_s = tl.exp2(s - base[None, :]) * share[None, :] * (grad_p - centre[None, :])
                    acc = tl.dot(tl.trans(k), grad_s.to(k.dtype), acc, input_precision=PRECISION)
    _store_transposed(grad_q, row, inside, head, H, DIM, BD, acc * scale)


@triton.jit
def _within(
    q,
    grad,
    keys,
    values,
    start,
    count,
    place,
    head,
    factor,
    K: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    M: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`(largest, sums, c)` `[query]` of one block: its log-sum-exp is largest + log2(sums)."""
    m = tl.full([M], float("-inf"), tl.float32)
    sums = tl.zeros([M], tl.float32)
    products = tl.zeros([M], tl.float32)
    for i in range(0, count, KEYS):
        _k, s = _logits(q, keys, start, i, count, place, head, factor, K, DIM, BD, KEYS, PRECISION)
        index = i + tl.arange(0, KEYS)
        v = _load(values, start + index, index < count, head, K, V_DIM, BV)
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - _finite(new)[None, :])
        shrink = tl.exp2(m - _finite(new))
        sums = sums * shrink + tl.sum(p, 0)
        products = products * shrink + tl.sum(p * grad_p, 0)
        m = new
    sums = tl.where(sums > 0, sums, 1.0)
    return _finite(m), sums, products / sums


@triton.jit(do_not_specialize=["num_queries", "num_blocks"])
def _key_kernel(
    queries,  # [N, H, DIM]
    keys,  # [S, K, DIM]
    values,  # [S, K, V_DIM]
    grads,  # [N, H, V_DIM], of out
    lse,  # [N, H]
    totals,  # [N, H], D
    grad_k,  # [S, K, DIM], zeros
    grad_v,  # [S, K, V_DIM], zeros
    by_query,
    by_block,
    by_tile,
    num_queries,
    num_blocks,
    factor,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    M: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    block = tl.load(by_tile + tile)
    before = tl.load(by_tile + tl.num_programs(0) + tile)
    start = tl.load(by_block + block)
    count = tl.load(by_block + num_blocks + block)
    stands = tl.load(by_block + 2 * num_blocks + block) > 0
    query = tl.load(by_block + 3 * num_blocks + block)
    stop = tl.load(by_block + 4 * num_blocks + block)
    index = before + tl.arange(0, KEYS)
    inside_keys = index < count
    k = _load(keys, start + index, inside_keys, kv_head, K, DIM, BD)
    v = _load(values, start + index, inside_keys, kv_head, K, V_DIM, BV)
    # The landmark is the first of a group, the others nothing.
    is_first = tl.arange(0, GROUP) == 0
    landmark = _load(keys, start + count + tl.zeros([GROUP], tl.int32), is_first & stands, kv_head, K, DIM, BD)
    acc_k = tl.zeros([BD, KEYS], tl.float32)
    acc_v = tl.zeros([BV, KEYS], tl.float32)
    acc_landmark = tl.zeros([GROUP, BD], tl.float32)
    for n in range(0, (H // K) * tl.cdiv(stop - query, M)):
        head = kv_head * (H // K) + n % (H // K)
        row = query + (n // (H // K)) * M + tl.arange(0, M)
        inside = row < stop
        _first, own, place = _queries(by_query, row, num_queries)
        q = _load(queries, row, inside, head, H, DIM, BD)
        grad = _load(grads, row, inside, head, H, V_DIM, BV)
        z_sum = tl.load(lse + row.to(tl.int64) * H + head, mask=inside, other=float("inf"))
        total = tl.load(totals + row.to(tl.int64) * H + head, mask=inside, other=0.0)
        is_own = own == block
        scores = tl.dot(landmark, tl.trans(q), input_precision=PRECISION) * factor
        z = tl.sum(tl.where(is_first[:, None], scores, 0.0), 0)
        pi = tl.where(stands & (is_own == 0), tl.exp2(z - z_sum), 0.0)
        if not WHOLE:
            m, sums, products = _within(
                q, grad, keys, values, start, count, place, kv_head, factor, K, DIM, V_DIM, BD, BV, M, KEYS, PRECISION
            )
        seen = inside[:, None] & inside_keys[None, :] & ((start + index)[None, :] <= place[:, None])
        s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor, float("-inf"))
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if WHOLE:
            m = _finite(tl.max(s, 1))
            p = tl.exp2(s - m[:, None])
            sums = tl.sum(p, 1)
            sums = tl.where(sums > 0, sums, 1.0)
            products = tl.sum(p * grad_p, 1) / sums
        centre = tl.where(is_own, total, products)
        base = tl.where(is_own, z_sum, m + tl.log2(sums))
        p = tl.exp2(s - base[:, None]) * tl.where(is_own, 1.0, pi)[:, None]
        grad_s = p * (grad_p - centre[:, None])
        acc_v = tl.dot(tl.trans(grad), p.to(grad.dtype), acc_v, input_precision=PRECISION)
        acc_k = tl.dot(tl.trans(q), grad_s.to(q.dtype), acc_k, input_precision=PRECISION)
        of_landmark = tl.where(is_first[:, None], (pi * (centre - total))[None, :], 0.0)
        acc_landmark = tl.dot(of_landmark.to(q.dtype), q, acc_landmark, input_precision=PRECISION)
    _store_transposed(grad_k, start + index, inside_keys, kv_head, K, DIM, BD, acc_k * scale)
    _store_transposed(grad_v, start + index, inside_keys, kv_head, K, V_DIM, BV, acc_v)
    place = start + count + tl.zeros([GROUP], tl.int32)
    is_there = is_first & stands & (before == 0)
    _store_transposed(grad_k, place, is_there, kv_head, K, DIM, BD, tl.trans(acc_landmark * scale))


class Lists:
    """As _InTorch of chosen.py."""

    @staticmethod
    def fit(size: _Size, keys: Tensor, values: Tensor) -> bool:
        return size.width <= _tiles(keys.dtype, (keys.shape[2], values.shape[2]), size.width).keys

    @staticmethod
    def read(
        size: _Size,
        heads: slice,
        q_rows: Tensor,
        keys: Tensor,
        values: Tensor,
        sums: Tensor,
        read: Tensor,
        scale: float,
    ) -> None:
        given, options = _list_arguments(size, heads, keys, values, scale)
        per_list = triton.cdiv(size.length, options["M"])
        _list_kernel[(len(size.list) * per_list,)](
            _unscaled(q_rows, keys, scale),
            keys.contiguous(),
            values.contiguous(),
            sums,
            read,
            size.list,
            *given,
            **options,
        )

    @staticmethod
    def differentiate(
        size: _Size,
        heads: slice,
        q_rows: Tensor,
        g_rows: Tensor,
        keys: Tensor,
        values: Tensor,
        shares: Tensor,
        sums: Tensor,
        total: Tensor,
        read: Tensor,
        by_group: list[Tensor],
        scale: float,
    ) -> None:
        given, options = _list_arguments(size, heads, keys, values, scale)
        queries, grads = _unscaled(q_rows, keys, scale), g_rows.to(keys.dtype)
        rows = queries, grads, keys.contiguous(), values.contiguous(), shares, sums, total
        _group_kernel[(len(size.group),)](*rows, read, *by_group, size.lists_of_group, *given, **options)


def _unscaled(q_rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """q as it came, which a product of two tiles takes from memory."""
    return (q_rows / scale if scale else q_rows).to(keys.dtype)


def _list_arguments(
    size: _Size, heads: slice, keys: Tensor, values: Tensor, scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dims = keys.shape[2], values.shape[2]
    tiles = _tiles(keys.dtype, dims, size.width)
    blocks = size.lists.blocks
    by_group = torch.stack([size.start, size.count, heads.start + size.kv_head, blocks.landmark[size.block]])
    given = size.filled, by_group, blocks.place, size.lists.entries, len(size.group), size.width, size.length, scale
    return given, {
        "K": keys.shape[1],
        "SLOTS": size.lists.slots,
        "ROWS": size.lists.kv_heads * size.lists.shared,
        "OWN": size.own,
        "DIM": dims[0],
        "V_DIM": dims[1],
        "BD": _power(dims[0]),
        "BV": _power(dims[1]),
        "M": tiles.queries,
        "KEYS": tiles.keys,
        "PRECISION": _precision(),
        "num_warps": tiles.warps,
    }


@triton.jit(do_not_specialize=["entries", "num_groups", "width", "length"])
def _list_kernel(
    q_rows,  # [rows, DIM]
    keys,  # [S, K, DIM]
    values,  # [S, K, V_DIM]
    sums,  # [entries + 1]
    read,  # [entries + 1, V_DIM]
    group_of,  # [lists]
    filled,  # [lists, length]
    by_group,  # [4, groups]: first key, keys, kv head, landmark
    place_of,  # [N]
    entries,
    num_groups,
    width,
    length,
    scale,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    OWN: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    M: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    per_list = tl.cdiv(length, M)
    each = (tl.program_id(0) // per_list).to(tl.int64)
    place = (tl.program_id(0) % per_list) * M + tl.arange(0, M)
    entry = tl.load(filled + each * length + place, mask=place < length, other=entries)
    inside = entry < entries
    row = entry // SLOTS
    group = tl.load(group_of + each)
    start = tl.load(by_group + group)
    count = tl.load(by_group + num_groups + group)
    head = tl.load(by_group + 2 * num_groups + group)
    index = tl.arange(0, KEYS)
    k = _load(keys, start + index, index < count, head, K, DIM, BD)
    v = _load(values, start + index, index < count, head, K, V_DIM, BV)
    q = _load(q_rows, row, inside, 0, 1, DIM, BD)
    seen = (index < count)[:, None] & inside[None, :]
    if OWN:
        seen &= (start + index)[:, None] <= tl.load(place_of + row // ROWS, mask=inside, other=-1)[None, :]
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)
    s = tl.where(seen, s, float("-inf"))
    m = _finite(tl.max(s, 0))
    p = tl.exp2(s - m[None, :])
    total = tl.sum(p, 0)
    total = tl.where(total > 0, total, 1.0)
    out = tl.dot(tl.trans(v), p.to(v.dtype), input_precision=PRECISION) / total[None, :]
    _store_transposed(read, entry, inside, 0, 1, V_DIM, BV, out)
    tl.store(sums + entry, (m + tl.log2(total)) / 1.4426950408889634, mask=inside)


@triton.jit(do_not_specialize=["entries", "num_groups", "width", "length"])
def _group_kernel(
    q_rows,  # [rows, DIM]
    g_rows,  # [rows, V_DIM], gradients of out
    keys,  # [S, K, DIM]
    values,  # [S, K, V_DIM]
    shares,  # [entries + 1], pi
    sums,  # [entries + 1], L
    totals,  # [rows], D
    read,  # [entries + 1, DIM], of dq
    grad_k,  # [groups, width, DIM]
    grad_v,  # [groups, width, V_DIM]
    grad_landmark,  # [groups, DIM]
    lists_of_group,  # [2, groups]: the first list, and how many
    filled,  # [lists, length]
    by_group,  # [4, groups]: first key, keys, kv head, landmark
    place_of,  # [N]
    entries,
    num_groups,
    width,
    length,
    scale,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    OWN: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    M: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(by_group + group)
    count = tl.load(by_group + num_groups + group)
    head = tl.load(by_group + 2 * num_groups + group)
    index = tl.arange(0, KEYS)
    inside_keys = index < count
    k = _load(keys, start + index, inside_keys, head, K, DIM, BD)
    v = _load(values, start + index, inside_keys, head, K, V_DIM, BV)
    dim = tl.arange(0, BD)
    acc_k = tl.zeros([BD, KEYS], tl.float32)
    acc_v = tl.zeros([BV, KEYS], tl.float32)
    is_first = tl.arange(0, GROUP) == 0
    acc_landmark = tl.zeros([GROUP, BD], tl.float32)
    if not OWN:
        where = tl.load(by_group + 3 * num_groups + group)
        landmark = tl.load(keys + (where * K + head) * DIM + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    first = tl.load(lists_of_group + group) * length
    size = tl.load(lists_of_group + num_groups + group) * length
    for i in range(0, size, M):
        step = i + tl.arange(0, M)
        entry = tl.load(filled + first + step, mask=step < size, other=entries)
        inside = entry < entries
        row = entry // SLOTS
        q = _load(q_rows, row, inside, 0, 1, DIM, BD)
        grad = _load(g_rows, row, inside, 0, 1, V_DIM, BV)
        share = tl.load(shares + entry, mask=inside, other=0.0)
        base = tl.load(sums + entry, mask=inside, other=0.0) * 1.4426950408889634
        total = tl.load(totals + row, mask=inside, other=0.0)
        seen = inside_keys[None, :] & inside[:, None]
        if OWN:
            seen &= (start + index)[None, :] <= tl.load(place_of + row // ROWS, mask=inside, other=-1)[:, None]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        a = tl.where(seen, tl.exp2(tl.where(seen, s - base[:, None], 0.0)), 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        centre = total if OWN else tl.sum(a * grad_p, 1)
        p = a * share[:, None]
        acc_v = tl.dot(tl.trans(grad), p.to(k.dtype), acc_v, input_precision=PRECISION)
        grad_s = (p * (grad_p - centre[:, None])).to(k.dtype)
        acc_k = tl.dot(tl.trans(q), grad_s, acc_k, input_precision=PRECISION)
        # The same the other way round: transposed in registers it would become a left-hand operand.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)
        seen_by = tl.trans(seen)
        a = tl.where(seen_by, tl.exp2(tl.where(seen_by, s - base[None, :], 0.0)), 0.0)
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_s = (a * share[None, :] * (grad_p - centre[None, :])).to(k.dtype)
        grad_q = tl.dot(tl.trans(k), grad_s, input_precision=PRECISION)
        if not OWN:
            of_landmark = share * (centre - total)
            grad_q += landmark[:, None] * of_landmark[None, :]
            of_landmark = tl.where(is_first[:, None], of_landmark[None, :], 0.0)
            acc_landmark = tl.dot(of_landmark.to(q.dtype), q, acc_landmark, input_precision=PRECISION)
        _store_transposed(read, entry, inside, 0, 1, DIM, BD, grad_q)
    inside_group = index < width
    _store_transposed(grad_k, group * width + index, inside_group, 0, 1, DIM, BD, acc_k * scale)
    _store_transposed(grad_v, group * width + index, inside_group, 0, 1, V_DIM, BV, acc_v)
    if not OWN:
        _store_transposed(
            grad_landmark, group + tl.zeros([GROUP], tl.int64), is_first, 0, 1, DIM, BD, tl.trans(acc_landmark * scale)
        )


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, is_landmark, ctx.scale, cu_seqlens, key_mask = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, is_landmark, *output, cu_seqlens, key_mask)


def _differentiate(ctx: Any, grad_out: Tensor, _: None) -> tuple[Any, ...]:
    *tensors, cu_seqlens, key_mask = ctx.saved_tensors
    return *_backward(grad_out, *tensors, ctx.scale, cu_seqlens, key_mask), None, None, None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
