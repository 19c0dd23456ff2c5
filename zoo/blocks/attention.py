"""Softmax attention: multi-head (Vaswani et al. 2017, arXiv:1706.03762, section 3.2), grouped-query (Ainslie et al.
2023, arXiv:2305.13245), windowed, with attention sinks (Xiao et al. 2023, arXiv:2309.17453).

    o_t = sum_j softmax_j(s * q_t . k_j) v_j     over the visible j <= t; s is 1/sqrt(D) unless `scale` is given
    y = W_o (o)                                  with output_gate: W_o (sigmoid(W_g x) * o)

Which keys are visible is a Pattern (zoo/ops/softmax_attention/pattern.py): a window, which may change with depth,
dilated or not, sinks, a stride, random blocks. Beside a window, tokens of given ids may be visible to every later query
(global_tokens.py). With `sink_positions: cache` a sink never seems further away than it stands in StreamingLLM's cache:
to the sinks alone, the query at t is turned as at min(t, num_sinks + window - 1).

With softcap c the logits are c tanh(s q_t . k_j / c) (Gemma 2, arXiv:2408.00118, section 2). With qk_norm q and k are
normalised before the rotation, each head by itself (Qwen3, arXiv:2505.09388) or all of them as one vector (OLMo 2,
arXiv:2501.00656). With sink_logits every head has a logit of its own, z, that competes with the keys' and has no
value, so that a head need not attend to anything (gpt-oss, arXiv:2508.10925): with L_t the log-sum-exp of the keys',

    o_t = sigmoid(L_t - z) sum_j softmax_j(s * q_t . k_j) v_j

B batch, T length, H query heads, K key/value heads, D head_dim. Each of the K heads serves H/K consecutive query heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.blocks import global_tokens
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.context import SequenceContext
from zoo.blocks.global_tokens import GlobalTokensState, WindowAndGlobalState
from zoo.blocks.linear import in_projection, out_projection
from zoo.blocks.norm import Norm, NormConfig
from zoo.blocks.rope import RopeConfig, RotaryEmbedding
from zoo.blocks.state import KeyValueState, State
from zoo.ops.softmax_attention import Pattern
from zoo.ops.varlen import document_ids
from zoo.schema import Count, FieldError, Positive, Size

if TYPE_CHECKING:
    from zoo.config import ZooConfig

NO_CACHE_SINKS = (
    "cache needs num_sinks, one window without dilation, and no stride, random or global_token_ids; change these or "
    "remove it"
)
NO_CACHE_ROPE = "cache needs a rope whose angles do not change with the length; change rope or remove it"


@dataclass(frozen=True, kw_only=True)
class WindowGrowth:
    """A window that grows with depth: layer l, from 0, has min(cap, start * growth^l), rounded down.

    start   the window of the model's first layer.
    growth  the factor from each layer of the model to the next.
    cap     the widest window; default no limit.
    """

    start: Size
    growth: Positive
    cap: Size | None = None

    def at(self, layer_idx: int) -> int:
        """The window of one layer."""
        # Through logarithms: a thousand layers on, the power alone would overflow.
        exponent = math.log(self.start) + layer_idx * math.log(self.growth)
        widest = 2**31 - 1 if self.cap is None else self.cap
        if exponent > math.log(widest):
            return widest
        # A product that is whole but for rounding (100 * 1.15) is not rounded down.
        return max(1, min(widest, int(self.start * self.growth**layer_idx * (1 + 1e-12))))


@dataclass(frozen=True, kw_only=True)
class RandomBlocks:
    """Earlier blocks that a query sees beyond its window, drawn once for each block of queries (BigBird).

    blocks      how many.
    block_size  tokens in a block.
    seed        of the draw; every layer draws its own.
    """

    blocks: Size
    block_size: Size = 64
    seed: Count = 0


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Softmax attention: MHA, GQA or MQA, with rotary positions or none.

    num_heads     query heads.
    num_kv_heads  key and value heads (grouped-query attention); default num_heads.
    head_dim      default hidden_size / num_heads.
    rope          rotary positions; null for no positions at all.
    window        how many keys a query sees, its own included; default all. A mapping {start, growth, cap} widens it
                  with depth; a list has an entry for every layer of the model, null for all keys.
    dilation      the keys of the window stand so far apart.
    num_sinks     how many of the first keys stay visible beyond the window: sinks, or global tokens at the start.
    sink_positions  how far away sinks seem: as in the text, or never further than in a cache that holds the sinks and
                  the window (StreamingLLM).
    stride        every stride-th key of the text stays visible beyond the window.
    random        earlier blocks, drawn at random, stay visible beyond the window.
    global_token_ids  tokens of these ids stay visible beyond the window, wherever they are (Longformer).
    qk_norm       RMS-normalise queries and keys before the rotation: true is each head, projection is all heads of a
                  token as one vector; eps and zero_centered are those of the model's norm.
    bias          biases on all projections.
    output_gate   multiply the output by sigmoid(W_g x) before the last projection.
    output_bias   a bias on the last projection; default as bias.
    scale         of the logits; default head_dim^-0.5.
    softcap       bounds the logits smoothly to this size; default not at all.
    sink_logits   a learned logit of each head in its softmax, without a value.
    concat_embeddings  read the token embeddings beside the stream, `[batch, length, 2 * hidden]` (Zamba).
    """

    num_heads: Size
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    window: Size | WindowGrowth | list[Size | None] | None = None
    dilation: Size = 1
    num_sinks: Count = 0
    sink_positions: Literal["text", "cache"] = "text"
    stride: Size | None = None
    random: RandomBlocks | None = None
    global_token_ids: list[Count] | None = None
    qk_norm: bool | Literal["projection"] = False
    bias: bool = False
    output_gate: bool = False
    output_bias: bool | None = None
    scale: Positive | None = None
    softcap: Positive | None = None
    sink_logits: bool = False
    concat_embeddings: bool = False

    def resolve(self, model: ZooConfig) -> Self:
        head_dim = resolve_head_dim(self.head_dim, self.num_heads, model.hidden_size)
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if self.num_heads % num_kv_heads:
            raise FieldError("num_kv_heads", f"must divide num_heads ({self.num_heads}), got {num_kv_heads}")
        window = self.window
        if isinstance(window, WindowGrowth) and window.cap is not None and window.cap < window.start:
            raise FieldError("window.cap", f"must be at least start ({window.start}), got {window.cap}")
        layers = model.num_hidden_layers
        if isinstance(self.window, list) and len(self.window) != layers:
            problem = f"must have an entry for each of the model's {layers} layers, got {len(self.window)}"
            raise FieldError("window", problem)
        if isinstance(self.window, list) and not any(self.window):
            raise FieldError("window", "is null for every layer; remove it")
        if self.num_sinks and self.window is None and self.dilation == 1:
            raise FieldError("num_sinks", f"needs a window to stand outside of, got {self.num_sinks} without one")
        for name in ("stride", "random"):
            if getattr(self, name) is not None and self.window is None:
                raise FieldError(name, "needs a window to stand outside of; give window too")
            if getattr(self, name) is not None and self.dilation > 1:
                raise FieldError(name, f"does not go with dilation ({self.dilation}); remove one of them")
        self._check_global_tokens(model.vocab_size)
        self.check_sink_positions()
        rope = self.rope
        if rope is not None:
            try:
                rope = rope.resolve(head_dim)
            except FieldError as error:
                raise error.within("rope") from None
        return replace(
            self,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            rope=rope,
            output_bias=self.bias if self.output_bias is None else self.output_bias,
            scale=head_dim**-0.5 if self.scale is None else self.scale,
        )

    def check_sink_positions(self) -> None:
        """Raise FieldError where `sink_positions: cache` has no meaning."""
        if self.sink_positions == "text":
            return
        others = self.dilation > 1 or self.stride or self.random or self.global_token_ids
        if self.window is None or isinstance(self.window, list) or not self.num_sinks or others:
            raise FieldError("sink_positions", NO_CACHE_SINKS)
        if self.rope is None or self.rope.type == "longrope":
            raise FieldError("sink_positions", NO_CACHE_ROPE)

    def _check_global_tokens(self, vocab_size: int) -> None:
        if self.global_token_ids is None:
            return
        if self.window is None:
            raise FieldError("global_token_ids", "needs a window to stand outside of; give window too")
        for name, value, default in (
            ("dilation", self.dilation, 1),
            ("stride", self.stride, None),
            ("random", self.random, None),
            ("softcap", self.softcap, None),
        ):
            if value != default:
                raise FieldError("global_token_ids", f"does not go with {name}; remove one of them")
        if not self.global_token_ids:
            raise FieldError("global_token_ids", "is empty; name a token or remove it")
        for i, token in enumerate(self.global_token_ids):
            if token >= vocab_size:
                raise FieldError(f"global_token_ids[{i}]", f"must be below vocab_size ({vocab_size}), got {token}")

    @property
    def varies_with_depth(self) -> bool:
        return isinstance(self.window, WindowGrowth | list) or self.random is not None

    def pattern(self, layer_idx: int) -> Pattern:
        """What the queries of one layer see."""
        window = self.window.at(layer_idx) if isinstance(self.window, WindowGrowth) else self.window
        if isinstance(window, list):
            window = window[layer_idx]
            if window is None and self.dilation == 1:
                return Pattern()  # nothing stands outside
        pattern = Pattern(window, self.num_sinks, self.dilation, self.stride)
        if self.random is None:
            return pattern
        drawn = {"random_blocks": self.random.blocks, "block_size": self.random.block_size}
        return replace(pattern, **drawn, seed=self.random.seed + layer_idx)


