"""What both differentiable backends of causal_conv1d share: their operators' shapes and their place in autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops.dispatch import outside_autocast

Forward = Callable[[Tensor, Tensor, Tensor | None, str | None, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor | None, str | None, Tensor, Tensor | None],
    tuple[Tensor, Tensor, Tensor, Tensor],
]


def register(name: str, forward: Forward, backward: Backward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make of two functions one operator, opaque to torch.compile, that saves only its arguments.

    forward   x, weight, bias, activation, initial_state, cu_seqlens -> out, state
    backward  d_out, d_state, and the same -> d_x, d_weight, d_bias (also without a bias), d_initial_state
    """
    forward_operator = torch.library.custom_op(f"zoo::{name}_forward", forward, mutates_args=())
    backward_operator = torch.library.custom_op(f"zoo::{name}_backward", backward, mutates_args=())

    @forward_operator.register_fake
    def _(
        x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor, _: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), initial_state.new_empty(initial_state.shape)

    @backward_operator.register_fake
    def _(
        d_out: Tensor,
        d_state: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        initial_state: Tensor,
        _: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_x, d_weight, d_initial_state = (t.new_empty(t.shape) for t in (x, weight, initial_state))
        return d_x, d_weight, (weight if bias is None else bias).new_empty(weight.shape[0]), d_initial_state

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, ctx.activation, initial_state, cu_seqlens = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)

    def differentiate(ctx: Any, d_out: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
        d_out = torch.zeros_like(x) if d_out is None else d_out
        d_x, d_weight, d_bias, d_initial_state = backward_operator(
            d_out, d_state, x, weight, bias, ctx.activation, initial_state, cu_seqlens
        )
        return d_x, d_weight, None if bias is None else d_bias, None, d_initial_state, None

    forward_operator.register_autograd(outside_autocast(differentiate), setup_context=save)
    return forward_operator
