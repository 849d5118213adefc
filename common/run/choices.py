"""The record of the directions that DSKD has chosen: `directions.jsonl` beside the run's `metrics.jsonl`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.run.step_log import StepLog
from dskd import DirectionSensitivityLoss
from dskd.matrices import as_matrix

_CURVATURE_STEPS = 20  # a mean over about 20 gradients changes no faster, and to see it takes a decomposition


class ChoiceLog:
    """Writes one line per choice of directions (on the first process alone):

    {"step": s, "weights": {pair: {"index": [...], "weight": [...], "sigma": [...]}}, "distance": {pair: d}}

    `index` counts the singular directions of the update from 0, the largest singular value first, and leaves out those
    of weight 0; `sigma` are their singular values in units of the largest; d is ||W_s - W_t||_F / ||W_t||_F, or, of
    unequal shapes, the same of their leading singular values. Numbers have 4 significant digits. A pair that kept its
    directions is written with those. With the basis "curvature" index and weight are those of the eigenvectors of the
    smaller factor, sigma is 0, and of the renewals within 20 steps one is written.

    Args:
        folder: the run's output folder.
        dskd: the loss that chooses, with its state loaded if the run is resumed.
        pairs: what it was made of, (name, student weight, teacher weight).
        resume_step: on resuming, the step of the checkpoint; lines of later steps are dropped, they come again.
    """

    def __init__(
        self,
        folder: Path,
        dskd: DirectionSensitivityLoss,
        pairs: Sequence[tuple[str, Tensor, Tensor]],
        resume_step: int | None = None,
    ):
        self._log = StepLog(folder / "directions.jsonl", resume_step)
        self._dskd, self._pairs = dskd, pairs
        self._choices = dskd.choices

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After an optimizer step, `step` of them done: write a line if it chose directions anew (see the class)."""
        if self._dskd.choices == self._choices:
            return
        self._choices = self._dskd.choices
        if self._dskd.reading.gradual and not self._first_of_some(step):
            return
        spectra = self._dskd.update_spectra()
        weights = {
            name: _non_zero(row.cpu(), spectra[name].cpu()) for name, row in self._dskd.direction_weights().items()
        }
        distances = torch.stack([_distance(student, teacher) for _, student, teacher in self._pairs]).tolist()
        names = [name for name, _, _ in self._pairs]
        self._log.append(step, weights=weights, distance=dict(zip(names, map(_rounded, distances), strict=True)))

    def _first_of_some(self, step: int) -> bool:
        """Whether the renewal before this one was in another stretch of steps; the same after a resume."""
        return (step - 1) // _CURVATURE_STEPS != (step - 1 - self._dskd.svd_steps) // _CURVATURE_STEPS


def _non_zero(weights: Tensor, spectrum: Tensor) -> dict[str, list]:
    index = weights.nonzero().flatten()
    columns = {"weight": weights[index], "sigma": spectrum[index]}
    return {"index": index.tolist(), **{key: [_rounded(x) for x in each.tolist()] for key, each in columns.items()}}


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        sigma, theirs = (torch.linalg.svdvals(as_matrix(weight.float())) for weight in (student, teacher))
        r = min(len(sigma), len(theirs))
        student, teacher = sigma[:r], theirs[:r]
    return torch.linalg.vector_norm(student.float() - teacher.float()) / torch.linalg.vector_norm(teacher.float())


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
