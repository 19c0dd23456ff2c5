"""Stops a run at the first loss or gradient that is not a finite number, before it reaches the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from zoo.train.errors import RunError


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor inside a module's output, whatever its nesting."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):  # transformers' ModelOutput is one
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def first_module_not_finite(model: nn.Module, batch: dict[str, Tensor]) -> str | None:
    """Runs `model` once more on `batch` and names the first module, in order of execution, whose output holds a NaN or
    an infinity, as "name (class)"; None if every output is finite."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def check(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if not found and any(t.is_floating_point() and not t.isfinite().all() for t in _tensors(output)):
                found.append(f"{name or 'the loss'} ({type(module).__name__})")

        handles.append(module.register_forward_hook(check))
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


class StopWhenNotFinite(Callback):
    """Ends the run with a RunError that tells the step, the loss, and the first module or parameter at fault.

    Also logs train/grad_norm, which it needs anyway. Every rank takes the same decision.
    """

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        total = trainer.strategy.reduce(loss.detach().float().clone(), reduce_op="sum")
        if total.isfinite():
            return
        pl_module.on_train_batch_start(self._batch, 0)  # the same random numbers as in the failed forward
        with trainer.precision_plugin.train_step_context():
            here = first_module_not_finite(pl_module.model, self._batch)
        names = _gather(trainer, here)
        where = next((name for name in names if name), "none on a second try; the hardware may be at fault")
        raise RunError(
            f"step {trainer.global_step}: the loss is {total.item()}; first module with an output that is not finite: "
            f"{where}; no checkpoint holds it; lower model.learning_rate or look at that module"
        )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        named = [(name, p.grad) for name, p in pl_module.model.named_parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([grad for _, grad in named])
        pl_module.log("train/grad_norm", norm)
        scales_loss = (
            getattr(trainer.precision_plugin, "scaler", None) is not None
        )  # fp16: the scaler skips such steps itself
        if norm.isfinite() or scales_loss:
            return
        bad = next((name for name, grad in named if not grad.isfinite().all()), "none alone; their norm overflows")
        loss = trainer.callback_metrics.get("train/loss", torch.tensor(float("nan"))).item()
        raise RunError(
            f"step {trainer.global_step}: the loss is {loss} but the gradient is not finite; first such parameter: "
            f"{bad}; no checkpoint holds it; lower model.learning_rate or look at that parameter"
        )


def _gather(trainer: Trainer, value: str | None) -> list[str | None]:
    if trainer.world_size == 1:
        return [value]
    values: list[str | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
