"""Norms: root mean square (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4) and LayerNorm (arXiv:1607.06450).

rms:    y = x / sqrt(mean(x^2) + eps) * w          layer:  y = (x - mean) / sqrt(var + eps) * w + b
zero_centered: w stands for 1 + w, so that weight decay pulls the scale to 1 (Gemma).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from zoo.schema import Positive


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """`norm:` in a model file.

    kind           rms or layer.
    eps            added to the variance.
    zero_centered  store the scale as its distance from 1.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: Positive = 1e-6
    zero_centered: bool = False


class Norm(nn.Module):
    """Normalises the last dimension, in float32 whatever the input's dtype."""

    def __init__(self, size: int, config: NormConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.kind == "layer" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.weight, 0.0 if self.config.zero_centered else 1.0)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide)
        if self.config.zero_centered:
            weight = 1 + weight
        if self.bias is None:
            y = F.rms_norm(x.to(wide), weight.shape, weight, self.config.eps)
        else:
            y = F.layer_norm(x.to(wide), weight.shape, weight, self.bias.to(wide), self.config.eps)
        return y.to(x.dtype)
