"""`Spectrum`: how strong the student's directions are, beside the teacher's, whatever the two shapes. Ours.

Matrices of unequal shape have no entries and no directions in common, but both have singular values. Pulling those of
the student to those of the teacher keeps how the teacher's energy is spread over directions: how fast its spectrum
falls, hence how many directions it amounts to. It cannot keep what the directions are: a student whose singular vectors
have nothing to do with the teacher's is as near as one that has them all. Where shapes are equal the other readings
compare more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrices import check_driver, columns, right_singular, right_singular_of_unit, tall, unit_scale, with_norm_of
from ..sensitivity import Score, check_rank, check_score, selected_count, sensitivity, uniform_weights
from .own import Own
from .reading import Reading, State, check_span


@dataclass(frozen=True, repr=False)
class Spectrum(Reading):
    """L = sum_i w_i (sigma_i(W_s) - c sigma_i(W_t))^2 over i < r = min(r_s, r_t), the ranks of the two shapes.

    Directions of the student are chosen and weighted as by `Own`, on its update; those that the teacher's shape lacks
    (i >= r) count for nothing. The gradient is sum_i 2 w_i (sigma_i(W_s) - c sigma_i(W_t)) u_i v_i^T, u_i and v_i of
    the student. Where sigma_i(W_s) = 0 there is no derivative, and 0 in its place.

    c gives the r leading directions of the teacher the energy that the student's have when the loss first computes:
    c^2 = sum_{i < r} sigma_i(W_s0)^2 / sum_{i < r} sigma_i(W_t)^2, so that the two spectra differ in shape, not in
    scale. With r = r_s that is ||W_s0||_F over the norm of the teacher's best approximation of rank r. A constant from
    then on; 1 where one of the two is zero.

    Args:
        rank: directions to select per pair (0 = all).
        driver: the decomposition, see `dskd.matrices.right_singular`; "randomized" is for the updates, as in `Own`.
        score: what directions are ranked and weighted by, a function of dskd/sensitivity.py.
        span: see `Reading`.

    Raises:
        ValueError, TypeError: a setting out of range.
    """

    rank: int = 32
    driver: str = "gram"
    score: Score = sensitivity
    span: str = "step"
    any_shape = True
    lasting = ("sigma",)

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_driver(self.driver)
        check_score(self.score)
        check_span(self.span)

    def start(self, student_mn: Tensor) -> State:
        """Weights (rows, r_s), and the student's singular values (rows, r_s) as `start`."""
        sigma_n, _ = right_singular(tall(student_mn), self.driver)
        return {"weights": uniform_weights(student_mn, self.rank), "start": sigma_n}

    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        """As `Own.choose`; `start` stays."""
        own = Own(self.rank, driver=self.driver, score=self.score)
        return {**own.choose(update_mn, gradient_mn, progress, chosen), "start": chosen["start"]}

    def target(self, teacher_mn: Tensor, chosen: State, former: State) -> State:
        """c sigma_i(W_t), (rows, r), which no choice changes."""
        if former:
            return former
        sigma_n, _ = right_singular(tall(teacher_mn), self.driver)
        r = min(sigma_n.shape[-1], chosen["start"].shape[-1])
        ours, theirs = chosen["start"][..., :r], sigma_n[..., :r]
        scaled = with_norm_of(ours.unsqueeze(-2), theirs.unsqueeze(-2)).squeeze(-2)
        return {"sigma": torch.where(ours[..., :1] > 0, scaled, theirs)}

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        m, n = student_mn.shape[-2:]
        (unit_mn, size), r = unit_scale(tall(student_mn)), target["sigma"].shape[-1]
        weights_k, index_k = chosen["weights"][..., :r].topk(selected_count(self.rank, r))
        V_nk = columns(right_singular_of_unit(unit_mn, self.driver)[1], index_k)
        scaled_left_mk = unit_mn @ V_nk  # sigma_i u_i / size
        sigma_k = torch.linalg.vector_norm(scaled_left_mk, dim=-2)
        left_mk = scaled_left_mk / torch.where(sigma_k > 0, sigma_k, 1.0).unsqueeze(-2)
        gap_k = sigma_k * size.squeeze(-1) - target["sigma"].gather(-1, index_k)
        pull_k = weights_k * gap_k
        gradient_mn = (left_mk * (2 * pull_k).unsqueeze(-2)) @ V_nk.mT
        return (pull_k * gap_k).sum(-1), gradient_mn if m >= n else gradient_mn.mT
