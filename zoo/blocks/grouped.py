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


@torch.library.custom_op("zoo::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x` `[rows, K]` times `weight` `[groups, K, N]`, the rows before `ends[0]` with the first group's matrix, and so
    on; `ends` is int32 `[groups]`. Returns `[rows, N]`."""
    if not _fits(x.dtype, x.shape[1], weight.shape[2]):
        return torch.cat([rows @ group for rows, group in zip(_split(x, ends), weight, strict=True)])
    return F.grouped_mm(x, weight, offs=ends).contiguous()


@torch.library.custom_op("zoo::grouped_mm_weight_gradient", mutates_args=())
def _weight_gradient(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """`[groups, K, N]` from `x` `[rows, K]` and `grad` `[rows, N]`."""
    if not _fits(x.dtype, x.shape[1], grad.shape[1]):
        return torch.stack([a.T @ b for a, b in zip(_split(x, ends), _split(grad, ends), strict=True)])
    return F.grouped_mm(x.T, grad, offs=ends).contiguous()


def _fits(dtype: torch.dtype, *widths: int) -> bool:
    """Whether F.grouped_mm takes matrices of this dtype with rows of these widths."""
    return dtype != torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in widths)


def _split(x: Tensor, ends: Tensor) -> list[Tensor]:
    return list(x.tensor_split(ends[:-1].long().cpu()))


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@_weight_gradient.register_fake
def _(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, weight.transpose(1, 2), ends), _weight_gradient(x, grad, ends), None


grouped_mm.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula([torch.ops.zoo.grouped_mm, torch.ops.zoo.grouped_mm_weight_gradient])
def _flops(a_shape: tuple[int, ...], b_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Both multiply every row's K by N: `[rows, K]` with `[groups, K, N]`, and with `[rows, N]`."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]
