"""What docs/families.md says of each configuration: ours against transformers, and transformers against itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import zoo
from tests.models.families.parity import ids, random_model, theirs
from tests.models.families.published import Size
from tests.ops.helpers import relative_error
from zoo.models.families import FAMILIES
from zoo.models.families.convert import family_of

PADDING = 5
CHUNKS = (7, 8, 6)


def full(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def padded(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The first row, without its first tokens and padded at the left instead, beside a whole one."""
    mask = torch.ones_like(tokens)
    mask[0, :PADDING] = 0
    given = {"attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return model(tokens.where(mask.bool(), 0), **given).logits[:1, PADDING:]


def in_pieces(model: PreTrainedModel, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Logits of one piece after the other, each continuing from the cache."""
    parameters = inspect.signature(model.forward).parameters
    takes_positions = "position_ids" in parameters
    name = "past_key_values" if "past_key_values" in parameters else "cache_params"
    cache: dict[str, Any] = {}
    if model.config.model_type == "recurrent_gemma":  # does not hand out its cache
        cache["past_key_values"] = DynamicCache(config=model.config)
    logits, position = [], 0
    for piece in tokens.split(sizes, dim=1):
        given = dict(cache)
        if takes_positions:
            given["position_ids"] = torch.arange(position, position + piece.shape[1])[None].expand(len(piece), -1)
        out = model(piece, use_cache=True, **given)
        cache = cache if model.config.model_type == "recurrent_gemma" else {name: getattr(out, name)}
        logits.append(out.logits)
        position += piece.shape[1]
    return torch.cat(logits, 1)


def cached(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """A prompt, then a token at a time."""
    prompt = sum(CHUNKS[:1])
    return in_pieces(model, tokens, [prompt] + [1] * (tokens.shape[1] - prompt))


def chunked(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """A prompt in several chunks."""
    return in_pieces(model, tokens, list(CHUNKS))


WAYS: dict[str, Callable[[PreTrainedModel, Tensor], Tensor]] = {
    "full": full,
    "padded": padded,
    "cached": cached,
    "chunked": chunked,
}


def expected(net: PreTrainedModel, tokens: Tensor, way: str) -> Tensor:
    """What a way of running should give: transformers' full forward, of the row alone where it was padded."""
    return full(net, tokens[:1, PADDING:]) if way == "padded" else full(net, tokens)


@torch.no_grad()
def errors(net: PreTrainedModel, model: PreTrainedModel) -> dict[str, float | str]:
    """Relative errors of `model`'s logits by way of running it, or what it raises; `net` is transformers'."""
    tokens = ids(net, length=sum(CHUNKS))
    found: dict[str, float | str] = {}
    for way, run in WAYS.items():
        try:
            found[way] = relative_error(run(model, tokens), expected(net, tokens, way))
        except Exception as error:  # whatever transformers' own code raises
            found[way] = type(error).__name__
    return found


def training(net: PreTrainedModel, ours: PreTrainedModel) -> dict[str, float]:
    """Relative errors of the loss and, at worst, of a tensor's gradient; every tensor of transformers' is compared."""
    tokens, family = ids(net), FAMILIES[net.config.model_type]
    net.zero_grad()
    out, mine = net(tokens, labels=tokens, use_cache=False), ours(tokens, labels=tokens)
    out.loss.backward(), mine.loss.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    parameters, worst = dict(ours.named_parameters()), 0.0
    for pair in family.pairs(ours.config, parameters):
        form = pair.layouts[-1]
        parts = form.split([parameters[name].grad for name in pair.ours])
        for name, part in zip(form.names(), parts, strict=True):
            worst = max(worst, relative_error(part, gradients.pop(name)))
    assert not gradients, gradients.keys()
    return {"loss": relative_error(mine.loss, out.loss), "gradients": worst}


@torch.no_grad()
def real_widths(size: Size) -> dict[str, Any]:
    """One layer of each kind of a published size: how many, parameters, and logit errors against transformers."""
    config = size.one_of_each()
    net = random_model(family_of(config, {"minimax_text_01": "minimax"}.get(size.family, size.family))[1], 0.01)
    ours = zoo.from_hf(net)
    tokens = ids(net, 1, sum(CHUNKS))
    expected = full(net, tokens)
    found = {way: relative_error(WAYS[way](ours, tokens), expected) for way in ("full", "cached")}
    return {"layers": len(config.layers), "parameters": ours.num_params()} | found


def case(family: str, index: int) -> dict[str, Any]:
    """All of one configuration: `ours` and `theirs`, each against transformers' full forward."""
    net = theirs(family, index)
    ours = zoo.from_hf(net)
    return {"theirs": errors(net, net), "ours": errors(net, ours) | training(net, ours.double())}
