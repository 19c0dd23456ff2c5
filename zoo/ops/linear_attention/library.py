"""linear_attention by a library: fla's simple_gla, or mamba-ssm's SSD where that one is not here or refuses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.ops.dispatch import implements, unusable
from zoo.ops.linear_attention import simple_gla, ssd

PROVIDERS = {"fla": simple_gla, "mamba_ssm": ssd}


def _problems(*arguments: Any) -> dict[str, str | None]:
    """By package, why it cannot serve such a call, or None."""
    return {package: unusable(package) or module.refuses(*arguments) for package, module in PROVIDERS.items()}


def _refuses(*arguments: Any) -> str | None:
    problems = _problems(*arguments)
    if None in problems.values():
        return None
    return "; ".join(f"{package}: {problem}" for package, problem in problems.items())


@implements("linear_attention", "library", refuses=_refuses)
def linear_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    package = next(package for package, problem in _problems(*arguments).items() if problem is None)
    return PROVIDERS[package].linear_attention(*arguments)
