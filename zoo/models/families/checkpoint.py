"""Folders of safetensors: read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from zoo.config import ConfigError, ZooConfig, load_config
from zoo.models.families import FAMILIES
from zoo.models.families.base import Family, FamilyError, one_line
from zoo.schema import nearest, shown

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, read when asked for. `config` is the family's, or ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        try:
            if not (folder / "config.json").is_file():
                raise FamilyError(f"{folder}: has no config.json; give the folder of a transformers checkpoint")
            self.config = read_config(folder / "config.json")
            self.place = self._index()
        except OSError as error:
            raise FamilyError(f"{folder}: cannot be read: {error.strerror or error}") from None

    def _index(self) -> dict[str, str]:
        """Which file each tensor is in."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():  # an index beside it is of an earlier model
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        if not index.is_file():
            others = sorted(f.name for f in self.folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f"; {others[0]} is a pickle and is not read: convert it to safetensors" if others else ""
            raise FamilyError(f"{self.folder}: has neither {SINGLE} nor {INDEX}{hint}")
        try:
            place = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FamilyError(f"{index}: is no index of shards: {' '.join(repr(error).split())[:200]}") from None
        for name, file in place.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise FamilyError(f"{index}: {name} is in {shown(file)}; a shard must lie beside the index")
        return place

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


class Renamed(Mapping[str, Tensor]):
    """Tensors under other names."""

    def __init__(self, tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> None:
        self.tensors = tensors
        self.stored = {rename(name): name for name in tensors}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class ShardWriter:
    """Writes tensors to safetensors files of about `shard_bytes` in a folder, as transformers names them."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[list[str]] = []
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        # A view would bring along all of what it is a view of.
        self.pending[name] = (
            tensor.contiguous() if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
        )
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and the index where there are several files."""
        self._flush()
        if len(self.shards) == 1:
            self._part(0).rename(self.folder / SINGLE)
            return
        weight_map = {}
        for i, names in enumerate(self.shards):
            file = f"model-{i + 1:05}-of-{len(self.shards):05}.safetensors"
            self._part(i).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self.pending:
            save_file(self.pending, self._part(len(self.shards)), metadata={"format": "pt"})
            self.shards.append(list(self.pending))
            self.pending, self.pending_bytes = {}, 0

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i}.safetensors"


def read_config(file: Path) -> PreTrainedConfig:
    """A config.json of a family we know, or of ours.

    Raises:
        FamilyError: it is broken, or of another architecture.
    """
    try:
        values = json.loads(file.read_text())
        model_type = values.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise FamilyError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if model_type == ZooConfig.model_type:
        try:
            return load_config(file)
        except ConfigError as error:
            raise FamilyError(str(error)) from None
    with one_line(str(file)):
        if model_type is None:
            for family in FAMILIES.values():
                if (fields := family.original(values)) is not None:
                    return family.configuration()(**fields)
        return family_named(model_type, str(file)).configuration().from_json_file(file)


def family_named(model_type: object, where: str) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise FamilyError(f"{where}: unknown model_type {model_type!r}; {nearest(str(model_type), FAMILIES)}")
    return FAMILIES[model_type]
