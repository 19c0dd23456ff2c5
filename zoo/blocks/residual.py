"""How a sublayer f (mixer or feed-forward) joins the residual stream x.

pre         x + scale*f(norm(x))                   Xiong et al. 2020, arXiv:2002.04745
post        norm(x + f(x))                         Vaswani et al. 2017, arXiv:1706.03762, section 3.1
reordered   x + norm(f(x))                         OLMo 2, arXiv:2501.00656, section 2.1
sandwich    x + norm2(f(norm(x)))                  Ding et al. 2021, arXiv:2105.13290, section 2.4
normalized  h = norm(x); alpha*h + beta*f(h)       MiniMax-01, arXiv:2501.08313, section 2.2.2 (released model)
parallel    x + mixer(norm(x)) + ffn(norm'(x))     Wang and Komatsuzaki 2021 (GPT-J); here with a norm each
serial      x + ffn(norm'(mixer(norm(x))))         Zamba, arXiv:2405.16712, section 2
skip        x' + f(norm(x))                        the same; x' is the stream that the layer below was given
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from zoo.schema import FieldError, from_mapping, join, nearest, shown

if TYPE_CHECKING:
    from zoo.config import ZooConfig

Function = Callable[[Tensor], Tensor]


class Sublayer(NamedTuple):
    """A mixer or a feed-forward with its norms. `second_norm` stands behind it, in a sandwich."""

    is_mixer: bool
    norm: Function
    f: Function
    second_norm: Function | None


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A rule.

    Called with the stream and a layer's sublayers, mixer first; returns the new stream.
    """

    has_second_norm = False
    needs_earlier = False  # the stream that the layer below was given

    def resolve(self, model: ZooConfig) -> Self:
        """A copy with every default that depends on the model filled in."""
        return self

    def __call__(self, x: Tensor, sublayers: Sequence[Sublayer], earlier: Tensor | None = None) -> Tensor:
        for sublayer in sublayers:
            x = self.add(x, sublayer)
        return x

    def add(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """`x` with one sublayer joined."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Pre(Residual):
    """x + scale*f(norm(x)).

    mixer_scale  multiplies a mixer's output (Granite's residual_multiplier).
    ffn_scale    multiplies a feed-forward's output.
    """

    mixer_scale: float = 1.0
    ffn_scale: float = 1.0

    def add(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        scale = self.mixer_scale if sublayer.is_mixer else self.ffn_scale
        return torch.add(x, sublayer.f(sublayer.norm(x)), alpha=scale)


@dataclass(frozen=True, kw_only=True)
class Post(Residual):
    """norm(x + f(x))."""

    def add(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return sublayer.norm(x + sublayer.f(x))


@dataclass(frozen=True, kw_only=True)
class Reordered(Residual):
    """x + norm(f(x)): the sublayer reads the stream as it is, and what it adds is normalised."""

    def add(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + sublayer.norm(sublayer.f(x))


@dataclass(frozen=True, kw_only=True)
class Sandwich(Residual):
    """x + norm2(f(norm(x)))."""

    has_second_norm = True

    def add(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        assert sublayer.second_norm is not None, "has_second_norm asks for it"
        return x + sublayer.second_norm(sublayer.f(sublayer.norm(x)))


@dataclass(frozen=True, kw_only=True)
class Normalized(Residual):
    """h = norm(x); alpha*h + beta*f(h): the stream itself is normalised, and alpha keeps it from being drowned.

    mixer_alpha  weight of the stream at a mixer; default (2 * layers)^(1/4), DeepNorm's (arXiv:2203.00555).
    mixer_beta   weight of the mixer's output.
    ffn_alpha    weight of the stream at a feed-forward; the same default.
    ffn_beta     weight of the feed-forward's output.
    """

    mixer_alpha: float | None = None
    mixer_beta: float = 1.0
    ffn_alpha: float | None = None
    ffn_beta: float = 1.0

    def resolve(self, model: ZooConfig) -> Self:
        default = (2 * model.num_hidden_layers) ** 0.25
        return replace(
            self,
            mixer_alpha=default if self.mixer_alpha is None else self.mixer_alpha,
            ffn_alpha=default if self.ffn_alpha is None else self.ffn_alpha,
        )

    def add(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        h = sublayer.norm(x)
        mixer, ffn = (self.mixer_alpha, self.mixer_beta), (self.ffn_alpha, self.ffn_beta)
        alpha, beta = mixer if sublayer.is_mixer else ffn
        assert alpha is not None, "resolve() fills it in"
        return alpha * h + beta * sublayer.f(h)


@dataclass(frozen=True, kw_only=True)
class Parallel(Residual):
    """x + mixer(norm(x)) + ffn(norm'(x)): both read the same stream."""

    def __call__(self, x: Tensor, sublayers: Sequence[Sublayer], earlier: Tensor | None = None) -> Tensor:
        return x + sum(sublayer.f(sublayer.norm(x)) for sublayer in sublayers)


@dataclass(frozen=True, kw_only=True)
class Serial(Residual):
    """x + ffn(norm'(mixer(norm(x)))): one behind the other, and the stream beside both."""

    def __call__(self, x: Tensor, sublayers: Sequence[Sublayer], earlier: Tensor | None = None) -> Tensor:
        y = x
        for sublayer in sublayers:
            y = sublayer.f(sublayer.norm(y))
        return x + y


@dataclass(frozen=True, kw_only=True)
class Skip(Residual):
    """x' + f(norm(x)): what the layer below added to its stream x' is read here, and goes no further. A second sublayer
    joins as in pre."""

    needs_earlier = True

    def __call__(self, x: Tensor, sublayers: Sequence[Sublayer], earlier: Tensor | None = None) -> Tensor:
        first, *rest = sublayers
        x = (x if earlier is None else earlier) + first.f(first.norm(x))
        for sublayer in rest:
            x = x + sublayer.f(sublayer.norm(x))
        return x


RESIDUALS: dict[str, type[Residual]] = {
    "pre": Pre,
    "post": Post,
    "reordered": Reordered,
    "sandwich": Sandwich,
    "normalized": Normalized,
    "parallel": Parallel,
    "serial": Serial,
    "skip": Skip,
}


def residual_from_mapping(mapping: Any, path: str) -> Residual:
    """The residual rule that `{kind: ..., ...}` names.

    Raises:
        FieldError: not a mapping, an unknown kind, or a field that kind does not have.
    """
    if not isinstance(mapping, dict):
        raise FieldError(path, f"must be a mapping such as {{kind: pre}}, got {shown(mapping)}")
    kind = mapping.get("kind", "pre")
    if not isinstance(kind, str) or kind not in RESIDUALS:
        raise FieldError(join(path, "kind"), f"unknown residual {shown(kind)}; {nearest(kind, RESIDUALS)}")
    return from_mapping(RESIDUALS[kind], {key: value for key, value in mapping.items() if key != "kind"}, path)