def resolve_head_dim(head_dim: int | None, num_heads: int, hidden_size: int) -> int:
    """The given head_dim, or hidden_size / num_heads.

    Raises:
        FieldError: head_dim is not given and the heads do not divide the hidden size.
    """
    if head_dim is None and hidden_size % num_heads:
        raise FieldError("num_heads", f"must divide hidden_size ({hidden_size}), got {num_heads}; or give head_dim")
    return hidden_size // num_heads if head_dim is None else head_dim


class SinkLogits(nn.Module):
    """A learned logit of each head, beside those of the keys."""

    def __init__(self, num_heads: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)

    def forward(self, out: Tensor, lse: Tensor) -> Tensor:
        """What attention gives with them, of its `out` `[B, T, H, D]` and `lse` `[B, T, H]` without."""
        return (out * (lse - self.weight.to(lse.dtype)).sigmoid()[..., None]).to(out.dtype)


class Attention(Mixer):
    adapted = (("q_proj",), ("k_proj",), ("v_proj",), ("gate_proj",))

    def __init__(self, config: AttentionConfig, model: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_kv_heads is not None, "resolve() fills them in"
        assert config.output_bias is not None, "resolve() fills it in"
        self.config = config
        self.pattern = config.pattern(layer_idx)
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.reads_embeddings = config.concat_embeddings
        self.global_token_ids = config.global_token_ids if self.pattern.window is not None else None
        self.reads_token_ids = self.global_token_ids is not None
        hidden = model.hidden_size * (2 if config.concat_embeddings else 1)
        inner, inner_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = in_projection(model, hidden, inner, config.bias)
        self.k_proj = in_projection(model, hidden, inner_kv, config.bias)
        self.v_proj = in_projection(model, hidden, inner_kv, config.bias)
        self.gate_proj = in_projection(model, hidden, inner, config.bias) if config.output_gate else None
        self.o_proj = out_projection(model, inner, config.output_bias)
        norm = NormConfig(eps=model.norm_config.eps, zero_centered=model.norm_config.zero_centered)
        whole = config.qk_norm == "projection"
        self.q_norm = Norm(inner if whole else self.head_dim, norm) if config.qk_norm else None
        self.k_norm = Norm(inner_kv if whole else self.head_dim, norm) if config.qk_norm else None
        self.rotary = RotaryEmbedding(config.rope) if config.rope is not None else None
        self.sinks = SinkLogits(self.num_heads, model.initializer_range) if config.sink_logits else None

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
        q = self._heads(self.q_proj(x), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self._heads(self.v_proj(x))
        unturned = q
        if self.rotary is not None:
            q, k = self.rotary(q, k, context.position_ids, context.rotations)
        key_mask, far = context.padding_mask, None
        if self.global_token_ids is not None:
            kept = None
            if isinstance(state, WindowAndGlobalState):
                kept, state = state.global_tokens, state.window
            far = self._global_tokens(q, k, v, context, kept)
        if state is not None:
            if context.cu_seqlens is not None:
                raise ValueError(
                    "attention cannot continue a state with cu_seqlens; pad the rows instead of packing them"
                )
            assert isinstance(state, KeyValueState), "new_state() makes one"
            k, v, key_mask = state.append(k, v, key_mask)
            k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast the state has the dtype of the weights
        if self.config.sink_positions == "cache":
            q, k = self._near_sinks(unturned, q, k, key_mask, context)
        out = ops.softmax_attention(
            q,
            k,
            v,
            pattern=self.pattern,
            scale=self.config.scale,
            softcap=self.config.softcap,
            cu_seqlens=context.cu_seqlens,
            key_mask=key_mask,
            return_lse=self.sinks is not None or far is not None,
        )
        if far is not None:
            near_and_far = global_tokens.merge(out, far)
            out = near_and_far if self.sinks is not None else near_and_far[0]
        out = (out if self.sinks is None else self.sinks(*out)).flatten(-2)
        if self.gate_proj is not None:
            out = out * self.gate_proj(x).sigmoid()
        return self.o_proj(out)

    def _global_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext, state: GlobalTokensState | None
    ) -> tuple[Tensor, Tensor]:
        """Attention to the global tokens beyond the window, `(out, lse)`."""
        if context.token_ids is None:
            raise ValueError("attention with global_token_ids needs the ids of the tokens; give input_ids")
        assert self.global_token_ids is not None and self.pattern.window is not None, "resolve() checked it"
        is_global = torch.stack([context.token_ids == token for token in self.global_token_ids]).any(0)
        return global_tokens.attend(
            q,
            k,
            v,
            is_global,
            context,
            state,
            window=self.pattern.window,
            num_sinks=self.pattern.num_sinks,
            scale=self.config.scale,
        )

    def _near_sinks(
        self, unturned: Tensor, q: Tensor, k: Tensor, key_mask: Tensor | None, context: SequenceContext
    ) -> tuple[Tensor, Tensor]:
        """q and k of twice the head_dim, so that one product serves both kinds of key: [q_t | q_min(t, last)] times
        [k | 0], or [0 | k] for a sink. A sink within the window gives the same either way."""
        assert self.rotary is not None and self.pattern.window is not None, "resolve() checked it"
        last = self.pattern.num_sinks + self.pattern.window - 1
        near, _ = self.rotary(unturned, unturned[:, :, :1], context.position_ids.clamp_max(last))
        if key_mask is not None:
            rank = key_mask.long().cumsum(1) - 1
        else:
            rank = torch.arange(k.shape[1], device=k.device)[None]
            if context.cu_seqlens is not None:
                rank = rank - context.cu_seqlens.long()[document_ids(context.cu_seqlens, k.shape[1])]
        is_sink = (rank < self.pattern.num_sinks)[..., None, None]
        return torch.cat([q, near], -1), torch.cat([k.masked_fill(is_sink, 0), k.masked_fill(~is_sink, 0)], -1)

    def _heads(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """`x` `[batch, length, heads * D]` as `[batch, length, heads, D]`, normalised."""
        if norm is not None and self.config.qk_norm == "projection":
            x, norm = norm(x), None
        x = x.unflatten(-1, (-1, self.head_dim))
        return x if norm is None else norm(x)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        empty = torch.empty(batch_size, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        window = KeyValueState(empty, empty.clone(), self.pattern.reach, self.pattern.num_sinks)
        if self.global_token_ids is None:
            return window
        return WindowAndGlobalState(window, GlobalTokensState(empty.clone()))

    def state_bytes(self, batch: int, length: int) -> int:
        """As Mixer.state_bytes, of a text without global tokens."""
        if self.pattern.reach is not None:
            length = min(length, self.pattern.reach - 1 + self.pattern.num_sinks)
        keys_and_values = 2 * self.num_kv_heads * self.head_dim * self.o_proj.weight.dtype.itemsize
        seen = 0 if self.global_token_ids is None else 8
        return batch * (length * (keys_and_values + 1) + seen)  # and a byte of mask

    def flops(self, batch: int, length: int) -> int:
        """As Part.flops, of a text without global tokens."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj)
        weights = sum(p.weight.numel() for p in projections if p is not None)
        # Towards sinks whose positions are the cache's, q and k are twice as wide.
        products = 2 if self.config.sink_positions == "text" else 3
        visible = self.pattern.visible_pairs(length)
        return 2 * batch * (length * weights + products * visible * self.num_heads * self.head_dim)


def visible_pairs(length: int, window: int | None, num_sinks: int) -> int:
    """How many (query, key) pairs causal attention touches over `length` tokens."""
    return Pattern(window, num_sinks).visible_pairs(length)
