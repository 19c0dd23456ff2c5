"""Projections that know their own initialisation, so that `reset_parameters` alone makes a model right."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.ops.matmul import linear

if TYPE_CHECKING:
    from zoo.config import ZooConfig


class Linear(nn.Linear):
    """nn.Linear with normal weights of standard deviation `std` and a zero bias."""

    def __init__(self, in_features: int, out_features: int, *, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class AdaptedLinear(Linear):
    """Linear with an addition of low rank: `down` `[rank, in]` and `up` `[out, rank]` are lent to it for a call, by
    torch.func.functional_call; without them it is Linear."""

    down: Tensor | None
    up: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, std: float, bias: bool = False) -> None:
        super().__init__(in_features, out_features, std=std, bias=bias)
        self.register_parameter("down", None)
        self.register_parameter("up", None)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.down is None or self.up is None else y + linear(linear(x, self.down), self.up)


class Embedding(nn.Embedding):
    """nn.Embedding with normal weights of standard deviation `std`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)


class DepthwiseConv(nn.Module):
    """Weights of a causal depthwise convolution, `weight` `[channels, kernel]` and `bias` `[channels]` or None, for the
    op `causal_conv1d`. Initialised as nn.Conv1d is (uniform within 1/sqrt(kernel))."""

    def __init__(self, channels: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)


def in_projection(model: ZooConfig, in_features: int, out_features: int, bias: bool = False) -> Linear:
    """A projection that reads the residual stream, or stands inside a mixer."""
    return Linear(in_features, out_features, std=model.initializer_range, bias=bias)


def out_projection_std(model: ZooConfig) -> float:
    """Initial standard deviation of what writes to the residual stream: scaled by 1/sqrt(2 * layers), as in GPT-2
    (section 2.3), so that the stream's variance at the top does not grow with depth."""
    return model.initializer_range / math.sqrt(2 * model.num_hidden_layers)


def out_projection(model: ZooConfig, in_features: int, bias: bool = False) -> Linear:
    """A projection that writes to the residual stream."""
    return Linear(in_features, model.hidden_size, std=out_projection_std(model), bias=bias)
