"""How the tests build and run a subject."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import zoo
from tests.conformance.subjects import HIDDEN_SIZE, PAIRS, SUBJECTS
from zoo.blocks import Mixer, SequenceContext, State
from zoo.models import ZooCache, ZooModel


def build(subject: str, dtype: torch.dtype = torch.float64) -> ZooModel:
    """The decoder of `subject` (or pair), all that is saved moved at random from where it starts (zeros and ones hide
    mistakes).

    In float64 the rates and decays are float64 too, so that what a comparison shows is not their rounding.
    """
    torch.manual_seed(0)
    model = zoo.build((SUBJECTS | PAIRS)[subject]).model.eval()
    for tensor in model.state_dict().values():
        tensor += 0.2 * torch.randn_like(tensor)
    model = model.to(dtype)
    if dtype == torch.float64:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.double()
    return model


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Random embeddings `[batch, length, hidden]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, HIDDEN_SIZE, dtype=dtype, generator=generator)


def token_ids(x: Tensor) -> Tensor:
    """An id for each embedding, for mixers that ask: a fifth are 0 or 1, which are global, the others 2."""
    return (x[..., 0] < 0.8).long() + (x[..., 0] < 1.2).long()


def context_of(x: Tensor) -> SequenceContext:
    """The context of a mixer or layer that is run by itself."""
    return SequenceContext.of(x, token_ids=token_ids(x))


def given(model: ZooModel, x: Tensor) -> dict[str, Tensor | None]:
    """What a model takes embeddings as."""
    return {"inputs_embeds": x, "input_ids": token_ids(x) if model.reads_token_ids else None}


def mix(mixer: Mixer, x: Tensor, context: SequenceContext, state: State | None = None) -> Tensor:
    """A mixer by itself; one that reads the embeddings beside the stream gets x for both."""
    return mixer(torch.cat([x, x], -1) if mixer.reads_embeddings else x, context, state)


def forward(model: ZooModel, x: Tensor, **arguments: object) -> Tensor:
    """The last hidden state of embeddings `x`."""
    return model(**given(model, x), **arguments).last_hidden_state


def chunked(
    model: ZooModel, x: Tensor, sizes: list[int], cache: ZooCache | None = None, mask: Tensor | None = None
) -> Tensor:
    """`forward`, a chunk at a time through a cache."""
    assert sum(sizes) == x.shape[1]
    cache = cache or model.new_cache(x.shape[0], x.device, x.dtype)
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    parts = zip(x.split(sizes, 1), masks, strict=True)
    return torch.cat([forward(model, part, past_key_values=cache, attention_mask=m) for part, m in parts], 1)


def gradients(model: ZooModel, loss: Tensor, x: Tensor | None = None) -> dict[str, Tensor | None]:
    """Gradients of `loss` by name: of the input `x`, where given, and of every parameter the layers use."""
    named = {name: p for name, p in model.named_parameters() if not name.startswith("embed_tokens")}
    if x is not None:
        named["input"] = x
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def probe(out: Tensor, seed: int = 2) -> Tensor:
    """A scalar that every element of `out` enters with its own weight."""
    generator = torch.Generator().manual_seed(seed)
    return (out * torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)).sum()


def fork(cache: ZooCache) -> ZooCache:
    """A copy that shares nothing."""
    return copy.deepcopy(cache)
