"""Learning-rate schedules: pure functions from a step to a factor on the peak learning rate.

Steps count from 0, and the warm-up is (step + 1) / warmup_steps, so that the first update already moves the weights
and step `warmup_steps - 1` is the first at the peak.

cosine: Loshchilov & Hutter 2017, SGDR (arXiv:1608.03983), one cycle without restarts.
wsd: warmup-stable-decay, Hu et al. 2024, MiniCPM (arXiv:2404.06395, section 4), with the 1 - sqrt decay that Hägele et
al. 2024 (arXiv:2405.18392, section 3) found best.
"""

import math
from collections.abc import Callable
from functools import partial


def cosine(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Factor in [0, 1]: linear warm-up, then half a cosine from 1 down to `final_fraction` at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float, decay_fraction: float = 0.2) -> float:
    """Factor in [0, 1]: linear warm-up, constant 1, then 1 - sqrt over the last `decay_fraction` of `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = max(1, round(decay_fraction * total_steps))
    progress = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / decay_steps))
    return 1.0 - (1.0 - final_fraction) * math.sqrt(progress)


def make_schedule(
    name: str, *, total_steps: int, warmup_steps: int, final_fraction: float, decay_fraction: float
) -> Callable[[int], float]:
    """The schedule `name` ("cosine" or "wsd") as a function of the step alone, for torch's LambdaLR."""
    common = {"total_steps": total_steps, "warmup_steps": warmup_steps, "final_fraction": final_fraction}
    schedules = {"cosine": partial(cosine, **common), "wsd": partial(wsd, **common, decay_fraction=decay_fraction)}
    return schedules[name]
