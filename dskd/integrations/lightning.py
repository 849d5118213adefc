"""DSKD in Lightning, automatic and manual optimization: a callback.

    trainer = Trainer(callbacks=[DskdCallback(loss, weight=0.1)])

The training step returns the task loss alone. The loss's gradient is added right before each optimizer step, after
Lightning's own clipping, which so covers the task's gradient. The callback suits `lightning` and `pytorch_lightning`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..attach import Attachment
from ..loss import DirectionSensitivityLoss

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callbacks() -> tuple[type, ...]:
    """The class `Callback` of the packages that are imported already, or else of all that can be."""
    names = [name for name in _PACKAGES if name in sys.modules]
    names = names or [name for name in _PACKAGES if importlib.util.find_spec(name.split(".")[0])]
    if not names:
        raise ModuleNotFoundError("DskdCallback needs Lightning: pip install lightning")
    return tuple(importlib.import_module(name).Callback for name in names)


class DskdCallback(*_callbacks()):  # type: ignore[misc]
    """Follows the optimizers that train the paired weights, adds the loss's gradient, logs `dskd_loss`.

    The loss's state is saved in Lightning's checkpoints and read on resume.

    Args:
        dskd: the loss, or a function that makes it of the LightningModule when the training begins (on its device
            then).
        weight: of the loss, lambda.
        total_steps: optimizer steps planned; by default `trainer.estimated_stepping_batches`. With manual optimization
            that counts batches, so give it where a step takes several.

    Raises:
        ValueError: when the training begins: steps that are not planned (`max_epochs=-1`) or a loss that was trained
            with before.
    """

    def __init__(
        self,
        dskd: DirectionSensitivityLoss | Callable[[nn.Module], DirectionSensitivityLoss],
        weight: float = 0.1,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.dskd = dskd if isinstance(dskd, DirectionSensitivityLoss) else None
        self.weight, self.total_steps = weight, total_steps
        self._make = None if isinstance(dskd, DirectionSensitivityLoss) else dskd
        self._attachment: Attachment | None = None
        self._saved: dict[str, Any] | None = None  # read from a checkpoint, before the network is on its device

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before a checkpoint is read: what `validate` or the like has read of one is not for this run."""
        self._saved = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._make is not None:
            self.dskd = self._make(pl_module)
        assert self.dskd is not None
        if self._saved is not None:
            self.dskd.load_state_dict(self._saved)
            self._saved = None
        elif self.dskd.steps:
            raise ValueError(f"the DSKD loss has seen {self.dskd.steps} steps of another training; make a new one")
        planned = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if planned == float("inf"):
            raise ValueError("DSKD needs to know how many steps are planned; give max_epochs, max_steps or total_steps")
        self._attachment = self.dskd.attach(trainer.optimizers, int(planned), self.weight)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._attachment is not None and self._attachment.follows(optimizer):
            pl_module.log("dskd_loss", self._attachment.loss().detach())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.dskd is None else self.dskd.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict
