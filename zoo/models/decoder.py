"""One layer of the model: a mixer and a feed-forward, joined to the residual stream by the block's rule."""

from __future__ import annotations

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from zoo.blocks import FeedForward, Mixer, RouterStatistics, SequenceContext, State
from zoo.blocks.norm import Norm
from zoo.blocks.residual import Sublayer
from zoo.config import Layer, ZooConfig


class DecoderLayer(GradientCheckpointingLayer):
    """`mixer` or `ffn` is None where the block has `kind: none`."""

    def __init__(self, layer: Layer, config: ZooConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual = layer.residual

        def norm(present: bool) -> Norm | None:
            return Norm(config.hidden_size, layer.norm) if present else None

        self.mixer: Mixer | None = None
        if layer.mixer.kind != "none":
            self.mixer = layer.mixer.build(config, layer_idx)
        self.mixer_norm = norm(self.mixer is not None)
        self.mixer_second_norm = norm(self.mixer is not None and layer.residual.has_second_norm)
        self.ffn: FeedForward | None = None
        if layer.ffn.kind != "none":
            self.ffn = layer.ffn.build(config, layer_idx)
        self.ffn_norm = norm(self.ffn is not None)
        self.ffn_second_norm = norm(self.ffn is not None and layer.residual.has_second_norm)

    def forward(self, x: Tensor, context: SequenceContext, state: State | None = None) -> tuple[Tensor, ...]:
        """`x` `[batch, length, hidden]` through the layer, then the fields of RouterStatistics where there is a router:
        one flat tuple, as reentrant gradient checkpointing loses the gradients of anything nested."""
        if context.real_tokens is not None and context.real_tokens.numel() == 0:
            return (x,)  # a chunk of nothing but padding: no token to mix, and no state to move
        statistics: RouterStatistics | None = None
        sublayers = []
        if (mixer := self.mixer) is not None:
            if state is not None:
                state.to(x.device)  # it may have been offloaded
            sublayers.append(
                Sublayer(True, self.mixer_norm, lambda h: mixer(h, context, state), self.mixer_second_norm)
            )
        if (ffn := self.ffn) is not None:

            def feed_forward(h: Tensor) -> Tensor:
                nonlocal statistics
                y, statistics = ffn(h, context)
                return y

            sublayers.append(Sublayer(False, self.ffn_norm, feed_forward, self.ffn_second_norm))
        return self.residual(x, sublayers), *(statistics or ())
