"""`Own`, the paper's reading: every network's own singular directions, chosen by how sensitive the update's are.

With K the selected directions, w their weights and W~ = sum_{i in K} sqrt(w_i) sigma_i u_i v_i^T over the matrix's
*own* singular triplets, a pair's loss is || W~_s - W~_t ||_F^2 (docs/method.md, "Every step"). For a tall student A
with A^T A = V diag(sigma^2) V^T, p = sqrt(w), P = V diag(p) V^T and R = A P - T~, where T~ = W~_t stays the same
between two choices, the exact gradient is

    D = 2 R P + 2 A V S V^T,   S = F o (B + B^T),   B = V^T A^T R V,
    F_ij = (p_i - p_j) / (sigma_i^2 - sigma_j^2),  F_ii = 0.

Only the k selected directions have p > 0, and S vanishes where neither index is selected. Few directions: every product
takes k columns, m n k operations. Many: n x n matrices first, five products of m n^2 operations in all.

Between two close singular values 1 / (sigma_i^2 - sigma_j^2) is large, and turns over as soon as the weights move by
about their gap. `smoothing` replaces 1 / x by x / (x^2 + smoothing^2), x in units of sigma_0^2, which is roughly the
mean over such movements and stays right for longer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..held import hand_out
from ..matrices import (
    check_driver,
    columns,
    right_singular,
    shape_of,
    tall,
    unit_scale,
    without_autocast,
    working,
)
from ..sensitivity import (
    Score,
    check_rank,
    check_score,
    padded,
    scored_directions,
    select_directions,
    selected_count,
    sensitivity,
    uniform_weights,
)
from .reading import Reading, State, check_span


@dataclass(frozen=True, repr=False)
class Own(Reading):
    """The paper's method: direction i, ranked on the update, is the i-th singular triplet of student and teacher.

    Args:
        rank: directions to select per pair (0 = all).
        smoothing: of the gradient between close singular values (this file's head), whose squares are in units of the
            largest one's; 0 = exact.
        driver: the decomposition, see `dskd.matrices.right_singular`; "randomized" is for the updates, all else is then
            done as by "gram".
        score: what directions are ranked and weighted by, a function of dskd/sensitivity.py.
        span: see `Reading`.

    Raises:
        ValueError, TypeError: a setting out of range.
    """

    rank: int = 32
    smoothing: float = 0.0
    driver: str = "gram"
    score: Score = sensitivity
    span: str = "step"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_driver(self.driver)
        check_score(self.score)
        check_span(self.span)
        if not 0.0 <= self.smoothing < float("inf"):
            raise ValueError(f"smoothing must be 0 or a positive number, got {self.smoothing}")

    def start(self, student_mn: Tensor) -> State:
        return {"weights": uniform_weights(student_mn, self.rank)}

    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        """Weights (rows, r), and the update's singular values (rows, r) in units of the largest, as `spectrum`."""
        tall_mn, gradient_mn = unit_scale(tall(update_mn)), unit_scale(tall(gradient_mn))
        scores_n, sigma_q, _ = scored_directions(self.score, tall_mn, gradient_mn, progress, self.driver, self.rank)
        spectrum_n = padded(sigma_q / sigma_q[..., :1], scores_n.shape[-1])
        return {"weights": select_directions(scores_n, self.rank), "spectrum": spectrum_n}

    def target(self, teacher_mn: Tensor, chosen: State, former: State) -> State:
        """T~ (rows, m, n) of the tall teacher, and its right singular vectors, which no choice changes."""
        if self._takes_all_alike(teacher_mn, chosen):
            return {"teacher": teacher_mn}
        tall_mn = tall(teacher_mn)
        V_nn = former["V"] if "V" in former else right_singular(tall_mn, self.driver)[1]
        root_n, index_k = _selected(chosen["weights"], selected_count(self.rank, tall_mn.shape[-1]))
        return {"V": V_nn, "low_rank": _weighted(tall_mn, V_nn, root_n, index_k)}

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        m, n = student_mn.shape[-2:]
        if self._takes_all_alike(student_mn, chosen):  # equal weights: W~ = W / sqrt(r), without a decomposition
            gap_mn = student_mn - target["teacher"]
            return gap_mn.square().sum((-2, -1)) / min(m, n), gap_mn.mul_(2 / min(m, n))
        count = selected_count(self.rank, min(m, n))
        value, gradient_mn = own_value_and_gradient(
            tall(student_mn), target["low_rank"], chosen["weights"], count, self.driver, self.smoothing
        )
        return value, gradient_mn if m >= n else gradient_mn.mT

    def _takes_all_alike(self, matrix_mn: Tensor, chosen: State) -> bool:
        r = min(matrix_mn.shape[-2:])
        return "spectrum" not in chosen and selected_count(self.rank, r) == r  # a choice brings a spectrum


@without_autocast
def low_rank_alignment(
    student: Tensor, teacher: Tensor, weights: Tensor, driver: str = "svd", smoothing: float = 0.0
) -> Tensor:
    """Alignment loss of `Own`: || W~_s - W~_t ||_F^2 with W~ = sum_i sqrt(w_i) sigma_i u_i v_i^T.

    Each network's *own* singular triplets are taken; index i pairs the student's i-th with the teacher's i-th. The
    gradient with respect to `student` is in closed form (docs/method.md), exact unless smoothed, and stays finite for
    rank-deficient, all-zero and repeated-singular-value matrices; `teacher` and `weights` are constants.

    Args:
        student, teacher: (..., m, n).
        weights: (..., r) from `select_directions`.
        driver: the decomposition, see `dskd.matrices.right_singular`.
        smoothing: of the gradient between close singular values (this file's head); 0 = exact.

    Returns:
        (...) losses, one a matrix, in float32 or better.

    Raises:
        ValueError: shapes do not match.
    """
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(f"student {shape_of(student)} and teacher {shape_of(teacher)} must be matrices of one shape")
    expected = (*student.shape[:-2], min(student.shape[-2:]))
    if tuple(weights.shape) != expected:
        raise ValueError(f"weights must have the shape {expected}, got {shape_of(weights)}")
    with torch.no_grad():
        student_mn, teacher_mn = tall(working(student)), tall(working(teacher))
        weights_n = weights.to(student_mn.dtype)
        count = max(int((weights_n > 0).sum(-1).max()) if weights_n.numel() else 0, 1)
        _, V_nn = right_singular(teacher_mn, driver)
        low_rank_mn = _weighted(teacher_mn, V_nn, *_selected(weights_n, count))
        value, gradient_mn = own_value_and_gradient(student_mn, low_rank_mn, weights_n, count, driver, smoothing)
        gradient_mn = gradient_mn if student.shape[-2] >= student.shape[-1] else gradient_mn.mT
    return hand_out(value, [gradient_mn], [student])


def own_value_and_gradient(
    student_mn: Tensor, low_rank_mn: Tensor, weights_n: Tensor, count: int, driver: str, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Losses (...) and gradients (..., m, n) of tall students, of whose weights (..., n) at most `count` are above 0.

    low_rank_mn: T~ (..., m, n).
    """
    root_n, index_k = _selected(weights_n, count)
    sigma_n, V_nn = right_singular(student_mn, driver)
    gap_mn = _weighted(student_mn, V_nn, root_n, index_k) - low_rank_mn
    if index_k is None:
        gradient_mn = _gradient_of_many(student_mn, gap_mn, sigma_n, V_nn, root_n, smoothing)
    else:
        gradient_mn = _gradient_of_few(student_mn, gap_mn, sigma_n, V_nn, root_n, index_k, smoothing)
    return gap_mn.square().sum((-2, -1)), gradient_mn


def low_rank_part(matrix_mn: Tensor, weights_r: Tensor, count: int, driver: str) -> Tensor:
    """W~ (..., m, n) of matrices of any orientation."""
    tall_mn = tall(matrix_mn)
    part_mn = _weighted(tall_mn, right_singular(tall_mn, driver)[1], *_selected(weights_r, count))
    return part_mn if matrix_mn.shape[-2] >= matrix_mn.shape[-1] else part_mn.mT


def _selected(weights_n: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """p = sqrt(w), and the indices (..., k) of the selected directions, or None where these are many."""
    return weights_n.sqrt(), weights_n.topk(count).indices if 2 * count < weights_n.shape[-1] else None


def _weighted(matrix_mn: Tensor, V_nn: Tensor, root_n: Tensor, index_k: Tensor | None) -> Tensor:
    """W~ = W P = sum_i p_i sigma_i u_i v_i^T."""
    if index_k is None:
        return matrix_mn @ _projection(V_nn, root_n)
    V_nk, root_k = columns(V_nn, index_k), root_n.gather(-1, index_k)
    return (matrix_mn @ V_nk * root_k.unsqueeze(-2)) @ V_nk.mT


def _projection(V_nn: Tensor, root_n: Tensor) -> Tensor:
    return (V_nn * root_n.unsqueeze(-2)) @ V_nn.mT


def _gradient_of_many(
    student_mn: Tensor, gap_mn: Tensor, sigma_n: Tensor, V_nn: Tensor, root_n: Tensor, smoothing: float
) -> Tensor:
    F_nn, scale = _divided_differences(sigma_n, sigma_n, root_n, root_n, smoothing)
    unit_mn = student_mn / scale
    B_nn = V_nn.mT @ (unit_mn.mT @ gap_mn) @ V_nn
    S_nn = 2 * F_nn * (B_nn + B_nn.mT)
    return gap_mn @ (2 * _projection(V_nn, root_n)) + unit_mn @ (V_nn @ S_nn @ V_nn.mT)


def _gradient_of_few(
    student_mn: Tensor,
    gap_mn: Tensor,
    sigma_n: Tensor,
    V_nn: Tensor,
    root_n: Tensor,
    index_k: Tensor,
    smoothing: float,
) -> Tensor:
    """With Y = V S_nk, where the rows of S in K are halved, V S V^T is Y V_K^T + V_K Y^T."""
    V_nk, root_k = columns(V_nn, index_k), root_n.gather(-1, index_k)
    F_nk, scale = _divided_differences(sigma_n, sigma_n.gather(-1, index_k), root_n, root_k, smoothing)
    unit_mn = student_mn / scale
    unit_V_mk, gap_V_mk = unit_mn @ V_nk, 2 * (gap_mn @ V_nk)
    S_nk = F_nk * (V_nn.mT @ (unit_mn.mT @ gap_V_mk + 2 * (gap_mn.mT @ unit_V_mk)))
    halved_n = torch.ones_like(sigma_n).scatter(-1, index_k, 0.5)
    Y_nk = V_nn @ (halved_n.unsqueeze(-1) * S_nk)
    return (gap_V_mk * root_k.unsqueeze(-2) + unit_mn @ Y_nk) @ V_nk.mT + unit_V_mk @ Y_nk.mT


def _divided_differences(
    sigma_i: Tensor, sigma_j: Tensor, p_i: Tensor, p_j: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """F (..., i, j) of singular values in units of the largest one, and that unit (..., 1, 1).

    Where two singular values coincide but their weights differ the loss has no derivative; x / (x^2 + eps^2) instead of
    1 / x then gives 0 (the mean over the two orders) in place of infinity, and differs from 1 / x by (eps / x)^2
    elsewhere. eps is the smoothing, or what rounding asks for.
    """
    scale = sigma_i[..., :1].clamp(min=torch.finfo(sigma_i.dtype).tiny)
    gap = (sigma_i / scale).square().unsqueeze(-1) - (sigma_j / scale).square().unsqueeze(-2)
    eps = max(smoothing, 100 * torch.finfo(gap.dtype).eps)
    return (p_i.unsqueeze(-1) - p_j.unsqueeze(-2)) * gap / (gap.square() + eps**2), scale.unsqueeze(-1)
