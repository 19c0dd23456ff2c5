"""last.ckpt: written whole or not at all, read without executing anything that it holds."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from zoo.train.errors import RunError, UserError

FILE_NAME = "last.ckpt"


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a checkpoint on the CPU, its tensors mapped from the file, refusing pickled code.

    Raises:
        UserError: there is no such file, it is cut short, or it is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; leave --ckpt_path out to start from the beginning")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: this checkpoint may not be read; change its permissions or use another one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many unrelated types for a damaged file
        raise UserError(
            f"{path}: unreadable checkpoint, cut short or not written by train.py; use another one"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of train.py (it holds no state_dict); use another one")
    return checkpoint


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, fsyncs, renames; so a crash or a full disk leaves the previous file as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns ENOSPC into a RuntimeError
            written = temporary.stat().st_size if temporary.exists() else 0
            free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
                isinstance(error, RuntimeError) and free < 2**20
            )
            reason = f"no space left on the disk after {written:,} bytes" if is_full else str(error).splitlines()[0]
            kept = "the previous one is as it was" if path.exists() else "none was written before"
            raise RunError(
                f"{path}: checkpoint of step {checkpoint.get('global_step')} not written: {reason}; {kept}"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict:
        return load_checkpoint(path)


class SaveLast(Checkpoint):
    """Saves checkpoints/last.ckpt every so many optimiser steps, and after the last one.

    Args:
        every_n_steps: optimiser steps between two saves.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps: {every_n_steps} is out of range; give 1 or more")
        self.every_n_steps = every_n_steps
        self._saved_step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step != self._saved_step and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._saved_step = step
            trainer.save_checkpoint(checkpoint_path(trainer.default_root_dir))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step


def checkpoint_path(run_folder: str | os.PathLike) -> Path:
    """Where a run keeps its last checkpoint."""
    return Path(run_folder) / "checkpoints" / FILE_NAME
