"""Tokens per second, and model FLOPs utilisation: the part of the machine's matrix-multiplication speed that training
reaches (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). The peak is measured here, at the start, in the
training data type, because a data sheet's figure says little about a laptop or a shared GPU.
"""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

BACKWARD_AND_FORWARD = 3  # the backward pass costs two forward passes


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP per second of a large square matrix multiplication: the best of as many tries as fit into `seconds`."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.ones(2, size, size, device=device, dtype=dtype).unbind()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a @ b
    synchronize()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def training_dtype(precision: str) -> torch.dtype:
    """The data type of matrix multiplications under a Trainer's precision ("bf16-mixed", "32-true", ...)."""
    return {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(
        precision.split("-")[0], torch.float32
    )


class Throughput(Callback):
    """Logs throughput/tokens_per_second (all ranks together), throughput/mfu (per device) and throughput/seconds
    (training time so far in this process). Waiting for data counts; validation, sampling and saving do not."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._tokens = 0
        self._flops = 0
        self._seconds = 0.0
        self._total_seconds = 0.0
        self._batch_start = 0.0
        self._logged_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = measure_matmul_peak(pl_module.device, training_dtype(trainer.precision))
        self._logged_step = trainer.global_step
        pl_module.batch_requested_at = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._batch_start = pl_module.batch_requested_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        step = trainer.global_step
        tokens, length = batch["input_ids"].numel(), trainer.datamodule.sequence_length
        self._tokens += tokens * trainer.world_size
        self._flops += BACKWARD_AND_FORWARD * pl_module.model.flops(max(1, tokens // length), min(tokens, length))
        is_logged = step != self._logged_step and step % trainer.log_every_n_steps == 0
        if is_logged and pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self._batch_start
        self._seconds += elapsed
        self._total_seconds += elapsed
        if is_logged:
            self._logged_step = step
            pl_module.log("throughput/tokens_per_second", self._tokens / self._seconds, rank_zero_only=True)
            pl_module.log("throughput/mfu", self._flops / self._seconds / self._peak, rank_zero_only=True)
            pl_module.log("throughput/seconds", self._total_seconds, rank_zero_only=True)
            self._tokens, self._flops, self._seconds = 0, 0, 0.0
