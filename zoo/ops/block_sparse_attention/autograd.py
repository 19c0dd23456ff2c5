"""What both differentiable backends of block_sparse_attention share: their operators' shapes and place in autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops.dispatch import outside_autocast

Forward = Callable[
    [Tensor, Tensor, Tensor, Tensor, int, float, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]
]
Backward = Callable[
    [
        Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float, Tensor | None, Tensor | None
    ],
    tuple[Tensor, Tensor, Tensor],
]  # fmt: skip


def register(name: str, forward: Forward, backward: Backward) -> tuple[Any, Any]:
    """Make of two functions operators that are opaque to torch.compile.

    forward   q, k, v, block_indices, block_size, scale, cu_seqlens, key_mask -> out, lse, blocks (Places.blocks)
    backward  d_out, d_lse, q, k, v, blocks, out, lse, block_size, scale, cu_seqlens, key_mask -> d_q, d_k, d_v
    """
    forward_operator = torch.library.custom_op(f"zoo::{name}_forward", forward, mutates_args=())
    backward_operator = torch.library.custom_op(f"zoo::{name}_backward", backward, mutates_args=())

    @forward_operator.register_fake
    def _(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_indices: Tensor,
        block_size: int,
        scale: float,
        cu_seqlens: Tensor | None,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        blocks = block_indices.new_empty(q.shape[0] * q.shape[1], *block_indices.shape[2:], dtype=torch.int32)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_empty(*q.shape[:3], v.shape[3]), lse, blocks

    @backward_operator.register_fake
    def _(
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
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, _, ctx.block_size, ctx.scale, cu_seqlens, key_mask = inputs
        out, lse, blocks = output
        ctx.mark_non_differentiable(blocks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, blocks, out, lse, cu_seqlens, key_mask)

    def differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, _: Any) -> tuple[Any, ...]:
        *tensors, cu_seqlens, key_mask = ctx.saved_tensors
        d_out = torch.zeros_like(tensors[4]) if d_out is None else d_out
        grads = backward_operator(d_out, d_lse, *tensors, ctx.block_size, ctx.scale, cu_seqlens, key_mask)
        return *grads, None, None, None, None, None

    forward_operator.register_autograd(outside_autocast(differentiate), setup_context=save)
    return forward_operator, backward_operator
