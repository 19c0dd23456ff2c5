"""gated_rms_norm in blocks of rows that stay in the cache: each argument is read once and each result written once.

With a = activation(gate), r = 1 / rms per group, d = dL/dy r and p = d x a:

    dL/dweight = sum over rows of p
    c = -r^2 mean(p weight)                              the mean over one group of channels
    gate first:  e = d weight + c x a,   dL/dx = e a             gate last:  e = d weight,   dL/dx = e a + c x
    dL/dgate = e x activation'(gate)

The backward keeps only r besides the arguments, and computes the rest again.

Legend: R rows (batch x length), G groups, C channels of one group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from zoo.ops.dispatch import implements
from zoo.ops.gated_rms_norm.autograd import register

# Elements of a block per thread. Measured with 1280 channels on two cores of 1 MB L2 each: half of it costs 10% more
# (each operation wakes the threads), twice as much up to twice the time.
BLOCK = 1 << 17


@implements("gated_rms_norm", "torch")
def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, num_groups: int, activation: str, gate_first: bool
) -> Tensor:
    differentiable = torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad or weight.requires_grad)
    # Calling an operator takes half as long as normalising a token, so decoding goes without.
    call = _operator if differentiable or torch.compiler.is_compiling() else _forward
    return call(x, gate, weight, eps, num_groups, activation, gate_first)[0]


def _forward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, num_groups: int, activation: str, gate_first: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    r = torch.empty(*x.shape[:2], num_groups, dtype=dtype, device=x.device)
    weight = weight.to(dtype).view(num_groups, -1)
    for x_rows, gate_rows, out_rows, r_rows in _blocks(num_groups, x, gate, out, r):
        x_rows = x_rows.to(dtype)
        y = _activate(gate_rows.to(dtype), activation).mul_(x_rows)
        normed = y if gate_first else x_rows
        torch.linalg.vector_norm(normed, dim=2, keepdim=True, out=r_rows)
        r_rows.square_().div_(normed.shape[2]).add_(eps).rsqrt_()
        torch.mul(y.mul_(weight), r_rows, out=out_rows)
    return out, r


def _backward(
    d_out: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    r: Tensor,
    num_groups: int,
    activation: str,
    gate_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = r.dtype
    d_x, d_gate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
    wide_weight = weight.to(dtype).view(num_groups, -1)
    d_weight = torch.zeros_like(wide_weight)
    for d_rows, x_rows, gate_rows, r_rows, d_x_rows, d_gate_rows in _blocks(num_groups, d_out, x, gate, r, d_x, d_gate):
        x_rows, gate_rows = x_rows.to(dtype), gate_rows.to(dtype)
        a = _activate(gate_rows, activation)
        xa = x_rows * a
        e = d_rows * r_rows
        p = e * xa
        d_weight += p.sum(0)
        c = p.mul_(wide_weight).mean(2, keepdim=True).mul_(r_rows.square()).neg_()
        e *= wide_weight
        if gate_first:
            torch.mul(e.addcmul_(xa, c), a, out=d_x_rows)
        else:
            torch.addcmul(torch.mul(e, a, out=p), x_rows, c, out=d_x_rows)
        e *= x_rows
        if activation == "sigmoid":
            e = torch.ops.aten.sigmoid_backward(e, a)
        else:
            e = torch.ops.aten.silu_backward(e, gate_rows)
        d_gate_rows.copy_(e)
    return d_x, d_gate, d_weight.flatten().to(weight.dtype)


def _activate(gate: Tensor, activation: str) -> Tensor:
    return torch.sigmoid(gate) if activation == "sigmoid" else functional.silu(gate)


def _blocks(num_groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors `[B,T,*]` as `[R,G,*]`, some rows of each at a time."""
    rows = max(1, BLOCK * torch.get_num_threads() // tensors[0].shape[-1])
    grouped = tuple(x.reshape(-1, num_groups, x.shape[-1] // num_groups) for x in tensors)
    if grouped[0].shape[0] <= rows:
        return iter((grouped,))  # splitting takes as long as normalising a token
    return zip(*(x.split(rows) for x in grouped), strict=True)


_operator = register("gated_rms_norm", _forward, _backward)
