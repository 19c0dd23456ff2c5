"""The LightningModule: one language model, its loss averaged over tokens, its optimiser and its schedule.

Three choices that Lightning leaves open:

- The model is built in `configure_model` from a config, never handed over as a module, so that parsing a command line
  builds nothing and a strategy may build on its own device.
- `save_hyperparameters` is not used: what it stores in a checkpoint silently beats the command line on resume. The
  checkpoint carries the model's mapping instead, and a checkpoint of another architecture is refused by name of field.
- Randomness in training (dropout, if a model has any) is drawn anew for each batch from (seed, rank, batch number), so
  a resumed run draws what the uninterrupted run drew, whatever validation and samples drew in between.
"""

import contextlib
import math
import os
import time
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor

import zoo
from zoo.train.errors import UserError
from zoo.train.optimizers import make_optimizer
from zoo.train.schedules import make_schedule

Batch = dict[str, Tensor]


def first_difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first field, in the order of `ours`, where two nested mappings differ: (dotted path, ours, theirs)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            found = first_difference(
                ours.get(key, "(absent)"), theirs.get(key, "(absent)"), f"{path}.{key}" if path else str(key)
            )
            if found:
                return found
        return None
    return None if ours == theirs else (path, ours, theirs)


def check_architecture(ours: dict[str, Any], checkpoint: dict[str, Any], source: str) -> None:
    """Raises UserError if the checkpoint from `source` holds another model than the mapping `ours`."""
    if "zoo_config" not in checkpoint:
        raise UserError(
            f"{source}: not a checkpoint of train.py (it holds no zoo_config); give a last.ckpt of a run folder"
        )
    theirs = checkpoint["zoo_config"]
    with contextlib.suppress(zoo.ConfigError):  # one that we cannot read differs somewhere, and is compared as it is
        theirs = zoo.load_config(theirs).to_mapping()  # with the defaults of fields that are newer than it
    found = first_difference(ours, theirs)
    if found:
        field, here, there = found
        raise UserError(
            f"{source}: checkpoint of another architecture: {field} is {there} in the checkpoint and {here} in the "
            f"configuration; use the config.yaml that lies in its run folder, or start a new run"
        )


def count_predicted(labels: Tensor) -> Tensor:
    """Number of predicted tokens: labels [batch, length] without the first column (the model shifts) and -100."""
    return (labels[:, 1:] != -100).sum()


