"""How a held gradient of DSKD compares with the exact ones while its run goes on: by age, smoothing, basis, driver.

Exact gradients are kept at chosen steps, and compared at every age until directions are chosen anew, which ends every
interval for which a gradient is held.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dskd import DirectionSensitivityLoss, Update, direction_sensitivity, select_directions
from dskd.controls import ReleasedGradient
from dskd.matrices import DRIVERS, as_matrix
from dskd.observed import ObservedStep
from dskd.readings import Reading

SMOOTHINGS = (0.0, 0.003, 0.01, 0.03)
Stages = Mapping[str, Collection[int]]  # name -> the steps after which an exact gradient is kept, 0 being the start


@dataclass
class Reference:
    """A moment of a run whose exact gradient is kept, and what became of it.

    cosine: [age][pair] of what is kept and the exact gradient for the same directions, by "own, SMOOTHING" and
    "update", the other basis at the same weights; gradient: [pair] at this moment, by driver beside float64, and
    "released", of the authors' release beside the exact one.
    """

    stage: str
    step: int
    cosine: dict[str, list[list[float]]] = field(default_factory=dict)
    gradient: dict[str, list[float]] = field(default_factory=dict)


class HeldGradient:
    """The measurements of one run, taken around every step that its loss, with the reading `Own`, sees.

    Attributes:
        references: one a kept gradient, compared at every age from 0 until directions are chosen anew, which ends
            every interval for which a gradient is held.
        overlap: by driver, sum(min(w, w')) of the direction weights with those of float64, of all choices and pairs.
    """

    def __init__(self, dskd: DirectionSensitivityLoss, stages: Stages):
        self.dskd = dskd
        self.stage_of = {step: stage for stage, steps in stages.items() for step in steps}
        self.references: list[Reference] = []
        self.overlap: dict[str, list[float]] = {driver: [] for driver in DRIVERS}
        self._own, self._update = replace(dskd.reading, smoothing=0.0), Update(dskd.reading.rank)
        self._along: list[dict[str, Tensor]] = []  # what `Update` has chosen, by pair
        self._before: list[tuple[Tensor, Tensor | None]] = []  # weights and gradients
        self._open: list[tuple[Reference, dict[str, list[Tensor]]]] = []
        self._begin, self._end, self._progress = dskd.begin_step, dskd.end_step, 0.0
        dskd.begin_step, dskd.end_step = self._before_step, self._after_step

    def _before_step(self, progress: float, skip: Collection[str] = ()) -> ObservedStep:
        if not self._along:
            self._along = [self._update.start(as_matrix(W.detach())[None]) for W in self.dskd.students]
            self._look()
        if self.dskd.due:
            grads = [None if W.grad is None else W.grad.clone() for W in self.dskd.students]
            self._before = [(W.detach().clone(), grad) for W, grad in zip(self.dskd.students, grads, strict=True)]
        self._progress = progress
        return self._begin(progress, skip)

    def _after_step(self, step: ObservedStep) -> None:
        choices = self.dskd.choices
        self._end(step)
        if self.dskd.choices > choices:
            self._open = []
            self._note_choice()
        self._look()

    def _look(self) -> None:
        if (step := self.dskd.steps) in self.stage_of:
            self.references.append(Reference(self.stage_of[step], step))
            self._open.append((self.references[-1], self._keep(self.references[-1])))
        if self._open:
            now = {"own": self._gradients(self._own), "update": self._gradients(self._update)}
            for reference, kept in self._open:
                for name, held in kept.items():
                    reference.cosine.setdefault(name, []).append(cosines(held, now[name.partition(",")[0]]))

    def _note_choice(self) -> None:
        """Of the pairs that got a gradient in the step that chose; the others keep their directions."""
        rank = self._own.rank
        for i, (W, (start, grad)) in enumerate(zip(self.dskd.students, self._before, strict=True)):
            if grad is None or not grad.any():
                continue
            dW, G = as_matrix(W.detach() - start), as_matrix(grad)
            self._along[i] = self._update.choose(dW[None], G[None], self._progress, self._along[i])
            oracle = select_directions(direction_sensitivity(dW.double(), G.double(), self._progress, "svd"), rank)
            for driver in DRIVERS:
                weights = select_directions(direction_sensitivity(dW, G, self._progress, driver, rank), rank)
                self.overlap[driver].append(torch.minimum(weights, oracle).sum().item())

    def _keep(self, reference: Reference) -> dict[str, list[Tensor]]:
        kept = {f"own, {value:g}": self._gradients(replace(self._own, smoothing=value)) for value in SMOOTHINGS}
        oracle = self._gradients(replace(self._own, driver="svd"), torch.float64)
        for driver in DRIVERS:
            reference.gradient[driver] = cosines(self._gradients(replace(self._own, driver=driver)), oracle)
        reference.gradient["released"] = cosines(self._gradients(ReleasedGradient(self._own)), kept["own, 0"])
        return {**kept, "update": self._gradients(self._update)}

    def _gradients(self, reading: Reading, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Exact, of every pair, along the last choice: that of the run's loss, or the same made in `Update`."""
        states = list(self._along)
        if reading is not self._update:
            for group in self.dskd.groups:
                group.start(self.dskd.reading, self.dskd.students)
                for row, i in enumerate(group.index):
                    states[i] = group.of_rows([row])
        gradients = []
        for (_, *weights), state in zip(self.dskd.pairs, states, strict=True):
            student_mn, teacher_mn = (as_matrix(W.detach()).to(dtype)[None] for W in weights)
            chosen = {key: value.to(dtype) for key, value in state.items()}
            gradients.append(reading.value_and_gradient(student_mn, reading.target(teacher_mn, chosen, {}), chosen)[1])
        return gradients


def cosines(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[float]:
    """Of every two tensors, in float64."""
    flat = [[tensor.double().flatten() for tensor in tensors] for tensors in (left, right)]
    return [cosine_similarity(a, b, dim=0).item() for a, b in zip(*flat, strict=True)]


def applied(cosines: Sequence[Sequence[float]], interval: int) -> np.ndarray:
    """(pairs,) cosines [age][pair] of the gradient applied at the ages 0 to interval - 1, averaged."""
    return np.mean(cosines[:interval], axis=0)
