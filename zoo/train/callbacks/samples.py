"""Lets the model write a little text every so many steps, so that a person can read how it learns."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from zoo.train.errors import UserError

FILE_NAME = "samples.jsonl"


def read_samples(run_folder: Path) -> list[dict[str, Any]]:
    """The samples of a run in order of steps: {"step", "prompt", "text"}; a line cut short by a kill is left out."""
    path = run_folder / FILE_NAME
    samples = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            samples.append(json.loads(line))
    return samples


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients; afterwards random states and every module's mode are as they were."""
    modes = {module: module.training for module in model.modules()}
    with isolate_rng(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


class Samples(Callback):
    """Writes a sample to samples.jsonl and to TensorBoard every so many steps, and after the last one.

    Args:
        every_n_steps: optimiser steps between two samples; 0 for none.
        prompt: the text to go on from.
        max_new_tokens: length of the sample.
        temperature: 0 takes the likeliest token each time.
        top_p: sample only among the likeliest tokens that make up this much probability.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        prompt: str = "def ",
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
    ) -> None:
        ranges = {
            "every_n_steps": (every_n_steps, every_n_steps >= 0, "0 or more"),
            "prompt": (prompt, len(prompt) > 0, "at least one character"),
            "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "1 or more"),
            "temperature": (temperature, temperature >= 0, "0 or more"),
            "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        }
        for name, (value, is_right, wanted) in ranges.items():
            if not is_right:
                raise UserError(f"samples.{name}: {value!r} is out of range; give {wanted}")
        self.every_n_steps = every_n_steps
        self.prompt = prompt
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.options |= {"temperature": temperature, "top_p": top_p}
        self._sampled_step = 0
        self._started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sampled_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        is_due = self.every_n_steps and (step % self.every_n_steps == 0 or step == trainer.max_steps)
        if is_due and step != self._sampled_step:
            self._sampled_step = step
            self.sample(trainer, pl_module)

    @rank_zero_only
    def sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tokenizer = trainer.datamodule.tokenizer
        with undisturbed(pl_module.model):
            torch.manual_seed(0)  # the same dice each time: what changes from sample to sample is the model
            prompt = tokenizer(self.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(
                pl_module.device
            )
            out = pl_module.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), pad_token_id=tokenizer.pad_token_id or 0, **self.options
            )
        text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        self._write(Path(trainer.default_root_dir), {"step": trainer.global_step, "prompt": self.prompt, "text": text})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", f"```\n{self.prompt}{text}\n```", trainer.global_step)

    def _write(self, folder: Path, sample: dict[str, Any]) -> None:
        path = folder / FILE_NAME
        if not self._started:  # drop what a killed run wrote after the checkpoint that this one starts from
            self._started = True
            folder.mkdir(parents=True, exist_ok=True)
            kept = [json.dumps(earlier) + "\n" for earlier in read_samples(folder) if earlier["step"] < sample["step"]]
            temporary = path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, path)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample) + "\n")