class ZooModule(LightningModule):
    """Trains the language model that a model file describes.

    Args:
        config: the model: path of a YAML file (configs/models/*.yaml) or the mapping that such a file holds.
        overrides: changes to it, each "dotted.path=value" as in "blocks.lightning.mixer.num_heads=8"; on the command
            line write them as --model.config.blocks.lightning.mixer.num_heads 8.
        optimizer: adamw for everything, or muon for hidden matrices (adamw for the rest).
        learning_rate: peak learning rate of both.
        weight_decay: decoupled weight decay of matrices; norms, biases, decays, state-space parameters and embeddings
            have none.
        betas: AdamW's running averages.
        momentum: Muon's momentum.
        schedule: cosine, or wsd (warm-up, stable, decay). Its length is trainer.max_steps.
        warmup_steps: steps of linear warm-up.
        decay_fraction: part of the steps that wsd spends decaying, at the end.
        final_fraction: learning rate at the end as a part of the peak.
        compile: compile the model with torch.compile.

    Raises:
        zoo.config.ConfigError: the model file or an override is wrong.
        UserError: a number is out of range.
    """

    def __init__(
        self,
        config: str | dict,
        overrides: list[str] | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        schedule: Literal["cosine", "wsd"] = "cosine",
        warmup_steps: int = 100,
        decay_fraction: float = 0.2,
        final_fraction: float = 0.1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        ranges = {
            "learning_rate": (learning_rate, learning_rate > 0, "above 0"),
            "weight_decay": (weight_decay, weight_decay >= 0, "0 or more"),
            "betas": (betas, all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1"),
            "momentum": (momentum, 0 <= momentum < 1, "from 0 to below 1"),
            "warmup_steps": (warmup_steps, warmup_steps >= 0, "0 or more"),
            "decay_fraction": (decay_fraction, 0 < decay_fraction <= 1, "above 0 and at most 1"),
            "final_fraction": (final_fraction, 0 <= final_fraction <= 1, "from 0 to 1"),
        }
        for name, (value, is_right, wanted) in ranges.items():
            if not is_right:
                raise UserError(f"model.{name}: {value} is out of range; give {wanted}")
        self.config = zoo.load_config(config, overrides or ())
        self.optimizer_name = optimizer
        self.optimizer_options = {
            "learning_rate": learning_rate, "weight_decay": weight_decay, "betas": tuple(betas), "momentum": momentum
        }  # fmt: skip
        self.schedule_name = schedule
        self.schedule_options = {
            "warmup_steps": warmup_steps, "decay_fraction": decay_fraction, "final_fraction": final_fraction
        }  # fmt: skip
        self.compile_model = compile
        self.model: torch.nn.Module | None = None
        self.batch_requested_at = 0.0  # for callbacks/throughput.py: this hook runs after those of all callbacks
        self._validation_sums = torch.zeros(3, dtype=torch.float64)
        self._expert_loads: list[Tensor | None] = []  # since the optimiser's last step

    def setup(self, stage: str) -> None:
        """Refuses a vocabulary that cannot hold the tokenizer's ids."""
        tokenizer_size = len(self.trainer.datamodule.tokenizer)
        if self.config.vocab_size < tokenizer_size:
            raise UserError(
                f"model.config.vocab_size: {self.config.vocab_size} is smaller than the tokenizer's {tokenizer_size} "
                f"tokens; write --model.config.vocab_size {math.ceil(tokenizer_size / 64) * 64} or choose another "
                f"data.tokenizer"
            )

    def configure_model(self) -> None:
        if self.model is None:
            self.model = zoo.build(self.config)
            if self.compile_model:
                self.model.compile()  # in place: parameter names stay as they are

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = make_optimizer(self.optimizer_name, self.model, **self.optimizer_options)
        # trainer.max_steps, not estimated_stepping_batches: reading the latter builds the loaders before a resume
        # restores them (Lightning issue 20550).
        schedule = make_schedule(self.schedule_name, total_steps=self.trainer.max_steps, **self.schedule_options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        position = (int(os.environ.get("PL_GLOBAL_SEED", 0)), self.global_rank, self.trainer.fit_loop.total_batch_idx)
        torch.manual_seed(hash(position) % 2**63)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Not in on_train_batch_end: a callback's runs before the module's, and SaveLast saves there.
        super().optimizer_step(*args, **kwargs)
        if self._expert_loads:
            reduce = self.trainer.strategy.reduce
            loads = [load if load is None else reduce(load, reduce_op="sum") for load in self._expert_loads]
            self.model.correct_routers(loads)
            self._expert_loads = []

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step >= self.trainer.max_steps:
            # Makes Lightning validate after the last step, wherever the interval stands.
            self.trainer.should_stop = True
        self.batch_requested_at = time.perf_counter()

    def on_validation_end(self) -> None:
        self.batch_requested_at = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss, averaged over the predicted tokens of all ranks (strategies average gradients over ranks, so each
        rank divides its sum by total / world_size). Logs train/loss, without the router's losses, in nats per token."""
        total = self.trainer.strategy.reduce(count_predicted(batch["labels"]), reduce_op="sum")
        output = self.model(**batch, use_cache=False, num_items_in_batch=total.float() / self.trainer.world_size)
        cross_entropy = self.trainer.strategy.reduce(output.cross_entropy.detach().float().clone(), reduce_op="mean")
        self.log("train/loss", cross_entropy, prog_bar=True)
        if output.expert_loads is not None:
            before = self._expert_loads or [0] * len(output.expert_loads)
            pairs = zip(before, output.expert_loads, strict=True)
            self._expert_loads = [now if now is None else total + now.detach() for total, now in pairs]
        if output.aux_loss is not None:
            self.log("train/aux_loss", output.aux_loss.detach().float(), sync_dist=True)
        self.log("train/learning_rate", self.optimizers().param_groups[0]["lr"])
        return {"loss": output.loss, "cross_entropy": cross_entropy}

    def on_validation_epoch_start(self) -> None:
        self._validation_sums = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        labels = batch["labels"]
        cross_entropy = self.model(**batch, use_cache=False, logits_to_keep=1).cross_entropy
        predicted = labels[:, 1:][labels[:, 1:] != -100].cpu()
        num_bytes = self.trainer.datamodule.bytes_per_token[predicted].sum()
        self._validation_sums += torch.tensor([float(cross_entropy) * len(predicted), len(predicted), float(num_bytes)])

    def on_validation_epoch_end(self) -> None:
        """Logs val/loss (nats per token) and val/bpb (bits per byte) over the whole held-out text of all ranks."""
        sums = self._validation_sums.to(
            device=self.device, dtype=torch.float32 if self.device.type == "mps" else torch.float64
        )
        nats, tokens, num_bytes = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self.log("val/loss", nats / max(tokens, 1), rank_zero_only=True)
        self.log("val/bpb", nats / math.log(2) / max(num_bytes, 1), prog_bar=True, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["zoo_config"] = self.config.to_mapping()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_architecture(self.config.to_mapping(), checkpoint, str(self.trainer.ckpt_path))
