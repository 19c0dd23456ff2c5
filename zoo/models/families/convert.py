"""Models of transformers in and out: `from_hf` and `to_hf`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from zoo.config import ZooConfig
from zoo.models.build import build
from zoo.models.families import FAMILIES
from zoo.models.families.base import Family, FamilyError, Form
from zoo.models.modeling import ZooForCausalLM
from zoo.schema import nearest

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LISTED = 5  # names in an error message


def from_hf(source: PreTrainedModel | str | Path) -> ZooForCausalLM:
    """A model of transformers as ours: the same numbers, in the dtype of its weights (rates and decays in float32).

    Args:
        source: a causal language model, or the folder of one: config.json and safetensors. Nothing in it is run.

    Raises:
        FamilyError: an architecture or an option that ours does not have; files that are missing or broken; tensors
            that are missing, left over, or of another shape.
    """
    if isinstance(source, PreTrainedModel):
        return _load(source.config, source.state_dict())
    with Checkpoint(Path(source)) as checkpoint:
        return _load(checkpoint.config, checkpoint)


def to_hf(model: ZooForCausalLM) -> PreTrainedModel:
    """Our model as its family's own class in transformers, with copies of the weights.

    Raises:
        FamilyError: no family has such a model.
    """
    family, config = family_of(model.config)
    theirs = getattr(transformers, family.model_class)(config).to(model.dtype)
    places, ours = saved_tensors(theirs), saved_tensors(model)
    given = set()
    for pair in family.pairs(model.config, ours):
        form = pair.layouts[-1]
        parts = form.split([ours[name].detach() for name in pair.ours])
        for name, part in zip(form.names(), parts, strict=True):
            places[name].data = as_exported(part, model.dtype).clone()
            given.add(name)
    not_given = {name for name in set(places) - given if family.is_read(name, model.config)}
    assert not not_given, f"not given: {not_given}"
    return theirs.train(model.training)


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds: parameters, and buffers that were learned. A tied head is the embedding and
    not among them."""
    saved = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: each for name, each in model.named_buffers() if name in saved}


def family_of(model: ZooConfig) -> tuple[Family, PreTrainedConfig]:
    """The family that has this model, and its configuration there.

    Raises:
        FamilyError: none has; with what stands in the way of each.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            return family, family.config(model)
        except FamilyError as error:
            reasons.append(str(error))
    raise FamilyError("no family of transformers has this model: " + "; ".join(reasons))


def as_exported(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the model's dtype, unless that would lose bits: rates and decays are float32 here whatever they came in."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise FamilyError(f"{folder}: has no config.json; give the folder of a transformers checkpoint")
        self.config = read_config(folder / "config.json")
        self.files: dict[str, Any] = {}
        self.place = self._index()

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FamilyError(f"{index}: is no index of shards: {error!r}") from None
        if not (self.folder / SINGLE).is_file():
            others = sorted(f.name for f in self.folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f"; {others[0]} is a pickle and is not read: convert it to safetensors" if others else ""
            raise FamilyError(f"{self.folder}: has neither {SINGLE} nor {INDEX}{hint}")
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, file: str) -> Any:
        if file not in self.files:
            try:
                self.files[file] = safe_open(self.folder / file, framework="pt")
            except Exception as error:  # safetensors raises its own, OSError and others
                raise FamilyError(f"{self.folder / file}: cannot be read: {error}") from None
        return self.files[file]

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._open(self.place[name]).get_tensor(name)
        except FamilyError:
            raise
        except Exception as error:
            raise FamilyError(f"{self.folder / self.place[name]}: {name}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()


def read_config(file: Path) -> PreTrainedConfig:
    """A config.json of a family we know.

    Raises:
        FamilyError: it is broken, or of another architecture.
    """
    try:
        values = json.loads(file.read_text())
        model_type = values.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise FamilyError(f"{file}: cannot be read: {error}") from None
    family_named(model_type, str(file))
    return CONFIG_MAPPING[model_type].from_json_file(file)


def family_named(model_type: object, where: str) -> Family:
    if model_type not in FAMILIES:
        raise FamilyError(f"{where}: unknown model_type {model_type!r}; {nearest(str(model_type), FAMILIES)}")
    return FAMILIES[str(model_type)]


def _load(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> ZooForCausalLM:
    family = family_named(config.model_type, type(config).__name__)
    model = build(family.model_file(config), device="meta", dtype=_dtype(tensors))
    found = dict(converted(family, model, tensors))
    model.to_empty(device=next(iter(found.values())).device)
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            module.reset_parameters()
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def converted(family: Family, model: ZooForCausalLM, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, one after the other, of theirs; `model` may be on the meta device.

    Raises:
        FamilyError: tensors that are missing, left over (both before the first is read), or of another shape.
    """
    ours = saved_tensors(model)
    stored = {family.present(name): name for name in tensors}
    left = {name for name in stored if family.is_read(name, model.config)}
    if model.config.tie_word_embeddings:
        left.discard("lm_head.weight")
    plan, missing = [], []
    for pair in family.pairs(model.config, ours):
        form = next((form for form in pair.layouts if all(name in stored for name in form.names())), None)
        if form is None:
            missing += [name for name in pair.layouts[0].names() if name not in stored]
        else:
            plan.append((pair, form))
            left.difference_update(form.names())
    if missing:
        raise FamilyError(f"missing tensors: {_some(missing)}")
    if left:
        raise FamilyError(f"tensors that nothing here reads: {_some(sorted(left))}")
    for pair, form in plan:
        theirs = [tensors[stored[name]] for name in form.names()]
        shapes = [ours[name].shape for name in pair.ours]
        try:
            joined = form.join(theirs, shapes)
            fits = [tensor.shape for tensor in joined] == shapes
        except (RuntimeError, ValueError):
            fits = False
        if not fits:
            found = ", ".join(str(list(tensor.shape)) for tensor in theirs)
            raise FamilyError(f"{form.names()[0]}: is {found}, the configuration says {_expected(form, shapes)}")
        for name, tensor in zip(pair.ours, joined, strict=True):
            yield name, tensor.to(ours[name].dtype, copy=True)


def _expected(form: Form, shapes: list[torch.Size]) -> str:
    """Shapes of theirs for such tensors of ours."""
    theirs = form.split([torch.empty(shape, device="meta") for shape in shapes])
    return ", ".join(str(list(tensor.shape)) for tensor in theirs)


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Of the embedding: what else there is may be in float32 on purpose."""
    name = next((name for name in tensors if name.endswith(("embed_tokens.weight", "embeddings.weight"))), None)
    if name is None:
        raise FamilyError("missing tensors: the embedding")
    return tensors[name].dtype


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
