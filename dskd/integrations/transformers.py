"""DSKD in transformers' `Trainer`: `DskdTrainer`, or `DskdTrainerMixin` before a Trainer of your own.

    trainer = DskdTrainer(student, arguments, train_dataset=data, dskd=loss, dskd_weight=0.1)

The loss's gradient is added to `.grad` after the last backward pass of every optimizer step and before clipping: the
same weights as in a plain loop with `dskd_weight * loss()` in its loss. How a model and the Trainer share the division
among accumulated batches (`num_items_in_batch`) has no bearing on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..attach import Attachment, add_gradient
from ..loss import DirectionSensitivityLoss

STATE = "dskd_state.pt"


class DskdTrainerMixin:
    """Put before a `Trainer` in the bases of a class.

    The logs get `dskd_loss`, the mean over the logged steps, and `task_loss`; `loss` is the sum of task loss and
    `dskd_weight * dskd_loss`. The loss's state is saved in every checkpoint, as `dskd_state.pt`, and read on resume.

    Args:
        dskd: the loss, or a function that makes it of the student when the training begins (on its device then).
        dskd_weight: of the loss, lambda.
        dskd_decoupled: nothing is added to `.grad`; the weights are pulled beside each step, see `Attachment`.

    Raises:
        TypeError: neither a loss nor a function.
        ValueError: a weight out of range; when the training begins: a loss that was trained with before, a checkpoint
            without a DSKD state, or DeepSpeed, whose gradients cannot be added to.
    """

    def __init__(
        self: Any,
        *args: Any,
        dskd: DirectionSensitivityLoss | Callable[[nn.Module], DirectionSensitivityLoss],
        dskd_weight: float = 0.1,
        dskd_decoupled: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 0.0 <= dskd_weight < float("inf"):
            raise ValueError(f"dskd_weight must be 0 or a positive number, got {dskd_weight}")
        if not callable(dskd):
            raise TypeError(f"dskd must be a DSKD loss or a function that makes it, got a {type(dskd).__name__}")
        self.dskd_weight, self.dskd_decoupled = dskd_weight, dskd_decoupled
        self.dskd = dskd if isinstance(dskd, DirectionSensitivityLoss) else None
        self._make_dskd = None if self.dskd is dskd else dskd
        self._attachment: Attachment | None = None
        self._checkpoint: str | None = None  # that the training resumes from
        self._dskd_sum, self._dskd_steps = 0.0, 0  # of the loss's values since the last line of the log
        super().__init__(*args, **kwargs)
        self.add_callback(_Begin(self))

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._checkpoint = None
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._detach()

    def _begin(self: Any, optimizer: Any) -> None:
        """When model and optimizer are ready; a second time where a smaller batch size is tried (its `auto_find`)."""
        if self.is_deepspeed_enabled:
            raise ValueError("DSKD cannot add to the gradients of DeepSpeed; use FSDP2 or DistributedDataParallel")
        self._detach()
        if self._make_dskd is not None:
            self.dskd = self._make_dskd(self.model)
        if self._checkpoint is not None:
            path = self._dskd_path(self._checkpoint)
            if not path.exists():
                raise ValueError(f"{path} is not there: the checkpoint is of a training without DSKD, or incomplete")
            self.dskd.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif self.dskd.steps:
            raise ValueError(f"the DSKD loss has seen {self.dskd.steps} steps of another training; make a new one")
        self._dskd_sum, self._dskd_steps = 0.0, 0
        weight = self.dskd_weight if self.dskd_decoupled else None
        self._attachment = self.dskd.attach(optimizer, self.state.max_steps, weight, decoupled=self.dskd_decoupled)

    def _detach(self: Any) -> None:
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not self.accelerator.sync_gradients:  # more batches follow before the optimizer's step
            return loss
        if not self.dskd_decoupled:
            scaler = getattr(self.accelerator, "scaler", None)
            scale = None if scaler is None else scaler.scale(torch.ones((), device=loss.device))
            add_gradient(zip(self.dskd.students, self.dskd.gradients(), strict=True), self.dskd_weight, scale)
        with torch.no_grad():
            value = self.dskd()
        self._dskd_sum, self._dskd_steps = self._dskd_sum + value, self._dskd_steps + 1
        total: Tensor = loss + self.dskd_weight * value.to(loss.device)
        return total

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._dskd_steps:
            logs["dskd_loss"] = float(self._dskd_sum / self._dskd_steps)
            logs["task_loss"] = logs["loss"] - self.dskd_weight * logs["dskd_loss"]
            self._dskd_sum, self._dskd_steps = 0.0, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        path = self._dskd_path(output_dir)
        if self.args.should_save or path.name != STATE:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.part")
            torch.save(self.dskd.state_dict(), aside)
            os.replace(aside, path)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        self._checkpoint = checkpoint

    def _dskd_path(self: Any, folder: str) -> Path:
        """Processes that hold parts of the weights have a file each."""
        return Path(folder, f"dskd_state_{self.args.process_index}.pt" if self.is_fsdp_enabled else STATE)


class _Begin(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin(kwargs["optimizer"])


class DskdTrainer(DskdTrainerMixin, Trainer):
    """transformers' `Trainer` with the arguments `dskd` and `dskd_weight`, see `DskdTrainerMixin`."""
