"""From one folder of weights to another, between a family's format and ours, with a few layers in memory at a time."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

from zoo.config import ZooConfig
from zoo.models import ZooForCausalLM
from zoo.models.families.base import Family, FamilyError
from zoo.models.families.checkpoint import Checkpoint, ShardWriter, family_named
from zoo.models.families.convert import as_exported, family_of, read_model, saved_tensors

Format = Literal["zoo", "native"]
SHARD_BYTES = 5 * 10**9
# What stands beside the weights and is carried over as it is.
CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What was written: `source` and `target` are model types, `notes` what the reader of a family has to say."""

    config: ZooConfig
    source: str
    target: str
    bytes: int
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    format: Format,
    *,
    overrides: Iterable[str] = (),
    replace: Iterable[str] = (),
    family: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Converted:
    """Write the model in `source` to `target`: as ours ("zoo"), or as the family that has it ("native").

    Memory holds one shard of the result and one layer of the model. `target` appears when it is complete.

    Args:
        source: a folder with config.json and safetensors, of a family or ours.
        target: a folder that does not exist yet, or is empty.
        overrides, replace: as `zoo.from_hf`.
        family: as which to write a native one, by its model_type, where several have such a model.
        shard_bytes: size of a file of the result.
        progress: show a bar on stderr.

    Raises:
        FamilyError, ConfigError: as `zoo.from_hf`; no family has the model; the target is not empty, or cannot be
            written.
    """
    source, asked = Path(source), target
    target = Path(target).resolve()  # a link's own place must not be replaced
    if family is not None and format != "native":
        raise FamilyError("family says as which a native folder is written; leave it out, or write native")
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise FamilyError(f"{asked}: cannot be read: {error.strerror or error}") from None
    if taken:
        raise FamilyError(f"{asked}: is there already; give a folder that is not")
    with Checkpoint(source) as checkpoint, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tensors = read_model(checkpoint.config, checkpoint, overrides, replace)
        config: PreTrainedConfig = model.config
        notes: tuple[str, ...] = ()
        if checkpoint.config.model_type != ZooConfig.model_type:
            notes = family_named(checkpoint.config.model_type, "").notes(model.config)
        if format == "native":
            found, config = family_of(model.config, family)
            config.architectures = [found.model_class]
            tensors = _theirs(model, found, config, tensors)
            if found.config_class is not None:
                notes = (f"transformers has no {found.model_type}: put the code that was released with it beside the "
                         "weights, or use software that knows it",)  # fmt: skip
        else:
            config.architectures = [ZooForCausalLM.__name__]
        config.dtype = model.dtype
        with _whole_or_nothing(target) as folder:
            size = _write(folder, source, config, tensors, model, shard_bytes, progress)
    notes += tuple(str(each.message) for each in caught if each.category is UserWarning)
    return Converted(model.config, checkpoint.config.model_type, config.model_type, size, notes)


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the `with` block is done, and goes if that fails.

    Raises:
        FamilyError: it cannot be written.
    """
    folder = None
    made = [each for each in target.parents if not each.exists()]
    try:
        with _terminated_is_an_exit():
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
            yield folder
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)  # a temporary folder is its owner's alone
            folder.replace(target)
    except (OSError, SafetensorError) as error:
        raise FamilyError(f"{target}: cannot be written: {' '.join(str(error).split())}") from None
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder)
        if not target.exists():
            for each in made:  # the innermost first
                with suppress(OSError):
                    each.rmdir()


@contextmanager
def _terminated_is_an_exit() -> Iterator[None]:
    """SIGTERM, which clusters send, unwinds as Ctrl-C does."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(
    folder: Path,
    source: Path,
    config: PreTrainedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    model: ZooForCausalLM,
    shard_bytes: int,
    progress: bool,
) -> int:
    writer = ShardWriter(folder, shard_bytes)
    total = sum(tensor.nbytes for tensor in saved_tensors(model).values())
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=not progress) as bar:
        for name, tensor in tensors:
            writer.add(name, tensor)
            bar.update(tensor.nbytes)
            del tensor  # the next one is made before it would be let go
    writer.close()
    config.save_pretrained(folder)
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return writer.total_bytes


def _theirs(
    model: ZooForCausalLM, family: Family, config: PreTrainedConfig, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the family's checkpoint, each as soon as all of ours that it is made of are there."""
    names = list(saved_tensors(model))
    pairs = {name: pair for pair in family.pairs(model.config, names) for name in pair.ours}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        waiting[name] = tensor
        del tensor
        pair = pairs[name]
        if all(each in waiting for each in pair.ours):
            form = pair.layouts[0]
            parts = form.split([waiting.pop(each) for each in pair.ours])
            for their_name, part in zip(form.names(), parts, strict=True):
                yield family.released(their_name), as_exported(part, model.dtype)
    for i in range(model.config.num_hidden_layers):
        for name, tensor in family.derive(config, i).items():
            yield family.released(family.prefix.replace("{i}", str(i)) + name), tensor.to(model.dtype)
