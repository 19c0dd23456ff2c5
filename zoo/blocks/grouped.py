"""One matrix multiplication for each group of consecutive rows: torch's F.grouped_mm, where it falls short made whole.

As of torch 2.13 F.grouped_mm has no float64, wants rows of whole 16 bytes, torch.compile accepts it in bfloat16 only,
its backward pass refuses an expanded gradient, and torch.utils.flop_counter does not see it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.matmul import is_slow_in_mkl, matmul


@torch.library.custom_op("zoo::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool = True) -> Tensor:
    """`x` `[rows, K]` times the transposes of `weight` `[groups, N, K]`, as nn.Linear keeps it: the rows before
    `ends[0]` with the first group's, and so on; `ends` is int32 `[groups]`. Returns `[rows, N]`.

    Without `transposed`, weight is `[groups, K, N]`.
    """
    if transposed:
        weight = weight.transpose(1, 2)
    if not _fits(x, *weight.shape[1:]):
        return torch.cat([matmul(rows, group) for rows, group in zip(_split(x, ends), weight, strict=True)])
    return F.grouped_mm(x, weight, offs=ends).contiguous()


@torch.library.custom_op("zoo::grouped_mm_weight_gradient", mutates_args=())
def _weight_gradient(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`[groups, N, K]` from `grad` `[rows, N]` and `x` `[rows, K]`."""
    if not _fits(x, x.shape[1], grad.shape[1]):
        return torch.stack([matmul(a.T, b) for a, b in zip(_split(grad, ends), _split(x, ends), strict=True)])
    return F.grouped_mm(grad.T, x, offs=ends).contiguous()


def _fits(x: Tensor, *widths: int) -> bool:
    """Whether F.grouped_mm takes such matrices with rows of these widths, and is not slow at them."""
    return x.dtype != torch.float64 and not is_slow_in_mkl(x) and all(width * x.itemsize % 16 == 0 for width in widths)


def _split(x: Tensor, ends: Tensor) -> list[Tensor]:
    return list(x.tensor_split(ends[:-1].long().cpu()))


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool = True) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    # The gradient has the layout of the weight: accumulating a transposed one costs more than multiplying it.
    pair = (grad, x) if ctx.transposed else (x, grad)
    return grouped_mm(grad, weight, ends, not ctx.transposed), _weight_gradient(*pair, ends), None, None


grouped_mm.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.zoo.grouped_mm)
def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.zoo.grouped_mm_weight_gradient)
def _weight_gradient_flops(grad_shape: tuple[int, ...], x_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1]
