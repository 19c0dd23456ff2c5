"""Generation without end: the tokens of a text one by one, in memory that does not grow.

For models whose every state is bounded: windows (with sinks), recurrences. generate() of transformers keeps the whole
text and stops at a length; this keeps the states alone. Beyond their window, sinks are seen at the distance they have
in the cache (`sink_positions: cache` of attention, StreamingLLM, arXiv:2309.17453, section 3.2), so that no query meets
a distance it was not trained on. Rotary angles are float32: at position p they are off by about p * 6e-8.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.attention import Attention, AttentionConfig
from zoo.blocks.base import Mixer, MixerConfig
from zoo.blocks.fla import Fla
from zoo.blocks.linear_mixer import LinearMixer
from zoo.models.modeling import ZooForCausalLM
from zoo.schema import FieldError

CHUNK = 512  # tokens of the prompt at once
FAR = 2**40  # tokens, and a multiple of it


def obstacle(model: ZooForCausalLM) -> str | None:
    """Why `model` cannot run for ever at constant memory, or None."""
    for i, layer in enumerate(model.model.layers):
        for part in layer.modules():
            if isinstance(part, Fla):
                return f"what layer {i} (fla) keeps is not known to the zoo; it needs a mixer of the zoo's own there"
            if isinstance(part, LinearMixer) and part.config.max_length is not None:
                longest = part.config.max_length
                return f"layer {i} (linear, cosformer) is for {longest} tokens; it needs elu or relu there"
        if layer.mixer is not None and layer.mixer.reads_token_ids:
            return (
                f"layer {i} keeps the global tokens of the whole text; it needs num_sinks in place of global_token_ids"
            )
        if layer.mixer is not None and _grows(layer.mixer, model.config.layers[i].mixer.config):
            kind = model.config.layers[i].mixer.kind
            return f"the state of layer {i} ({kind}) grows with the text; it needs a window or a recurrent mixer there"
    if model.model.switches:
        return "longrope turns all tokens otherwise beyond its original context; it needs another rope"
    return None


def _grows(mixer: Mixer, config: MixerConfig) -> bool:
    """Whether its state has more bytes after twice as long a text. As it may go up and down, within a segment say, both
    lengths are such that every number of its configuration divides them."""
    far = FAR * math.prod(_numbers(dataclasses.asdict(config)))
    return mixer.state_bytes(1, 2 * far) != mixer.state_bytes(1, far)


def _numbers(value: Any) -> Iterator[int]:
    """All whole numbers above 0 in it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int) and value > 0:
        yield int(value)


@torch.inference_mode()
def stream(model: ZooForCausalLM, input_ids: Tensor, choose: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The tokens that follow `input_ids` `[1, length]`, each `[1, 1]`, without end.

    Args:
        choose: the next token `[1, 1]` from logits `[1, vocab]`.

    Raises:
        ValueError: the model's state grows.
    """
    if (problem := obstacle(model)) is not None:
        raise ValueError(problem)
    with _sinks_as_in_the_cache(model):
        cache = model.model.new_cache(1, input_ids.device, model.dtype)
        for part in input_ids.split(CHUNK, 1):
            logits = model(part, past_key_values=cache, logits_to_keep=1).logits
        while True:
            token = choose(logits[:, -1])
            yield token
            logits = model(token, past_key_values=cache, logits_to_keep=1).logits


@contextmanager
def _sinks_as_in_the_cache(model: ZooForCausalLM) -> Iterator[None]:
    """Inside, attention with sinks has `sink_positions: cache` where it can."""
    before: dict[Attention, AttentionConfig] = {}
    for module in model.modules():
        if isinstance(module, Attention) and module.config.num_sinks:
            config = dataclasses.replace(module.config, sink_positions="cache")
            with suppress(FieldError):
                config.check_sink_positions()
                before[module], module.config = module.config, config
    try:
        yield
    finally:
        for module, config in before.items():
            module.config = config
