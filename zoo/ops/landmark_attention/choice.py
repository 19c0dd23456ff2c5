"""Which blocks are read: those whose landmarks score highest, in a way that rounding does not decide.

Landmarks are one embedding, so that below the first mixer their keys are alike and their logits equal but for rounding,
which differs from chunk to chunk and backend to backend. Logits are therefore compared in steps of 1 / STEPS, within
which a weight changes by less than two percent, and of equal ones the latest block is the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 64
_PLACE = 31  # bits of a block's place
_LARGEST = 2.0**31  # steps


def best_blocks(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`(logits, places)` `[..., count]` of the best of `logits` `[..., blocks]`, -inf for a block that is hidden."""
    steps = (logits.detach() * STEPS).round_().clamp_(-_LARGEST, _LARGEST).long()
    # Whole numbers that hold the step, then the place.
    keys = steps.bitwise_left_shift_(_PLACE).add_(torch.arange(logits.shape[-1], device=logits.device))
    places = keys.topk(count, -1).values & (2**_PLACE - 1)
    return logits.gather(-1, places), places
