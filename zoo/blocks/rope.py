"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, section 3.2), the two halves of a head paired.

(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin),  angle of pair i at position t = t * theta^(-2i/d)

interleaved: the pairs are neighbours, (x1, x2) = (x_2i, x_2i+1), as in the paper. They come out as the two halves:
queries and keys alike, so that their products are the same.

longrope (Ding et al. 2024, arXiv:2402.13753, section 3.3) divides the frequency of pair i by short_factor[i], or by
long_factor[i] for every token of a sequence that is longer than the original context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zoo.blocks.base import Float32Module
from zoo.schema import FieldError, Positive, Size


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """`rope:` in a model file.

    type        default, linear (arXiv:2306.15595), yarn (arXiv:2309.00071), llama3 (Llama 3.1's ramp) or longrope.
    theta       the base.
    rotary_dim  how many dimensions of each head turn, from the first; default all.
    factor      how many times longer the context became; needed by every type but default.
    original_max_position_embeddings  the context before that; needed by yarn, llama3 and longrope.
    low_freq_factor, high_freq_factor  llama3's ramp.
    beta_fast, beta_slow  yarn's ramp.
    truncate    whether yarn's ramp begins and ends at whole dimensions; default true (gpt-oss: false).
    attention_factor  on cos and sin; default for yarn 0.1 ln(factor) + 1, for longrope the root of
                1 + ln(factor) / ln(original context).
    mscale, mscale_all_dim  given both, yarn's factor is the quotient of 0.1 mscale ln(factor) + 1 and the same of
                mscale_all_dim, whose square `mla` has in its softmax instead (DeepSeek-V3).
    short_factor, long_factor  longrope's, one number for each pair of dimensions.
    interleaved  pair neighbours instead of the two halves.
    """

    type: Literal["default", "linear", "yarn", "llama3", "longrope"] = "default"
    theta: Annotated[float, Gt(1)] = 10_000.0
    rotary_dim: Size | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    truncate: bool | None = None
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    interleaved: bool = False

    def resolve(self, head_dim: int) -> RopeConfig:
        """A copy with `rotary_dim` filled in.

        Raises:
            FieldError: rotary_dim odd or larger than the head, a field missing for this type or foreign to it.
        """
        rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if rotary_dim > head_dim or rotary_dim % 2:
            raise FieldError("rotary_dim", f"must be even and at most head_dim ({head_dim}), got {rotary_dim}")
        needed, allowed = _FIELDS[self.type]
        for name in SCALING:
            given = getattr(self, name) is not None
            if name in needed and not given:
                raise FieldError(name, f"is missing; rope type {self.type} needs it")
            if given and name not in needed + allowed:
                raise FieldError(name, f"does not belong to rope type {self.type}; remove it or change the type")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise FieldError("low_freq_factor", f"must be below high_freq_factor ({self.high_freq_factor})")
        if self.beta_fast and self.beta_slow and self.beta_fast <= self.beta_slow:
            raise FieldError("beta_fast", f"must be above beta_slow ({self.beta_slow}), got {self.beta_fast}")
        if self.mscale is not None and self.mscale_all_dim is None:
            raise FieldError("mscale", "does nothing without mscale_all_dim; give both or neither")
        if self.type == "longrope" and self.original_max_position_embeddings == 1:
            raise FieldError("original_max_position_embeddings", "must be at least 2, got 1")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != rotary_dim // 2:
                raise FieldError(name, f"must have {rotary_dim // 2} numbers, half of rotary_dim; got {len(factors)}")
        return replace(self, rotary_dim=rotary_dim)


# Fields of some types only.
_CONTEXT = ("factor", "original_max_position_embeddings")
_YARN = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
SCALING = (*_CONTEXT, "low_freq_factor", "high_freq_factor", *_YARN, "short_factor", "long_factor")
# type -> (fields it needs, fields it may have)
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (_CONTEXT, _YARN),
    "llama3": ((*_CONTEXT, "low_freq_factor", "high_freq_factor"), ()),
    "longrope": ((*_CONTEXT, "short_factor", "long_factor"), ("attention_factor",)),
}


