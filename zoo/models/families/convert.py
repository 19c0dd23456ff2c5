"""Models of transformers in and out: `from_hf` and `to_hf`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from zoo.config import ZooConfig, load_config
from zoo.models.build import build
from zoo.models.families import FAMILIES
from zoo.models.families.base import Family, FamilyError, Form, Pair, Same
from zoo.models.families.checkpoint import Checkpoint, Renamed, family_named
from zoo.models.hybridize import hybridize, replaced
from zoo.models.modeling import ZooForCausalLM

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LISTED = 5  # names in an error message


def from_hf(
    source: PreTrainedModel | str | Path, *, overrides: Iterable[str] = (), replace: Iterable[str] = ()
) -> ZooForCausalLM:
    """A model of transformers as ours: the same numbers, in the dtype of its weights (rates and decays in float32).

    Args:
        source: a causal language model, or the folder of one: config.json and safetensors. Nothing in it is run.
        overrides: changes of the model file, as `load_config` takes them: `blocks.softmax.mixer.rope.rotary_dim=64`.
        replace: layers that get another mixer, as `zoo.models.hybridize` reads them: `softmax@1,3,5=lightning`.

    Raises:
        FamilyError: an architecture or an option that ours does not have; files that are missing or broken; tensors
            that are missing, left over, or of another shape.
        ConfigError: an override or a replacement that does not fit.
    """
    if isinstance(source, PreTrainedModel):
        return _fill(*read_model(source.config, source.state_dict(), overrides, replace))
    with Checkpoint(Path(source)) as checkpoint:
        return _fill(*read_model(checkpoint.config, checkpoint, overrides, replace))


def to_hf(model: ZooForCausalLM, family: str | None = None) -> PreTrainedModel:
    """Our model as its family's own class in transformers, with copies of the weights.

    Args:
        family: as which, by its model_type, where several have such a model (Mistral without a window is a Llama);
            by default the first of FAMILIES.

    Raises:
        FamilyError: no family has such a model, or not this one.
    """
    found, config = family_of(model.config, family)
    model_class = getattr(transformers, found.model_class, None)
    if model_class is None:
        raise FamilyError(f"it is a {found.model_type}, which is not in transformers; `zoo export` writes its files")
    theirs = model_class(config).to(model.dtype)
    places, ours = saved_tensors(theirs), saved_tensors(model)
    given = set()
    for pair in found.pairs(model.config, ours):
        form = pair.layouts[-1]
        parts = form.split([ours[name].detach() for name in pair.ours])
        for name, part in zip(form.names(), parts, strict=True):
            places[name].data = as_exported(part, model.dtype).clone()
            given.add(name)
    not_given = {name for name in set(places) - given if found.is_read(name, model.config)}
    assert not not_given, f"not given: {not_given}"
    return theirs.train(model.training)


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds: parameters, and buffers that were learned. A tied head is the embedding and
    not among them."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in own}


def family_of(model: ZooConfig, name: str | None = None) -> tuple[Family, PreTrainedConfig]:
    """The family that has this model, the first or the one asked for, and its configuration there.

    Raises:
        FamilyError: none has, with what stands in the way of the nearest; or not the one asked for.
    """
    if name is not None:
        family = family_named(name, "family")
        return family, family.config(model)
    reasons = {}
    for family in FAMILIES.values():
        try:
            return family, family.config(model)
        except FamilyError as error:
            reasons[family.model_type] = str(error)
    kinds = [part.kind for layer in model.layers for part in (layer.mixer, layer.ffn) if part.kind != "none"]
    # The one that has most of its layers, and little else.
    near = max(FAMILIES.values(), key=lambda each: (sum(kind in each.blocks for kind in kinds), -len(each.blocks)))
    raise FamilyError(f"no family of transformers has this model; of the nearest, it {reasons[near.model_type]}")


def as_exported(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the model's dtype, unless that would lose bits: rates and decays are float32 here whatever they came in."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def read_model(
    config: PreTrainedConfig, tensors: Mapping[str, Tensor], overrides: Iterable[str] = (), replace: Iterable[str] = ()
) -> tuple[ZooForCausalLM, Iterator[tuple[str, Tensor]]]:
    """Our model of a checkpoint, on the meta device, and its tensors by name, made one layer at a time.

    Raises:
        as from_hf; of the tensors, while they are iterated over.
    """
    family = None if isinstance(config, ZooConfig) else family_named(config.model_type, type(config).__name__)
    ours = config if family is None else family.model_file(config)
    assert isinstance(ours, ZooConfig)
    before = load_config(ours.to_mapping(), overrides)
    if family is not None:
        tensors = Renamed(tensors, family.present)
    dtype = _dtype(family, before, tensors)
    model = build(before, device="meta", dtype=dtype)
    hybrid = hybridize(before, replace)
    if not hybrid.replaced:
        return model, whole(model, converted(family, model, tensors))
    after = build(hybrid.config, device="meta", dtype=dtype)
    return after, whole(after, replaced(hybrid, converted(family, model, tensors), dtype))


def whole(model: ZooForCausalLM, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they come; at the end they must have been all of the model's, each of its shape.

    Raises:
        FamilyError: they were not.
    """
    due = {name: tensor.shape for name, tensor in saved_tensors(model).items()}
    for name, tensor in tensors:
        if due.pop(name, None) != tensor.shape:
            raise FamilyError(f"{name} {list(tensor.shape)} has no place in the model that was to be read")
        yield name, tensor
    if due:
        raise FamilyError(f"nothing gave {_some(sorted(due))}")


