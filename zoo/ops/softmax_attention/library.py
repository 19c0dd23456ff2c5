"""softmax_attention by torch's FlexAttention (Dong et al., arXiv:2412.05496), which compiles a kernel for each mask.

The mask is the Pattern's own, over ranks and documents; the blocks that it leaves empty are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from zoo.ops.dispatch import implements
from zoo.ops.softmax_attention.pattern import Pattern
from zoo.ops.varlen import document_ids

MIN_DIM, MAX_DIM = 16, 256
MIN_QUERIES = 128  # below, FlexAttention takes another kernel, for decoding
MAX_COMPILED = 256  # masks, dtypes and shapes, each of which is a kernel

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _refuses(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> str | None:
    if torch.compiler.is_compiling():
        return "it is compiled by itself"
    if {q.dtype, k.dtype, v.dtype} not in ({torch.float32}, {torch.bfloat16}, {torch.float16}):
        return "one dtype, float32 at most"
    if not all(MIN_DIM <= dim <= MAX_DIM for dim in (q.shape[3], v.shape[3])):
        return f"head dims from {MIN_DIM} to {MAX_DIM}"
    if q.shape[1] < MIN_QUERIES:
        return f"fewer than {MIN_QUERIES} queries"
    return None


@implements("softmax_attention", "library", refuses=_refuses)
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    num_sinks: int,
    scale: float,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    pattern: Pattern | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as the public function documents them; lse is always there."""
    pattern = Pattern(window, num_sinks) if pattern is None else pattern
    length, key_length = q.shape[1], k.shape[1]
    if cu_seqlens is None and key_mask is None:
        mask = _block_mask_of_rows(causal, pattern, length, key_length, q.device)
    else:
        visible = mask_mod(causal, pattern, length, key_length, cu_seqlens, key_mask, q.device)
        mask = _block_mask(visible, q.shape[0] if key_mask is not None else None, length, key_length, q.device)
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED, accumulated_recompile_limit=MAX_COMPILED):
        out, aux = _compiled(flex_attention)(
            *(x.transpose(1, 2) for x in (q, k, v)),
            score_mod=None if softcap is None else _score_mod(softcap),
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
            return_aux=AuxRequest(lse=True),
        )
    lse = aux.lse.transpose(1, 2)
    # A gradient of an empty row's -inf, which may be NaN, ends here.
    return out.transpose(1, 2), lse.masked_fill(lse.isneginf(), -torch.inf)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def mask_mod(
    causal: bool,
    pattern: Pattern,
    length: int,
    key_length: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    device: torch.device,
) -> MaskFunction:
    """FlexAttention's: whether query i sees key j, in row b of the batch."""
    offset = key_length - length
    plain = Pattern(pattern.window, pattern.num_sinks, pattern.dilation, pattern.stride)
    drawn: list[Tensor] = []
    if pattern.random_blocks:
        drawn = list(pattern.chosen(torch.arange(-(-key_length // pattern.block_size), device=device)))

    def sees(own: Tensor, key: Tensor) -> Tensor:
        """By their ranks."""
        if not causal:
            return key == key
        seen = plain.visible(own, key)
        for blocks in drawn:
            seen = seen | ((blocks[own // pattern.block_size] == key // pattern.block_size) & (key <= own))
        return seen

    if cu_seqlens is not None:
        document = document_ids(cu_seqlens, key_length)
        rank = torch.arange(key_length, device=device) - cu_seqlens.long()[document]
        return lambda b, h, i, j: (document[i] == document[j]) & sees(rank[i], rank[j])
    if key_mask is not None:
        place = (key_mask.long().cumsum(1) - 1).clamp_min(0)
        return lambda b, h, i, j: key_mask[b, i + offset] & key_mask[b, j] & sees(place[b, i + offset], place[b, j])
    return lambda b, h, i, j: sees(i + offset, j)


def _score_mod(softcap: float) -> Callable[..., Tensor]:
    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)


def _block_mask(
    visible: MaskFunction, rows: int | None, length: int, key_length: int, device: torch.device
) -> BlockMask:
    # Compiled, it does not store the whole mask.
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED, accumulated_recompile_limit=MAX_COMPILED):
        return make(visible, rows, None, length, key_length, device=device)


@lru_cache(maxsize=64)
def _block_mask_of_rows(
    causal: bool, pattern: Pattern, length: int, key_length: int, device: torch.device
) -> BlockMask:
    """Of rows that are all alike, and therefore alike in every layer and step."""
    with torch.inference_mode(False):  # training may find it here
        visible = mask_mod(causal, pattern, length, key_length, None, None, device)
        return _block_mask(visible, None, length, key_length, device)
