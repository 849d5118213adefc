"""Follows a training run with DSKD and compares the gradient that would be held with the exact one, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from common.matrices import DRIVERS
from common.released import released_gradient
from common.svd_loss import (
    DirectionSensitivityLoss,
    direction_sensitivity,
    low_rank_alignment,
    select_directions,
    update_alignment,
)

SMOOTHINGS = (0.0, 0.003, 0.01, 0.03)
Pairs = Sequence[tuple[str, Tensor, Tensor]]


@dataclass
class Reference:
    """A moment of a run whose exact gradient is kept, and what became of it; lists of lists are [age][pair].

    cosine: by smoothing of the kept gradient, of it and the exact one for the same direction weights; drift:
    || W - W_0 ||_F / || W_0 ||_F; value_error: of the first-order loss, the mean over pairs, relative to the exact one,
    by age; gradient: by driver, the cosines [pair] with the gradient in float64; overlap: by driver, sum(min(w, w')) of
    the direction weights with those of float64 [pair], empty where no directions were chosen; along_update: the cosine
    of the gradients of the basis "update" at the same weights, empty there, too; released: of the gradient of the
    authors' release [pair].
    """

    stage: str
    step: int
    ages: list[int] = field(default_factory=lambda: [0])
    cosine: dict[float, list[list[float]]] = field(default_factory=lambda: {value: [] for value in SMOOTHINGS})
    drift: list[list[float]] = field(default_factory=list)
    value_error: list[float] = field(default_factory=lambda: [0.0])
    gradient: dict[str, list[float]] = field(default_factory=dict)
    overlap: dict[str, list[float]] = field(default_factory=dict)
    along_update: list[list[float]] = field(default_factory=list)
    released: list[float] = field(default_factory=list)


@dataclass
class _Kept:
    """What a reference compares with."""

    directions: list[Tensor]
    weights: list[Tensor]
    losses: Tensor
    gradients: dict[float, list[Tensor]]  # by smoothing
    update_directions: list[tuple[Tensor, Tensor, Tensor]]  # w, u and v of every pair, empty without a choice
    update_gradients: list[Tensor]


class HeldGradient:
    """The measurements of one run; `before_step` and `after_step` go around every optimizer step.

    Args:
        pairs: as of `dskd`.
        dskd: the loss that the run uses. It must choose directions in every step of `stages` but step 0.
        stages: by name, the steps after which exact gradients are kept, 0 being the start.
        ages: steps after which they are compared.
        total: planned steps of the run.
    """

    def __init__(
        self,
        pairs: Pairs,
        dskd: DirectionSensitivityLoss,
        stages: dict[str, Sequence[int]],
        ages: Sequence[int],
        total: int,
    ):
        self.pairs, self.dskd, self.ages, self.total = pairs, dskd, ages, total
        self.stage_of = {step: stage for stage, steps in stages.items() for step in steps}
        self.references: list[Reference] = []
        self._kept: dict[int, _Kept] = {}  # by the step of the reference
        self._before: list[tuple[Tensor, Tensor | None]] = []
        self.after_step(0)

    def before_step(self, step: int) -> None:
        """With the gradients in place, before the optimizer's step number `step` (from 1)."""
        if step in self.stage_of:
            self._before = [
                (W.detach().clone(), None if W.grad is None else W.grad.detach().clone()) for _, W, _ in self.pairs
            ]

    def after_step(self, step: int) -> None:
        """When `step` steps are done and the directions are chosen."""
        for reference in self.references:
            if step - reference.step in self.ages:
                self._compare(reference, step - reference.step)
        if step in self.stage_of:
            reference = Reference(self.stage_of[step], step)
            if step:
                reference.overlap = self._overlaps((step - 1) / self.total)
            self._keep(reference)
            self.references.append(reference)
        self._kept = {start: kept for start, kept in self._kept.items() if step - start < max(self.ages)}

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.pairs]

    def _keep(self, reference: Reference) -> None:
        chosen = self.dskd.direction_weights()
        directions = [chosen[name].clone() for name in self.names]
        gradients = {}
        for value in SMOOTHINGS:
            losses, gradients[value] = exact_gradients(self.pairs, directions, self.dskd.driver, smoothing=value)
        weights = [W.detach().clone() for _, W, _ in self.pairs]
        found = self._update_directions(directions) if reference.step else []
        along = update_gradients(self.pairs, found)
        if found:
            reference.along_update.append([1.0] * len(self.pairs))
        self._kept[reference.step] = _Kept(directions, weights, losses, gradients, found, along)
        for value, kept in gradients.items():
            reference.cosine[value].append(cosines(kept, gradients[0.0]))
        reference.drift.append([0.0] * len(self.pairs))
        reference.released = cosines(released_gradients(self.pairs, directions), gradients[0.0])
        _, oracle = exact_gradients(self.pairs, directions, "svd", torch.float64)
        for driver in DRIVERS:
            _, found = exact_gradients(self.pairs, directions, driver)
            reference.gradient[driver] = cosines(found, oracle)

    def _update_directions(self, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        for (_, W, _), (start, _), w in zip(self.pairs, self._before, weights, strict=True):
            U, _, Vh = torch.linalg.svd((W.detach() - start).flatten(1), full_matrices=False)
            chosen = w.nonzero().flatten()
            found.append((w[chosen], U[:, chosen], Vh.mT[:, chosen]))
        return found

    @torch.no_grad()
    def _compare(self, reference: Reference, age: int) -> None:
        kept = self._kept[reference.step]
        losses, gradients = exact_gradients(self.pairs, kept.directions, self.dskd.driver)
        moved = [W.double() - W_0 for (_, W, _), W_0 in zip(self.pairs, kept.weights, strict=True)]
        slopes = [(D.double() * dW).sum() for D, dW in zip(kept.gradients[0.0], moved, strict=True)]
        expanded = (kept.losses.double() + torch.stack(slopes)).mean()
        reference.ages.append(age)
        for value, applied in kept.gradients.items():
            reference.cosine[value].append(cosines(applied, gradients))
        if kept.update_directions:
            now = update_gradients(self.pairs, kept.update_directions)
            reference.along_update.append(cosines(kept.update_gradients, now))
        reference.drift.append([(dW.norm() / W_0.norm()).item() for dW, W_0 in zip(moved, kept.weights, strict=True)])
        reference.value_error.append((expanded / losses.double().mean() - 1).abs().item())

    def _overlaps(self, progress: float) -> dict[str, list[float]]:
        """Of the pairs that got a gradient in the step that chose."""
        rank = self.dskd.rank
        overlaps = {driver: [] for driver in DRIVERS}
        for (_, W, _), (start, grad) in zip(self.pairs, self._before, strict=True):
            if grad is None or not grad.any():
                continue
            dW, G = (matrix.flatten(1) for matrix in (W.detach() - start, grad))
            oracle = select_directions(direction_sensitivity(dW.double(), G.double(), progress, "svd"), rank)
            for driver in DRIVERS:
                scores = direction_sensitivity(dW, G, progress, driver, rank)
                overlaps[driver].append(torch.minimum(select_directions(scores, rank), oracle).sum().item())
        return overlaps


def exact_gradients(
    pairs: Pairs,
    directions: Sequence[Tensor],
    driver: str,
    dtype: torch.dtype = torch.float32,
    smoothing: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Losses (pairs,) and gradients, in the shape of the weights, of every pair's `low_rank_alignment`."""
    losses, gradients = [], []
    for (_, student, teacher), w in zip(pairs, directions, strict=True):
        W = student.detach().to(dtype).requires_grad_()
        with torch.enable_grad():
            loss = low_rank_alignment(W.flatten(1), teacher.detach().to(dtype).flatten(1), w, driver, smoothing)
            gradients += torch.autograd.grad(loss, W)
        losses.append(loss.detach())
    return torch.stack(losses), gradients


def update_gradients(pairs: Pairs, directions: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Gradients of every pair's `update_alignment` along (w, u, v); none without directions."""
    gradients = []
    for (_, student, teacher), (w, left, right) in zip(pairs, directions, strict=False):
        W = student.detach().clone().requires_grad_()
        with torch.enable_grad():
            gradients += torch.autograd.grad(
                update_alignment(W.flatten(1), teacher.detach().flatten(1), w, left, right), W
            )
    return gradients


def released_gradients(pairs: Pairs, directions: Sequence[Tensor]) -> list[Tensor]:
    """Of every pair, as the authors' release computes it (common/released.py)."""
    gradients = []
    for (_, student, teacher), w in zip(pairs, directions, strict=True):
        U, sigma, Vh = torch.linalg.svd(teacher.detach().flatten(1), full_matrices=False)
        low_rank = (U * (w.sqrt() * sigma)) @ Vh
        gradients.append(released_gradient(student.detach().flatten(1), low_rank, w))
    return gradients


def cosines(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[float]:
    """Of every two tensors, in float64."""
    return [
        cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
        for a, b in zip(left, right, strict=True)
    ]
