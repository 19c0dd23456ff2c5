"""Trains on short sequences first and on long ones later."""

from dataclasses import dataclass
from typing import Any

from lightning import Callback, LightningModule, Trainer

from zoo.train.errors import UserError


@dataclass
class Stage:
    """From optimiser step `step` on, sequences of `length` tokens."""

    step: int
    length: int


class SequenceLength(Callback):
    """Sets the sequence length of the data at given steps (trainer.datamodule.set_sequence_length).

    Args:
        stages: in order of steps, for example [{step: 0, length: 256}, {step: 500, length: 1024}]; before the first
            stage data.sequence_length holds, which must be the longest. Empty: it holds throughout.
    """

    def __init__(self, stages: list[Stage] | None = None) -> None:
        self.stages = list(stages or [])
        steps = [stage.step for stage in self.stages]
        if steps != sorted(set(steps)) or any(stage.step < 0 or stage.length < 2 for stage in self.stages):
            raise UserError("sequence_length.stages: steps must rise from 0 on and lengths be at least 2")

    def _length_at(self, step: int) -> int | None:
        past = [stage.length for stage in self.stages if stage.step <= step]
        return past[-1] if past else None

    def _apply(self, trainer: Trainer) -> None:
        length = self._length_at(trainer.global_step)
        if length is not None and length != trainer.datamodule.sequence_length:
            trainer.datamodule.set_sequence_length(length)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._apply(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._apply(trainer)
