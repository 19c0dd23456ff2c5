"""What a model costs: parameters, FLOPs, state bytes and training memory, without the memory to hold it.

Each block is built once as fake tensors (shapes without data) whatever the number of layers, so a model of hundreds of
billions of parameters takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo.blocks import SequenceContext
from zoo.blocks.norm import Norm
from zoo.config import Layer, ZooConfig
from zoo.models.decoder import Block, build_layer

PROBE_TOKENS = 1024  # saved activations are proportional to the tokens; measured at this many
OPTIMIZER_BYTES = 8  # AdamW's two running averages, float32


@dataclass(frozen=True)
class Cost:
    """Costs of one layer, or of several together.

    params            parameters.
    active_params     parameters that one token passes through.
    flops             matrix-multiply FLOPs of a forward pass over one sequence.
    state_bytes       bytes of the state behind that sequence, keys and values in bfloat16.
    activation_bytes  bytes that a training step in float32 keeps for the backward pass, for each token.
    """

    params: int
    active_params: int
    flops: int
    state_bytes: int
    activation_bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in Cost.__match_args__))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, name) * times for name in Cost.__match_args__))


@dataclass(frozen=True)
class Run:
    """Layers `first` to `last` (counted from 0), all of the same block."""

    first: int
    last: int
    layer: Layer

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    @property
    def key(self) -> str:
        """The block's name; with the layer's number where its cost depends on that."""
        return f"{self.layer.name} {self.first}" if self.layer.mixer.config.varies_with_depth else self.layer.name


@dataclass(frozen=True)
class Summary:
    """Costs of a model: `blocks` by Run.key (one layer each), `shared` for the weights that all layers of a block share
    (and that `blocks` leaves out), `ends` for embedding, final norm and output head."""

    config: ZooConfig
    length: int
    blocks: dict[str, Cost]
    shared: dict[str, Cost]
    ends: Cost

    @property
    def total(self) -> Cost:
        layers = (self.blocks[run.key] * run.count for run in runs(self.config.layers))
        return sum((*layers, *self.shared.values()), self.ends)

    def training_bytes(self, batch: int) -> dict[str, int]:
        """Bytes that a training step over `[batch, length]` tokens holds, by what they hold: float32, AdamW, no
        gradient checkpointing. Not counted are the temporaries of single operations."""
        total = self.total
        return {
            "weights": 4 * total.params,
            "gradients": 4 * total.params,
            "optimizer": OPTIMIZER_BYTES * total.params,
            "activations": int(total.activation_bytes * batch * self.length),
        }


def runs(layers: tuple[Layer, ...]) -> Iterator[Run]:
    """The layers, with consecutive ones of the same block as one run, unless their cost depends on their depth."""
    first = 0
    named = (
        (f"{layer.name} {i}" if layer.mixer.config.varies_with_depth else layer.name, layer)
        for i, layer in enumerate(layers)
    )
    for _, group in groupby(named, key=lambda pair: pair[0]):
        members = [layer for _, layer in group]
        yield Run(first, first + len(members) - 1, members[0])
        first += len(members)


def summarize(config: ZooConfig, length: int) -> Summary:
    """Costs of the model for sequences of `length` tokens.

    Raises:
        OverflowError: a tensor would hold more bytes than 64 bits can count.
    """
    firsts = {run.key: run for run in reversed(list(runs(config.layers)))}
    stream = config.stream_length(length)
    try:
        costs = {key: _block_cost(run.layer, config, stream, run.first) for key, run in firsts.items()}
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise OverflowError("a tensor would hold more bytes than 64 bits can count") from None
    with torch.device("meta"):
        norm = sum(p.numel() for p in Norm(config.hidden_size, config.norm_config).parameters())
    matrix = config.vocab_size * config.hidden_size
    params = norm + (matrix if config.tie_word_embeddings else 2 * matrix)
    params += 0 if config.landmark_block is None else config.hidden_size
    # Kept for the backward pass: the last layer's output, the final norm's output, and its gradient.
    blocks = {key: layer for key, (layer, _) in costs.items()}
    shared = {firsts[key].layer.name: weights for key, (_, weights) in costs.items() if weights is not None}
    ends = Cost(params, params, 2 * length * matrix, 0, 3 * 4 * config.hidden_size)
    return Summary(config, length, blocks, shared, ends)


def _block_cost(layer: Layer, config: ZooConfig, length: int, layer_idx: int) -> tuple[Cost, Cost | None]:
    """Of one layer, and of what it shares with the others of its block."""
    blocks: dict[str, Block] = {}
    with FakeTensorMode():
        module = build_layer(layer, config, layer_idx, blocks)
        saved_bytes = _saved_bytes(module, [module, *blocks.values()], config.hidden_size)
    with torch.device("meta"):
        module = build_layer(layer, config, layer_idx, blocks := {}).to(torch.bfloat16)
    for block in blocks.values():
        block.to(torch.bfloat16)
    parts = [part for part in (module.mixer, module.ffn) if part is not None]
    idle = sum(part.num_params() - part.num_active_params() for part in parts)
    own, common = (
        sum(parameter.numel() for part in parts for parameter in part.parameters())
        for parts in ([module], blocks.values())
    )
    cost = Cost(
        params=own,
        active_params=own if blocks else own - idle,
        flops=module.flops(1, length),
        state_bytes=module.mixer.state_bytes(1, length) if module.mixer is not None else 0,
        activation_bytes=saved_bytes * config.stream_length(PROBE_TOKENS) / PROBE_TOKENS**2,
    )
    return cost, Cost(common, common - idle, 0, 0, 0) if blocks else None


def _saved_bytes(module: nn.Module, owners: list[nn.Module], hidden_size: int) -> int:
    """Bytes that autograd keeps of a forward pass over PROBE_TOKENS tokens, without the weights, all of `owners`."""
    weights = {parameter.untyped_storage()._cdata for owner in owners for parameter in owner.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later storage takes its address
        return tensor

    x = torch.empty(1, PROBE_TOKENS, hidden_size, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x, SequenceContext.of(x, token_ids=torch.zeros(x.shape[:2], dtype=torch.long)))
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
