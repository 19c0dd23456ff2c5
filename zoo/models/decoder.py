"""One layer of the model: a mixer and a feed-forward, joined to the residual stream by the block's rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from zoo.blocks import FeedForward, Mixer, RouterStatistics, SequenceContext, State
from zoo.blocks.linear import Linear, out_projection_std
from zoo.blocks.norm import Norm
from zoo.blocks.residual import Function, Sublayer
from zoo.blocks.shared import adapters, lent, make_adaptable
from zoo.config import Layer, ZooConfig
from zoo.ops.matmul import linear


class Block(nn.Module):
    """`mixer` or `ffn` is None where the block has `kind: none`."""

    def __init__(self, layer: Layer, config: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual = layer.residual

        def norm(present: bool, size: int = config.hidden_size) -> Norm | None:
            return Norm(size, layer.norm) if present else None

        self.mixer: Mixer | None = None
        width = config.hidden_size
        if layer.mixer.kind != "none":
            self.mixer = mixer = layer.mixer.build(config, layer_idx)
            width *= 2 if mixer.reads_embeddings else 1
        self.mixer_norm = norm(self.mixer is not None, width)
        self.mixer_second_norm = norm(self.mixer is not None and layer.residual.has_second_norm)
        self.ffn: FeedForward | None = None
        if layer.ffn.kind != "none":
            self.ffn = layer.ffn.build(config, layer_idx)
        self.ffn_norm = norm(self.ffn is not None)
        self.ffn_second_norm = norm(self.ffn is not None and layer.residual.has_second_norm)
        self.register_parameter("out_proj", None)  # lent by a depth of a shared block

    def forward(
        self,
        x: Tensor,
        context: SequenceContext,
        state: State | None = None,
        embeddings: Tensor | None = None,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`x` `[batch, length, hidden]` through the layer, then the fields of RouterStatistics where there is a router:
        one flat tuple, as reentrant gradient checkpointing loses the gradients of anything nested.

        `embeddings` is what the first layer was given and `earlier` what the layer below was given; each by default x.
        """
        if context.real_tokens is not None and context.real_tokens.numel() == 0:
            return (x,)  # a chunk of nothing but padding: no token to mix, and no state to move
        statistics: RouterStatistics | None = None
        sublayers = []
        if (mixer := self.mixer) is not None:
            if state is not None:
                state.to(x.device)  # it may have been offloaded
            norm = self._norm_beside(embeddings) if mixer.reads_embeddings else self.mixer_norm
            sublayers.append(Sublayer(True, norm, lambda h: mixer(h, context, state), self.mixer_second_norm))
        if (ffn := self.ffn) is not None:

            def feed_forward(h: Tensor) -> Tensor:
                nonlocal statistics
                y, statistics = ffn(h, context)
                return y

            sublayers.append(Sublayer(False, self.ffn_norm, feed_forward, self.ffn_second_norm))
        if (weight := self.out_proj) is not None:
            last = sublayers[-1]
            sublayers[-1] = last._replace(f=lambda h: linear(last.f(h), weight))
        return self.residual(x, sublayers, earlier), *(statistics or ())

    def _norm_beside(self, embeddings: Tensor | None) -> Function:
        """The mixer's norm of the stream beside the embeddings."""
        return lambda x: self.mixer_norm(torch.cat([x, x if embeddings is None else embeddings], -1))

    def flops(self, batch: int, length: int) -> int:
        """Matrix-multiply FLOPs of one forward pass."""
        return sum(part.flops(batch, length) for part in (self.mixer, self.ffn) if part is not None)


class DecoderLayer(GradientCheckpointingLayer, Block):
    """A layer with weights of its own."""


class SharedLayer(GradientCheckpointingLayer):
    """A depth at which a shared block is used: what is this depth's own (shared.py). It lends that to the block for
    each call; the model owns the block, so that its weights are there once, to count, to save and to shard."""

    def __init__(self, block: Block, layer: Layer, config: ZooConfig) -> None:
        super().__init__()
        assert layer.shared is not None
        self._block = (block,)  # a tuple hides it: not a submodule
        self.residual = layer.residual
        ranks = {"mixer": layer.shared.mixer_adapter, "ffn": layer.shared.ffn_adapter}
        self.adapters = nn.ModuleDict(
            {role: adapters(getattr(block, role), rank, config) for role, rank in ranks.items() if rank is not None}
        )
        hidden = config.hidden_size
        self.out_proj = Linear(hidden, hidden, std=out_projection_std(config)) if layer.shared.out_proj else None

    @property
    def mixer(self) -> Mixer | None:
        return self._block[0].mixer

    @property
    def ffn(self) -> FeedForward | None:
        return self._block[0].ffn

    def forward(
        self,
        x: Tensor,
        context: SequenceContext,
        state: State | None = None,
        embeddings: Tensor | None = None,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """As Block.forward."""
        own = {} if self.out_proj is None else {"out_proj": self.out_proj.weight}
        for role, modules in self.adapters.items():
            tensors = lent(getattr(self, role), modules)
            own |= {f"{role}.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self._block[0], own, (x, context, state, embeddings, earlier))

    def flops(self, batch: int, length: int) -> int:
        """As Block.flops."""
        own = 0 if self.out_proj is None else 2 * self.out_proj.weight.numel()
        own += sum(adapter.flops() for modules in self.adapters.values() for adapter in modules.values())
        return self._block[0].flops(batch, length) + batch * length * own


def build_layer(
    layer: Layer, config: ZooConfig, layer_idx: int, blocks: dict[str, Block]
) -> DecoderLayer | SharedLayer:
    """One layer of the pattern. `blocks` holds the shared ones by name, and takes one that is used for the first time,
    which then is as it would be at this depth."""
    if layer.shared is None:
        return DecoderLayer(layer, config, layer_idx)
    if layer.name not in blocks:
        block = blocks[layer.name] = Block(layer, config, layer_idx)
        for part, rank in ((block.mixer, layer.shared.mixer_adapter), (block.ffn, layer.shared.ffn_adapter)):
            if part is not None and rank is not None:
                make_adaptable(part)
    return SharedLayer(blocks[layer.name], layer, config)
