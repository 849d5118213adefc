"""The state of a loss as plain tensors and numbers, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .held import Held
from .matrices import in_layout_of, shape_of
from .sharding import sharded_like

if TYPE_CHECKING:
    from .loss import DirectionSensitivityLoss

_COUNTERS = ("steps", "choices", "expansions", "postponed", "copy_gradients")
_KEYS = {"pairs", "reading", "counters", "chosen", "held", "starts"}


def saved_state(loss: DirectionSensitivityLoss) -> dict[str, Any]:
    """Shares its tensors with the loss, which never changes them in place."""
    held = loss.held
    return {
        "pairs": {name: list(W.shape) for name, W in zip(loss.names, loss.students, strict=True)},
        "reading": repr(loss.reading),
        "counters": {key: getattr(loss, key) for key in _COUNTERS},
        "chosen": [dict(group.chosen) for group in loss.groups],
        "held": None if held is None else dict(vars(held)),
        "starts": loss.starts,
    }


def load_state(loss: DirectionSensitivityLoss, state: dict[str, Any]) -> None:
    """Raises ValueError where the state is not one of a loss with these pairs and this reading; nothing changes."""
    if not isinstance(state, dict) or set(state) != _KEYS:
        raise ValueError("the saved DSKD state is not one of this version")
    if list(state["pairs"]) != loss.names:
        raise ValueError("the saved DSKD state belongs to other layer pairs")
    for name, W in zip(loss.names, loss.students, strict=True):
        if state["pairs"][name] != list(W.shape):
            raise ValueError(f"the saved DSKD state has the shape {state['pairs'][name]} for {name}, not {shape_of(W)}")
    if state["reading"] != repr(loss.reading):
        raise ValueError(f"the saved DSKD state is of {state['reading']}, not {loss.reading!r}")
    for group, chosen in zip(loss.groups, state["chosen"], strict=True):
        group.chosen = {key: value.to(group.device) for key, value in chosen.items()}
        group.targets, group.former = {}, {}
    for key, value in state["counters"].items():
        setattr(loss, key, value)
    loss.starts = _beside(loss, state["starts"])
    loss.held = None
    if (held := state["held"]) is not None:
        device = loss.students[0].device
        gradients = [in_layout_of(W, D) for D, W in zip(held["gradients"], loss.students, strict=True)]
        offset = None if held["offset"] is None else held["offset"].to(device)
        loss.held = Held(held["value"].to(device), gradients, offset, held["since"], _beside(loss, held["origin"]))


def _beside(loss: DirectionSensitivityLoss, tensors: list[Tensor]) -> list[Tensor]:
    """On the devices, and in the parts, of the students' weights; there are none, or as many as pairs."""
    return [sharded_like(W, tensor.to(W.device)) for tensor, W in zip(tensors, loss.students, strict=False)]
