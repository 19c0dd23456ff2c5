"""Landmark attention, one query at a time over the keys it may see. Everything else is compared with this."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.landmark_attention.choice import STEPS


@implements("landmark_attention", "reference")
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
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, length, heads, _ = q.shape
    key_length, kv_heads = k.shape[1:3]
    bounds = [0, key_length] if cu_seqlens is None else cu_seqlens.tolist()
    document = [i for i in range(len(bounds) - 1) for _ in range(bounds[i], bounds[i + 1])]
    is_real = torch.ones_like(is_landmark) if key_mask is None else key_mask
    grouped = q.to(dtype).unflatten(2, (kv_heads, heads // kv_heads))
    k, v = k.to(dtype), v.to(dtype)
    outs = []
    for row, (real, landmark) in enumerate(zip(is_real.tolist(), is_landmark.tolist(), strict=True)):
        for query in range(length):
            own = key_length - length + query
            if not real[own]:
                outs.append(v.new_zeros(kv_heads, heads // kv_heads, v.shape[3]))
                continue
            blocks: list[tuple[list[int], int]] = []  # earlier ones: their ordinary keys and their landmark
            block: list[int] = []
            for key in range(bounds[document[own]], own + 1):
                if real[key] and not landmark[key]:
                    block.append(key)
                elif real[key] and key < own:
                    blocks += [(block, key)] if block else []
                    block = []
            scores = scale * grouped[row, query] @ k[row, [landmark for _, landmark in blocks]].permute(1, 2, 0)
            if top_k is None or top_k >= len(blocks):
                outs.append(_read(scale * grouped[row, query], k[row], v[row], scores, [b for b, _ in blocks], block))
                continue
            for kv_head, each in enumerate(scores):
                one = slice(kv_head, kv_head + 1)
                for place, logits in enumerate(each):
                    steps = [(round(x * STEPS), i) for i, x in enumerate(logits.tolist())]
                    best = [i for _, i in sorted(steps, reverse=True)[:top_k]]
                    q_head = scale * grouped[row, query, one, place : place + 1]
                    chosen = [blocks[i][0] for i in best]
                    outs.append(
                        _read(q_head, k[row, :, one], v[row, :, one], logits[None, None, best], chosen, block)[0]
                    )
    out = torch.cat([x.flatten(0, -2) for x in outs])
    return out.view(batch, length, heads, v.shape[3]).to(q.dtype)


def _read(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, blocks: list[list[int]], block: list[int]) -> Tensor:
    """What a query (scaled) `[kv_heads, shared, D]` reads in earlier blocks, by their landmarks, and in its own."""
    keys = [key for each in blocks for key in each] + block
    logits = q @ k[keys].permute(1, 2, 0)
    *inside, present = logits.split([*(len(each) for each in blocks), len(block)], -1)
    p, p_present = torch.cat([scores, present], -1).softmax(-1).split([len(blocks), len(block)], -1)
    shared = [p[..., i, None] * each.softmax(-1) for i, each in enumerate(inside)]
    return torch.cat([*shared, p_present], -1) @ v[keys].transpose(0, 1)
