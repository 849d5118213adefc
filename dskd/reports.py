"""What can be read of a loss: its directions, and what it is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .groups import Group
from .readings import Reading


class Reports:
    """The reports of `DirectionSensitivityLoss`."""

    names: list[str]
    students: list[Tensor]
    groups: Sequence[Group]
    reading: Reading

    def direction_weights(self) -> dict[str, Tensor]:
        """The weights (r,) of every pair's directions, those of large singular values first; zero if not selected.

        Of `Curvature` the eigenvalues of the smaller one of its two factors, divided by their sum.
        """
        return self._by_name(lambda group: self.reading.weights(group.chosen))

    def update_spectra(self) -> dict[str, Tensor]:
        """Singular values (r,) of the update in which every pair's directions were chosen, in units of the largest.

        Falling; 0 for those that the driver "randomized" does not look for, before a pair's first choice, and for
        readings that decompose no update.
        """

        def spectrum(group: Group) -> Tensor:
            found = group.chosen.get("spectrum")
            if found is not None:
                return found
            return torch.zeros(len(group), min(group.m, group.n), dtype=group.dtype, device=group.device)

        return self._by_name(spectrum)

    def effective_directions(self) -> dict[str, float]:
        """1 / sum(w^2) of every pair, to 7 digits: how many directions its weights amount to."""
        # on the host: not every device has float64
        rows = self._by_name(lambda group: 1.0 / self.reading.weights(group.chosen).cpu().double().square().sum(-1))
        values = torch.stack(list(rows.values())).tolist()
        return {name: float(f"{value:.7g}") for name, value in zip(rows, values, strict=True)}

    def _by_name(self, rows_of: Callable[[Group], Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group in self.groups:
            group.start(self.reading, self.students)
            found.update(zip((self.names[i] for i in group.index), rows_of(group), strict=True))
        return {name: found[name] for name in self.names}

    def __repr__(self: Any) -> str:
        held = f"grad_steps={self.grad_steps}" + (f", drift={self.drift:g}" if self.drift else "")
        size = sum(W.numel() for W in self.students)
        return (
            f"DirectionSensitivityLoss({len(self.names)} pairs, {size:,} weights, {self.reading!r}, "
            f"svd_steps={self.svd_steps}, {held}; {self.steps} steps done, {self.choices} choices)"
        )
