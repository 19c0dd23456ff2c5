"""Feed-forward: plain (Vaswani et al. 2017, arXiv:1706.03762, section 3.3) or gated (Shazeer 2020, arXiv:2002.05202).

gated   W_down ( act(a W_gate x) * (W_up x) )   SwiGLU with silu; a is gate_scale
plain   W_down act(W_up x)                      GELU; relu2 is relu(x)^2 (So et al. 2021, arXiv:2109.08668)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.blocks.base import FeedForward, FeedForwardConfig, RouterStatistics
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import in_projection, out_projection
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up from the two halves of one tensor. Its gradient is written into one tensor too, where autograd
    would make each half's and then concatenate them."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def gated(activation: Activation, gate_up: Tensor) -> Tensor:
    """activation(gate) * up; `gate_up` is both, side by side in the last dimension."""
    if activation == "silu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():  # which fuses for itself
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@dataclass(frozen=True, kw_only=True)
class MLPConfig(FeedForwardConfig):
    """A dense feed-forward.

    intermediate_size  its width.
    activation         silu, gelu, gelu_tanh (its approximation by a tanh, as in GPT-2 and Gemma) or relu2.
    gated              multiply by a second projection (SwiGLU, GEGLU).
    bias               biases on all projections.
    gate_scale         multiplies the gate before its activation (Falcon-H1).
    """

    intermediate_size: Size
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    gate_scale: float = 1.0

    def resolve(self, model: ZooConfig) -> Self:
        if self.gate_scale != 1 and not self.gated:
            raise FieldError(
                "gate_scale", f"is of the gate, and there is none; give gated: true, got {self.gate_scale}"
            )
        return self


class MLP(FeedForward):
    adapted = (("gate_proj", "up_proj"),)

    def __init__(self, config: MLPConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        hidden, inner = model.hidden_size, config.intermediate_size
        self.gate_proj = in_projection(model, hidden, inner, config.bias) if config.gated else None
        self.up_proj = in_projection(model, hidden, inner, config.bias)
        self.down_proj = out_projection(model, inner, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, RouterStatistics | None]:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x))), None
        gate = self.gate_proj(x)
        if self.config.gate_scale != 1:
            gate = self.config.gate_scale * gate
        return self.down_proj(self.activation(gate) * self.up_proj(x)), None

    def flops(self, batch: int, length: int) -> int:
        weights = sum(p.weight.numel() for p in (self.gate_proj, self.up_proj, self.down_proj) if p is not None)
        return 2 * batch * length * weights
