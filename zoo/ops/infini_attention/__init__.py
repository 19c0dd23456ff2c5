"""Infini-attention: causal attention within segments, and a memory of constant size of all segments before."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.infini_attention import chunked as chunked
from zoo.ops.infini_attention import reference as reference
from zoo.ops.varlen import check_cu_seqlens

dispatch.lazily("infini_attention", "triton", "zoo.ops.infini_attention.kernels", requires="triton")


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    q_mem: Tensor | None = None,
    k_mem: Tensor | None = None,
    update: Literal["linear", "delta"] = "linear",
    initial_memory: tuple[Tensor, Tensor] | None = None,
    return_memory: bool = False,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Any:
    """Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143, section 2.1), with sigma(x) = ELU(x) + 1.

        A_dot = softmax(Q K^T / sqrt(K))  V      causal, within the segment
        A_mem = sigma(Q) M / (sigma(Q) z)        the memory of the segments before
        out = sigmoid(gate) A_mem + (1 - sigmoid(gate)) A_dot

    and after each complete segment, all of whose tokens meet the same memory,

        M += sigma(K)^T V                                    update "linear"
        M += sigma(K)^T (V - sigma(K) M / (sigma(K) z))      update "delta"
        z += sum of sigma(K)

    A memory is empty where z is 0. Nothing is read from it: the output is A_dot alone, without the gate.

    What is computed of the memory is float32, or float64 where q, k or v is. Gradients reach every tensor argument,
    also through the returned memory.

    Args:
        q: `[batch, length, heads, key_dim]`, turned to its positions where there are any.
        k: `[batch, key_length, kv_heads, key_dim]`; kv_heads divides heads, and consecutive query heads share one. Its
            first token begins a segment. With fewer queries than keys the last ones align: keys before the first
            query's, less than a segment of them, are those of a segment that earlier calls began.
        v: `[batch, key_length, kv_heads, value_dim]`.
        gate: `[heads]`, before the sigmoid.
        segment: tokens in a segment, counted from the start of each row or document.
        q_mem: what reads the memory, shaped like q: queries without rotation. None is q.
        k_mem: what writes it, shaped like k: keys without rotation. None is k.
        update: how a segment is written, "linear" or "delta".
        initial_memory: `(M, z)` of the segments before, `[batch, heads, key_dim, value_dim]` and
            `[batch, heads, key_dim]` (`[n, ...]` with `cu_seqlens`). As queries that share keys would write the same,
            it may have kv_heads in place of heads; they then share it. None is empty.
        return_memory: also return the memory over the complete segments, with as many heads as `initial_memory` (None
            counts as `heads`).
        cu_seqlens: int32 `[n+1]`, the boundaries of n documents packed into one row (batch 1, key_length == length);
            each has a memory of its own. A document may be empty: its memory passes through.
        key_mask: bool `[batch, key_length]`, True where a key is real, for padded batches. Segments are then counted
            among the row's real keys. A query whose own key is masked gives 0.

    Returns:
        out `[batch, length, heads, value_dim]` in q's dtype, or `(out, (M, z))` with the memory in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: a shape or a number does not fit, or the arguments exclude each other.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be [batch, length, heads, head_dim], got {shapes}")
    batch, length, heads, key_dim = q.shape
    key_length, kv_heads = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != key_dim:
        raise ValueError(f"k must have q's batch {batch} and head_dim {key_dim}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's [batch, key_length, kv_heads] {list(k.shape[:3])}, got {list(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's kv_heads, got {kv_heads}")
    if segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}")
    if update not in ("linear", "delta"):
        raise ValueError(f"update must be linear or delta, got {update!r}")
    if not 1 <= length <= key_length:
        raise ValueError(f"q must have 1 to {key_length} tokens, as many as k at most, got {list(q.shape)}")
    if key_mask is None and key_length - length >= segment:
        raise ValueError(
            f"k may have less than a segment ({segment}) of tokens before q's first, got {key_length - length}"
        )
    if gate.shape != (heads,):
        raise ValueError(f"gate must be {[heads]}, got {list(gate.shape)}")
    for name, given, like in (("q_mem", q_mem, q), ("k_mem", k_mem, k)):
        if given is not None and given.shape != like.shape:
            raise ValueError(f"{name} must be shaped like {name[0]}, {list(like.shape)}, got {list(given.shape)}")
    documents = batch
    if cu_seqlens is not None:
        if key_mask is not None:
            raise ValueError(
                "cu_seqlens and key_mask exclude each other: packed rows have no padding, give one of them"
            )
        if length != key_length:
            raise ValueError(f"cu_seqlens needs as many queries as keys, got {length} and {key_length}")
        check_cu_seqlens(cu_seqlens, batch, length)
        documents = cu_seqlens.numel() - 1
    if key_mask is not None and (key_mask.shape != (batch, key_length) or key_mask.dtype != torch.bool):
        got = f"{key_mask.dtype} {list(key_mask.shape)}"
        raise ValueError(f"key_mask must be bool [batch, key_length] = {[batch, key_length]}, got {got}")
    value_dim = v.shape[3]
    if initial_memory is not None:
        given_shapes = [list(x.shape) for x in initial_memory]
        wanted = [[[documents, n, key_dim, value_dim], [documents, n, key_dim]] for n in (heads, kv_heads)]
        if given_shapes not in wanted:
            either = "" if heads == kv_heads else f" or {wanted[1][0]} and {wanted[1][1]}"
            raise ValueError(f"initial_memory must be {wanted[0][0]} and {wanted[0][1]}{either}, got {given_shapes}")

    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    if initial_memory is None:
        memory = v.new_zeros(documents, kv_heads, key_dim, value_dim, dtype=wide)
        normaliser = v.new_zeros(documents, kv_heads, key_dim, dtype=wide)
    else:
        memory, normaliser = (x.to(wide) for x in initial_memory)
    out, memory, normaliser = dispatch.run(
        "infini_attention",
        v.device,
        q,
        k,
        v,
        gate.to(wide),
        q if q_mem is None else q_mem,
        k if k_mem is None else k_mem,
        memory,
        normaliser,
        segment=segment,
        delta=update == "delta",
        cu_seqlens=cu_seqlens,
        key_mask=key_mask,
        new=initial_memory is None,
        write_last=return_memory,
    )
    if not return_memory:
        return out
    if initial_memory is None and heads != kv_heads:
        memory, normaliser = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (memory, normaliser))
    return out, (memory, normaliser)