class RotaryEmbedding(Float32Module):
    """Turns queries and keys. The frequencies are a buffer that is computed, never saved: `[d/2]`, or longrope's short
    and long ones, `[2, d/2]`.

    switch  the length beyond which all tokens of a sequence turn otherwise; None if they never do.
    """

    inv_freq: Tensor
    float32 = ("inv_freq",)

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        assert config.rotary_dim is not None, "resolve() fills it in"
        self.config = config
        self.rotary_dim = config.rotary_dim
        self.switch = config.original_max_position_embeddings if config.type == "longrope" else None
        frequencies, self.attention_factor = self._frequencies()
        # Like layers share their rotations under this name; the configuration itself holds lists.
        self._name = repr(config)
        self.register_buffer("inv_freq", torch.empty(frequencies.shape, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.inv_freq, self._frequencies()[0])

    def _frequencies(self) -> tuple[Tensor, float]:
        with torch.device("cpu"):
            if self.config.type == "default":
                exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32) / self.rotary_dim
                return 1.0 / self.config.theta**exponents, 1.0
            given = {name: getattr(self.config, name) for name in SCALING}
            parameters = {name: value for name, value in given.items() if value is not None}
            parameters |= {"rope_type": self.config.type, "rope_theta": self.config.theta}
            fields: dict[str, Any] = {
                "rope_parameters": parameters,
                "head_dim": self.rotary_dim,
                "hidden_size": self.rotary_dim,  # read by yarn, with the next, as a default for head_dim
                "num_attention_heads": 1,
                "max_position_embeddings": self.config.original_max_position_embeddings or 0,
            }
            config, compute = PreTrainedConfig(**fields), ROPE_INIT_FUNCTIONS[self.config.type]
            if self.switch is None:
                return compute(config, torch.device("cpu"))
            short, factor = compute(config, torch.device("cpu"))
            long, _ = compute(config, torch.device("cpu"), seq_len=self.switch + 1)
            return torch.stack([short, long]), factor

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor, known: dict[Any, tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`q`, `k` `[batch, length, heads, head_dim]` turned to `position_ids` `[batch, length]`; float32 angles.

        `known` holds the cosines and sines of these positions by configuration, and takes what is computed here.
        """
        key = self._name, q.dtype, q.device
        rotation = None if known is None else known.get(key)
        if rotation is None:
            inv_freq = self.inv_freq
            if self.switch is not None:
                inv_freq = inv_freq[(_lengths(position_ids) > self.switch).long()]
            angles = position_ids[..., None].float() * inv_freq
            cos, sin = ((f(angles) * self.attention_factor).to(q.dtype) for f in (torch.cos, torch.sin))
            cos, sin = torch.cat([cos, cos], -1)[:, :, None], torch.cat([-sin, sin], -1)[:, :, None]
            rotation = cos, sin
            if known is not None:
                known[key] = rotation
        return self._turn(q, *rotation), self._turn(k, *rotation)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turning, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.config.interleaved:
            turning = turning.unflatten(-1, (-1, 2)).mT.flatten(-2)
        # Rolled by half their number, the dimensions stand where those they are paired with were.
        turned = torch.addcmul(turning * cos, turning.roll(self.rotary_dim // 2, -1), sin)
        return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)


def _lengths(position_ids: Tensor) -> Tensor:
    """`[batch, length]`: how long each token's row or document is, up to the end of this chunk."""
    starts = torch.nn.functional.pad(position_ids.diff(dim=1) < 0, (1, 0))
    document = starts.long().cumsum(1)
    last = torch.zeros_like(position_ids).scatter_reduce(1, document, position_ids, "amax")
    return last.gather(1, document) + 1
