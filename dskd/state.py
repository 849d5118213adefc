"""The state of a loss as plain tensors and numbers, and back."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .groups import Group
from .held import Held
from .matrices import in_layout_of, shape_of
from .readings import Reading
from .sharding import sharded_like

_COUNTERS = ("steps", "choices", "expansions", "postponed", "copy_gradients")
_KEYS = {"pairs", "reading", "counters", "chosen", "held", "starts"}


class Saved:
    """The part of `DirectionSensitivityLoss` that saves and restores it."""

    names: list[str]
    students: list[Tensor]
    starts: list[Tensor]
    groups: Sequence[Group]
    reading: Reading
    held: Held | None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit: counters, directions, the held gradient.

        It shares its tensors with the loss, which never changes them in place.
        """
        return {
            "pairs": {name: list(W.shape) for name, W in zip(self.names, self.students, strict=True)},
            "reading": repr(self.reading),
            "counters": {key: getattr(self, key) for key in _COUNTERS},
            "chosen": [dict(group.chosen) for group in self.groups],
            "held": None if self.held is None else dict(vars(self.held)),
            "starts": self.starts,
        }

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but what follows the optimizer, whose own copies come without hooks."""
        return {**self.__dict__, "attachment": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: it is not one of a loss with these pairs and this reading; nothing is changed.
        """
        self._check(state)
        for group, chosen in zip(self.groups, state["chosen"], strict=True):
            group.chosen = {key: value.to(group.device) for key, value in chosen.items()}
            group.targets, group.former = {}, {}
        for key, value in state["counters"].items():
            setattr(self, key, value)
        self.starts = self._beside_students(state["starts"])
        self.held = None
        if (held := state["held"]) is not None:
            gradients = [in_layout_of(W, D) for W, D in zip(self.students, held["gradients"], strict=True)]
            value = held["value"].to(gradients[0].device)
            offset = None if held["offset"] is None else held["offset"].to(value.device)
            self.held = Held(value, gradients, offset, held["since"], self._beside_students(held["origin"]))

    def _check(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or set(state) != _KEYS:
            raise ValueError("the saved DSKD state is not one of this version")
        if list(state["pairs"]) != self.names:
            raise ValueError("the saved DSKD state belongs to other layer pairs")
        for name, W in zip(self.names, self.students, strict=True):
            if state["pairs"][name] != list(W.shape):
                saved = state["pairs"][name]
                raise ValueError(f"the saved DSKD state has the shape {saved} for {name}, not {shape_of(W)}")
        if state["reading"] != repr(self.reading):
            raise ValueError(f"the saved DSKD state is of {state['reading']}, not {self.reading!r}")
        rows = [{len(value) for value in chosen.values()} for chosen in state["chosen"]]
        if len(rows) != len(self.groups) or any(
            found - {len(group)} for found, group in zip(rows, self.groups, strict=True)
        ):
            raise ValueError(
                "the saved DSKD state groups the layer pairs otherwise; make the loss of weights with the precisions, "
                "devices and teacher shapes that it was saved with"
            )

    def _beside_students(self, tensors: list[Tensor]) -> list[Tensor]:
        """On the devices, and in the parts, of the students' weights; there are none, or as many as pairs."""
        return [sharded_like(W, tensor.to(W.device)) for tensor, W in zip(tensors, self.students, strict=False)]
