"""Follows a training run with DSKD and compares gradients that would be held with the exact ones, step by step."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dskd import DirectionSensitivityLoss, Update, direction_sensitivity, select_directions
from dskd.controls import ReleasedGradient
from dskd.groups import Pairs
from dskd.matrices import DRIVERS, as_matrix
from dskd.readings import Reading, State

SMOOTHINGS = (0.0, 0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Plan:
    """How long a run is, and where it is looked at.

    stages: by name, the steps after which an exact gradient is kept; each is compared until the next choice of
    directions. decays: steps after which the learning rate of the vision recipe is divided by 10. tuning_steps: of a
    predecessor that is not fine-tuned yet.
    """

    steps: int
    batch: int
    svd_steps: int
    stages: Mapping[str, Collection[int]] = field(default_factory=dict)
    decays: Sequence[int] = ()
    tuning_steps: int = 0


@dataclass
class Reference:
    """A moment of a run whose exact gradient is kept, and what became of it; lists of lists are [age][pair].

    cosine: by smoothing of the kept gradient, of it and the exact one for the same directions; drift:
    || W - W_0 ||_F / || W_0 ||_F; value_error: of the first-order loss, the mean over pairs, relative to the exact one,
    by age; along_update: the cosine of the gradients of the reading `Update` at the same weights; gradient: by driver,
    the cosines [pair] with the gradient in float64; released: of the gradient of the authors' release [pair].
    """

    stage: str
    step: int
    cosine: dict[float, list[list[float]]] = field(default_factory=lambda: {value: [] for value in SMOOTHINGS})
    drift: list[list[float]] = field(default_factory=list)
    value_error: list[float] = field(default_factory=list)
    along_update: list[list[float]] = field(default_factory=list)
    gradient: dict[str, list[float]] = field(default_factory=dict)
    released: list[float] = field(default_factory=list)


@dataclass
class _Kept:
    """The exact gradients at some weights, which a reference compares with, or those of now."""

    weights: list[Tensor]
    losses: Tensor
    gradients: dict[float, list[Tensor]]  # by smoothing
    along_update: list[Tensor]


class HeldGradient:
    """The measurements of one run; `before_step` and `after_step` go around every optimizer step.

    Args:
        pairs: as of `dskd`.
        dskd: the loss that the run uses, with the reading `Own`.
        stages: as of `Plan`; 0 is the start of the run.
        total: planned steps of the run.

    Attributes:
        references: one a kept gradient, compared at every age from 0 until directions are chosen anew, which ends
            every interval for which a gradient is held.
        overlap: by driver, sum(min(w, w')) of the direction weights with those of float64, of all choices and pairs.
    """

    def __init__(self, pairs: Pairs, dskd: DirectionSensitivityLoss, stages: Mapping[str, Collection[int]], total: int):
        self.pairs, self.dskd, self.total = pairs, dskd, total
        self.stage_of = {step: stage for stage, steps in stages.items() for step in steps}
        self.references: list[Reference] = []
        self.overlap: dict[str, list[float]] = {driver: [] for driver in DRIVERS}
        self._own, self._update = replace(dskd.reading, smoothing=0.0), Update(dskd.reading.rank)
        self._along = [self._update.start(as_matrix(W.detach())[None]) for _, W, _ in pairs]
        self._choices, self._before = dskd.choices, []
        self._open: list[tuple[Reference, _Kept]] = []
        self.after_step(0)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.pairs]

    def before_step(self, step: int) -> None:
        """With the gradients in place, before the optimizer's step number `step` (from 1)."""
        if self.dskd.due:
            self._before = [(W.detach().clone(), None if W.grad is None else W.grad.clone()) for _, W, _ in self.pairs]

    def after_step(self, step: int) -> None:
        """When `step` steps are done and the directions are chosen."""
        if self.dskd.choices > self._choices:
            self._choices, self._open = self.dskd.choices, []
            self._note_choice((step - 1) / self.total)
        if step in self.stage_of:
            self.references.append(Reference(self.stage_of[step], step))
            self._open.append((self.references[-1], self._keep(self.references[-1])))
        if self._open:
            losses, exact = self._exact(self._own)
            along = exact_gradients(self.pairs, self._update, self._along)[1]
            for reference, kept in self._open:
                _compare(reference, kept, _Kept([W.detach() for _, W, _ in self.pairs], losses, {0.0: exact}, along))

    def _note_choice(self, progress: float) -> None:
        """Of the pairs that got a gradient in the step that chose; the others keep their directions."""
        rank = self.dskd.reading.rank
        for i, ((_, W, _), (start, grad)) in enumerate(zip(self.pairs, self._before, strict=True)):
            if grad is None or not grad.any():
                continue
            dW, G = as_matrix(W.detach() - start), as_matrix(grad)
            self._along[i] = self._update.choose(dW[None], G[None], progress, self._along[i])
            oracle = select_directions(direction_sensitivity(dW.double(), G.double(), progress, "svd"), rank)
            for driver in DRIVERS:
                weights = select_directions(direction_sensitivity(dW, G, progress, driver, rank), rank)
                self.overlap[driver].append(torch.minimum(weights, oracle).sum().item())

    def _keep(self, reference: Reference) -> _Kept:
        kept = {value: self._exact(replace(self._own, smoothing=value)) for value in SMOOTHINGS}
        losses, exact = kept[0.0]
        reference.released = cosines(self._exact(ReleasedGradient(self._own))[1], exact)
        _, oracle = self._exact(replace(self._own, driver="svd"), torch.float64)
        for driver in DRIVERS:
            reference.gradient[driver] = cosines(self._exact(replace(self._own, driver=driver))[1], oracle)
        gradients = {value: found for value, (_, found) in kept.items()}
        weights = [W.detach().clone() for _, W, _ in self.pairs]
        return _Kept(weights, losses, gradients, exact_gradients(self.pairs, self._update, self._along)[1])

    def _exact(self, reading: Reading, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
        """Along the present directions of the run's loss."""
        states = [{}] * len(self.pairs)
        for group in self.dskd.groups:
            group.start(self.dskd.reading, self.dskd.students)
            for row, i in enumerate(group.index):
                states[i] = group.of_rows([row])
        return exact_gradients(self.pairs, reading, states, dtype)


def _compare(reference: Reference, kept: _Kept, now: _Kept) -> None:
    for value, applied in kept.gradients.items():
        reference.cosine[value].append(cosines(applied, now.gradients[0.0]))
    reference.along_update.append(cosines(kept.along_update, now.along_update))
    moved = [W.double() - W_0 for W, W_0 in zip(now.weights, kept.weights, strict=True)]
    reference.drift.append([(dW.norm() / W_0.norm()).item() for dW, W_0 in zip(moved, kept.weights, strict=True)])
    slopes = [(D.double() * dW).sum() for D, dW in zip(kept.gradients[0.0], moved, strict=True)]
    expanded = (kept.losses.double() + torch.stack(slopes)).mean()
    reference.value_error.append((expanded / now.losses.double().mean() - 1).abs().item())


def exact_gradients(
    pairs: Pairs, reading: Reading, states: Sequence[State], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """Losses (pairs,) and gradients, in the shape of the weights, of every pair with what was chosen for it."""
    losses, gradients = [], []
    for (_, *weights), state in zip(pairs, states, strict=True):
        student_mn, teacher_mn = (as_matrix(W.detach()).to(dtype)[None] for W in weights)
        chosen = {key: value.to(dtype) for key, value in state.items()}
        loss, gradient_mn = reading.value_and_gradient(student_mn, reading.target(teacher_mn, chosen, {}), chosen)
        losses.append(loss)
        gradients.append(gradient_mn.reshape(weights[0].shape))
    return torch.cat(losses), gradients


def cosines(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[float]:
    """Of every two tensors, in float64."""
    return [
        cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
        for a, b in zip(left, right, strict=True)
    ]
