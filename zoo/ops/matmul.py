"""Float32 matrix products on a CPU, by the faster of the two libraries that torch carries.

torch gives float32 to MKL, which on the CPUs of other makers than Intel keeps to AVX2. oneDNN, to which torch gives
bfloat16, uses AVX-512 wherever it is, and there takes half the time (docs/decisions.md has the figures). Its float32
product is what torch.compile's frozen graphs call; here it stands behind F.linear's and `@`'s own contracts.
"""

from __future__ import annotations

import math
import platform
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

# Multiplications from which oneDNN is faster; below, its call costs more than it saves. Also for a single row, where
# MKL reads a matrix that is in no cache at a third of the speed.
MIN_WORK = 2**18
MIN_SINGLE = 2**22  # in one matrix, from which it is faster than MKL's batch
MIN_SIZE = 16  # of the sum and of the weight's rows
MIN_ROWS = 32  # for which it is worth while to make a weight dense


def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    """As the CPU names itself; "GenuineIntel" where that cannot be read, so that torch's own choice stands."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return "GenuineIntel"


def has_slow_mkl() -> bool:
    """Whether this CPU has AVX-512 that MKL leaves unused."""
    if platform.machine() not in ("x86_64", "AMD64") or not (torch.backends.mkl.is_available() and _onednn()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() != "GenuineIntel"


MKL_IS_SLOW = has_slow_mkl()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: `x` `[..., K]` times the transpose of `weight` `[N, K]`, plus `bias` `[N]`."""
    if not MKL_IS_SLOW or x.numel() * weight.shape[0] < MIN_WORK:  # at once: decoding has little time
        return F.linear(x, weight, bias)
    fits = bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1])
    if not fits or weight.dim() != 2 or not _pays(x, weight):
        return F.linear(x, weight, bias)
    return (_Linear.apply if torch.is_grad_enabled() else _linear)(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a` `[M, K]` times `b` `[K, N]`, without a gradient."""
    return _multiply(a, b.T) if _pays(a, b.T) else a @ b


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a` `[n, M, K]` times `b` `[n, K, N]`, without a gradient. `out` is memory that may be used for it, or not."""
    if math.prod(a.shape[1:]) * b.shape[2] < MIN_SINGLE or not _pays(a, b.mT):
        return torch.bmm(a, b, out=out)
    products = [_multiply(x, y.T) for x, y in zip(a, b, strict=True)]
    return products[0][None] if len(products) == 1 else torch.stack(products, out=out)


def is_slow_in_mkl(x: Tensor) -> bool:
    """Whether products with such a tensor go to an MKL that is slow here."""
    return MKL_IS_SLOW and x.dtype == torch.float32 and x.device.type == "cpu"


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can multiply `x` `[..., K]` by the transpose of `weight` `[..., N, K]`, and is faster at it."""
    return (
        MKL_IS_SLOW
        and x.numel() * weight.shape[-2] >= MIN_WORK
        and _is_plain(x)
        and _is_plain(weight)
        and x.shape[-1] == weight.shape[-1] >= MIN_SIZE
        and weight.shape[-2] >= MIN_SIZE
        and (_is_dense(weight) or x.numel() >= MIN_ROWS * x.shape[-1])
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # vmap, grad and jvp know F.linear
        and forward_ad._current_level < 0
    )


def _is_plain(x: Tensor) -> bool:
    """Float32 in memory here: neither a DTensor, nor a fake one, nor a subclass with a meaning of its own."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.mT.is_contiguous()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_dense(weight):
        weight = weight.contiguous()  # oneDNN would take a thousand times as long
    bias = None if bias is None else bias.contiguous()  # it does not look at strides
    call = torch.ops.zoo.onednn_linear if torch.compiler.is_compiling() else _onednn_linear
    return call(x, weight, bias)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@partial(torch.library.register_fake, torch.library.custom_op("zoo::onednn_linear", _onednn_linear, mutates_args=()))
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = _multiply(x.reshape(-1, x.shape[-1]), weight, bias)
    # Not a view for autograd: what comes after may change it in place.
    return torch.ops.aten._unsafe_view(product, [*x.shape[:-1], weight.shape[0]])


class _Linear(torch.autograd.Function):
    """Made of `linear` again backwards, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = linear(rows, weight.T).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = linear(rows.T, x.reshape(-1, x.shape[-1]).T)
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0)
        return d_x, d_weight, d_bias


if _onednn():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
        return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]
