"""gated_rms_norm: the normalised, gated output of Mamba-2 and Lightning attention."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoo.ops import dispatch
from zoo.ops.gated_rms_norm import chunked, reference  # noqa: F401  (they register themselves)

dispatch.lazily("gated_rms_norm", "triton", "zoo.ops.gated_rms_norm.kernels", requires="triton")


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    num_groups: int = 1,
    activation: Literal["silu", "sigmoid"] = "silu",
    gate_first: bool = True,
) -> Tensor:
    """Root mean square norm (Zhang and Sennrich, arXiv:1910.07467, equation 4) with a gate before or after it.

        N(u) = u / sqrt(mean(u^2) + eps)                       the mean over one group of channels
        gate_first:      y = N(x * activation(gate)) * weight      Mamba-2 (arXiv:2405.21060, section 7.1)
        not gate_first:  y = N(x) * weight * activation(gate)      RetNet (arXiv:2307.08621), Lightning attention

    Everything is computed in float32, in float64 where x is float64. Gradients reach every tensor argument.

    Args:
        x: `[batch, length, channels]`.
        gate: `[batch, length, channels]`, before its activation.
        weight: `[channels]`.
        eps: added to the mean square.
        num_groups: groups of consecutive channels, each with its own root mean square; divides channels.
        activation: "silu" or "sigmoid", of the gate.
        gate_first: whether the gate comes before the norm.

    Returns:
        `[batch, length, channels]` in the dtype of `gate`, which is that of the model's activations; x may be the wider
        accumulator of a state-space layer.

    Raises:
        ValueError: a shape does not fit, the groups do not divide the channels, or the activation is unknown.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [batch, length, channels], got {list(x.shape)}")
    channels = x.shape[-1]
    if gate.shape != x.shape:
        raise ValueError(f"gate must be {list(x.shape)} to go with x, got {list(gate.shape)}")
    if weight.shape != (channels,):
        raise ValueError(f"weight must be [{channels}] to go with x's channels, got {list(weight.shape)}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f'activation must be "silu" or "sigmoid", got {activation!r}')
    out: Tensor = dispatch.run("gated_rms_norm", x.device, x, gate, weight, eps, num_groups, activation, gate_first)
    return out