def _fill(model: ZooForCausalLM, tensors: Iterator[tuple[str, Tensor]]) -> ZooForCausalLM:
    found = {name: tensor.clone() for name, tensor in tensors}  # they may be views of the source
    model.to_empty(device=next(iter(found.values())).device)
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            module.reset_parameters()
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def converted(
    family: Family | None, model: ZooForCausalLM, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, one after the other, of theirs (of ours where there is no family); `model` may be on the
    meta device.

    Raises:
        FamilyError: tensors that are missing, left over (both before the first is read), or of another shape.
    """
    ours = saved_tensors(model)
    left = {name for name in tensors if family is None or family.is_read(name, model.config)}
    if model.config.tie_word_embeddings and "lm_head.weight" in left:
        left.discard("lm_head.weight")
        (embedding,) = _pairs(family, model.config, ["model.embed_tokens.weight"])
        given = next((each.names()[0] for each in embedding.layouts if each.names()[0] in tensors), "lm_head.weight")
        if not torch.equal(tensors["lm_head.weight"], tensors[given]):
            raise FamilyError("lm_head.weight is not the embedding, which tie_word_embeddings says it is; "
                              "set that to false in config.json")  # fmt: skip
    plan, missing = [], []
    for pair in _pairs(family, model.config, ours):
        form = next((form for form in pair.layouts if all(name in tensors for name in form.names())), None)
        if form is None:
            missing += [name for name in pair.layouts[0].names() if name not in tensors]
        else:
            plan.append((pair, form))
            left.difference_update(form.names())
    if missing:
        raise FamilyError(f"missing tensors: {_some(missing)}")
    if left:
        raise FamilyError(f"tensors that nothing here reads: {_some(sorted(left))}")
    for pair, form in plan:
        # Nothing of a pair is held while the next one is made.
        yield from zip(pair.ours, _joined(form, tensors, [ours[name] for name in pair.ours]), strict=True)


def _joined(form: Form, tensors: Mapping[str, Tensor], ours: list[Tensor]) -> list[Tensor]:
    """Ours, in the dtypes and shapes of `ours`, of theirs."""
    theirs = [tensors[name] for name in form.names()]
    for name, tensor in zip(form.names(), theirs, strict=True):
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise FamilyError(f"{name} is {dtype}; supported are float32, bfloat16, float16 and float64")
    shapes = [tensor.shape for tensor in ours]
    try:
        joined = form.join(theirs, shapes)
        fits = [tensor.shape for tensor in joined] == shapes
    except (RuntimeError, ValueError):
        fits = False
    if not fits:
        found = ", ".join(str(list(tensor.shape)) for tensor in theirs)
        raise FamilyError(f"{form.names()[0]}: is {found}, the configuration says {_expected(form, shapes)}")
    result = []
    for mine, tensor in zip(ours, joined, strict=True):
        narrow = tensor.to(mine.dtype)
        if narrow.dtype.itemsize < tensor.dtype.itemsize and not torch.equal(narrow.to(tensor.dtype), tensor):
            dtypes = [str(each.dtype).removeprefix("torch.") for each in (tensor, mine)]
            warnings.warn(f"{form.names()[0]} is rounded from {dtypes[0]} to {dtypes[1]}, the model's", stacklevel=2)
        result.append(narrow)
    return result


def _expected(form: Form, shapes: list[torch.Size]) -> str:
    """Shapes of theirs for such tensors of ours."""
    theirs = form.split([torch.empty(shape, device="meta") for shape in shapes])
    return ", ".join(str(list(tensor.shape)) for tensor in theirs)


def _dtype(family: Family | None, model: ZooConfig, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Of the embedding: what else there is may be in float32 on purpose."""
    (pair,) = _pairs(family, model, ["model.embed_tokens.weight"])
    for form in pair.layouts:
        for name in form.names():
            if name in tensors and tensors[name].dtype in FLOATS:
                return tensors[name].dtype
    raise FamilyError(f"missing tensors: {pair.layouts[0].names()[0]}")


def _pairs(family: Family | None, model: ZooConfig, names: Iterable[str]) -> list[Pair]:
    return [Pair((name,), [Same(name)]) for name in names] if family is None else family.pairs(model, names)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
