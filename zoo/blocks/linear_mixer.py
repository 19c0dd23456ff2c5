"""Linear attention with a normaliser (Katharopoulos et al. 2020, arXiv:2006.16236, equations 8 and 9) and its feature
maps: elu (the same, equation 7), relu and cosformer (Qin et al. 2022, arXiv:2202.08791, section 3).

    S_t = S_(t-1) + phi(k_t) v_t^T,   z_t = z_(t-1) + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) z_t),   y = W_o o              an o_t of no weights is 0

    elu        phi(x) = elu(x) + 1
    relu       phi(x) = max(x, 0)
    cosformer  phi(x_t) = [max(x, 0) cos(pi t / 2M), max(x, 0) sin(pi t / 2M)], so that the weight of key j for query t
               is relu(q_t) . relu(k_j) cos(pi (t - j) / 2M); M is max_length

The normaliser is one more value, which is always 1: the op is linear_attention without a decay. B batch, T length,
H heads, D head_dim, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from zoo import ops
from zoo.blocks.attention import resolve_head_dim
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.linear import in_projection, out_projection
from zoo.blocks.state import State
from zoo.ops.infini_attention.chunked import elu_plus_one
from zoo.schema import FieldError, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

# Weights that add up to less than so many of the smallest normal numbers are none: the gradient of dividing by them
# would overflow.
NO_WEIGHT = 1e8


@dataclass(frozen=True, kw_only=True)
class LinearConfig(MixerConfig):
    """Linear attention with a feature map and a normaliser.

    num_heads    heads.
    head_dim     default hidden_size / num_heads.
    feature_map  elu, relu, or cosformer (relu weighted by a cosine of the distance).
    max_length   of cosformer: the longest text it is for, M above; beyond it weights would turn negative.
    """

    num_heads: Size
    head_dim: Size | None = None
    feature_map: Literal["elu", "relu", "cosformer"] = "elu"
    max_length: Size | None = None

    def resolve(self, model: ZooConfig) -> Self:
        if (self.feature_map == "cosformer") != (self.max_length is not None):
            problem = "is missing; cosformer needs it" if self.max_length is None else "is for cosformer; remove it"
            raise FieldError("max_length", problem)
        return replace(self, head_dim=resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size))


class NormalizedLinearAttention(Mixer):
    """What the mixers with a normaliser share; `features` makes the rest."""

    adapted = (("q_proj",), ("k_proj",), ("v_proj",))

    def __init__(self, num_heads: int, head_dim: int, num_features: int, model: ZooConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_features = num_heads, head_dim, num_features
        inner = num_heads * head_dim
        self.q_proj = in_projection(model, model.hidden_size, inner)
        self.k_proj = in_projection(model, model.hidden_size, inner)
        self.v_proj = in_projection(model, model.hidden_size, inner)
        self.o_proj = out_projection(model, inner)

    def features(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k) `[batch, length, H, F]` of q and k `[batch, length, H, D]`, nowhere negative in their
        products. A factor of a query's own may be left out: it cancels."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        x, cu_seqlens = context.pack(x)
        position_ids, _ = context.pack(context.position_ids)
        heads = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = heads
        wide = torch.promote_types(x.dtype, torch.float32)  # sums over the whole text
        q, k = self.features(q.to(wide), k.to(wide), position_ids)
        v = functional.pad(v.to(wide), (0, 1), value=1.0)
        if state is None:
            out = ops.linear_attention(q, k, v, cu_seqlens=cu_seqlens)
        else:
            out, new = ops.linear_attention(q, k, v, initial_state=state["S"], return_state=True, cu_seqlens=cu_seqlens)
            state.update(S=new)
        total = out[..., -1:]
        empty = total < NO_WEIGHT * torch.finfo(wide).tiny
        out = (out[..., :-1] / total.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
        return context.unpack(self.o_proj(out.to(x.dtype).flatten(-2)))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = batch_size, self.num_heads, self.num_features, self.head_dim + 1
        return State(S=torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)))

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * self.num_heads * self.num_features * (self.head_dim + 1) * 4

    def flops(self, batch: int, length: int) -> int:
        weights = sum(p.weight.numel() for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        return batch * length * (2 * weights + 4 * self.num_heads * self.num_features * (self.head_dim + 1))


class LinearMixer(NormalizedLinearAttention):
    def __init__(self, config: LinearConfig, model: ZooConfig, layer_idx: int) -> None:
        assert config.head_dim is not None, "resolve() fills it in"
        both = 2 if config.feature_map == "cosformer" else 1
        super().__init__(config.num_heads, config.head_dim, both * config.head_dim, model)
        self.config = config

    def features(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.feature_map == "elu":
            return elu_plus_one(q), elu_plus_one(k)
        q, k = functional.relu(q), functional.relu(k)
        if self.config.max_length is None:
            return q, k
        self._check_length(position_ids, self.config.max_length)
        angles = position_ids[..., None, None].to(q.dtype) * (math.pi / (2 * self.config.max_length))
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([q * cos, q * sin], -1), torch.cat([k * cos, k * sin], -1)

    @staticmethod
    def _check_length(position_ids: Tensor, max_length: int) -> None:
        # On the CPU only: on a GPU reading them would wait for the device in every layer. Fake ones hold no number.
        fake = torch.compiler.is_compiling() or isinstance(position_ids, FakeTensor)
        if position_ids.device.type == "cpu" and not fake:
            longest = int(position_ids.max()) + 1
            if longest > max_length:
                raise ValueError(f"linear: cosformer is for {max_length} tokens (max_length), got a text of {longest}")
