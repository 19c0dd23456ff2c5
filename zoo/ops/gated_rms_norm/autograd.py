"""What both differentiable backends of gated_rms_norm share: their operators' shapes and their place in autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops.dispatch import outside_autocast


def register(
    name: str,
    forward: Callable[[Tensor, Tensor, Tensor, float, int, str, bool], tuple[Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, str, bool], tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make of two functions one operator, opaque to torch.compile, that saves only its arguments and r.

    forward   x, gate, weight, eps, num_groups, activation, gate_first -> out `[B,T,C]`, r `[B,T,G]`
    backward  d_out, x, gate, weight, r, num_groups, activation, gate_first -> d_x, d_gate, d_weight
    """
    forward_op = torch.library.custom_op(f"zoo::{name}_forward", forward, mutates_args=())
    backward_op = torch.library.custom_op(f"zoo::{name}_backward", backward, mutates_args=())

    @forward_op.register_fake
    def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float, num_groups: int, *_: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return gate.new_empty(gate.shape), x.new_empty(*x.shape[:2], num_groups, dtype=dtype)

    @backward_op.register_fake
    def _(d_out: Tensor, x: Tensor, gate: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, gate, weight, _, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, gate, weight, output[1])

    def differentiate(ctx: Any, d_out: Tensor, _: None) -> tuple[Any, ...]:
        return *backward_op(d_out, *ctx.saved_tensors, *ctx.options), None, None, None, None

    forward_op.register_autograd(outside_autocast(differentiate), setup_context=save)
    return forward_op
