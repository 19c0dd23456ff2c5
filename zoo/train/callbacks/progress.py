"""The progress bar: optimiser steps, loss, tokens per second, MFU and held-out bits per byte.

In a terminal it is one tqdm line; in a log file, one plain line for every logged step.
"""

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

COLUMNS = {
    "train/loss": "loss {:.3f}",
    "throughput/tokens_per_second": "{:,.0f} tokens/s",
    "throughput/mfu": "MFU {:.1%}",
    "val/bpb": "held-out {:.3f} bits/byte",
}


class Progress(ProgressBar):
    """Shows the training steps; see the module's text."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None
        self._shown_step = -1

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _text(self, trainer: Trainer) -> str:
        values = trainer.callback_metrics
        return "  ".join(form.format(float(values[name])) for name, form in COLUMNS.items() if name in values)

    def _is_terminal(self) -> bool:
        return sys.stderr.isatty()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shown_step = trainer.global_step
        if self._enabled and self._is_terminal():
            self._bar = tqdm(
                total=trainer.max_steps, initial=trainer.global_step, desc="training", unit="step", dynamic_ncols=True,
                bar_format="{desc}: {n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining}{postfix}",
            )  # fmt: skip

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if not self._enabled or step == self._shown_step:
            return
        self._shown_step = step
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(trainer), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            self._line(f"step {step}/{trainer.max_steps}  {self._text(trainer)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking and self._bar is None:
            bits = float(trainer.callback_metrics["val/bpb"])
            self._line(f"held-out text after step {trainer.global_step}: {bits:.4f} bits/byte")
        elif self._bar is not None:
            self._bar.set_postfix_str(self._text(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()
        if isinstance(exception, KeyboardInterrupt) and self._enabled:
            self._line(f"stopped after step {trainer.global_step}; --ckpt_path last goes on from the last checkpoint")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        if self._enabled:
            self._line(" ".join(str(arg) for arg in args))

    def _line(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
