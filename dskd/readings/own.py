"""`Own`, the paper's reading: every network's own singular directions, chosen by how sensitive the update's are.

With K the selected directions, w their weights and W~ = sum_{i in K} sqrt(w_i) sigma_i u_i v_i^T over the matrix's
*own* singular triplets, a pair's loss is || W~_s - W~_t ||_F^2 (docs/method.md, "The loss, in every step"). For a tall
student A with A^T A = V diag(sigma^2) V^T, p = sqrt(w), P = V diag(p) V^T and R = A P - T~, where T~ = W~_t stays the
same between two choices, the exact gradient is

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
    eigenbasis,
    right_singular,
    shape_of,
    tall,
    unit_scale,
    working,
)
from ..precision import in_full_precision
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

_SMALLEST = 1e-30  # of the largest eigenvalue of a matrix of unit scale, which is 1 or more unless all is zero


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
    lasting = ("V",)

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
        tall_mn, gradient_mn = unit_scale(tall(update_mn))[0], unit_scale(tall(gradient_mn))[0]
        scores_n, sigma_q, _ = scored_directions(self.score, tall_mn, gradient_mn, progress, self.driver, self.rank)
        spectrum_n = padded(sigma_q / sigma_q[..., :1], scores_n.shape[-1])
        return {"weights": select_directions(scores_n, self.rank), "spectrum": spectrum_n}

    def target(self, teacher_mn: Tensor, chosen: State, former: State) -> State:
        """T~ and all else that no step changes (`_fixed`); of the teacher's right singular vectors those of before."""
        if self._takes_all_alike(teacher_mn, chosen):
            return {"teacher": teacher_mn}
        tall_mn = tall(teacher_mn)
        V_nn = former["V"] if "V" in former else right_singular(tall_mn, self.driver)[1]
        return _fixed(tall_mn, V_nn, chosen["weights"], selected_count(self.rank, tall_mn.shape[-1]))

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        m, n = student_mn.shape[-2:]
        if self._takes_all_alike(student_mn, chosen):  # equal weights: W~ = W / sqrt(r), without a decomposition
            gap_mn = student_mn - target["teacher"]
            return gap_mn.square().sum((-2, -1)) / min(m, n), gap_mn.mul_(2 / min(m, n))
        value, gradient_mn = _aligned(tall(student_mn), target, self.driver, self.smoothing)
        return value, gradient_mn if m >= n else gradient_mn.mT

    def _takes_all_alike(self, matrix_mn: Tensor, chosen: State) -> bool:
        r = min(matrix_mn.shape[-2:])
        return "spectrum" not in chosen and selected_count(self.rank, r) == r  # a choice brings a spectrum


@in_full_precision
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
        student_mn, teacher_mn = (tall(working(W).reshape(-1, *W.shape[-2:])) for W in (student, teacher))
        weights_n = weights.to(student_mn.dtype).reshape(-1, expected[-1])
        count = max(int((weights_n > 0).sum(-1).max()) if weights_n.numel() else 0, 1)
        target = _fixed(teacher_mn, right_singular(teacher_mn, driver)[1], weights_n, count)
        value, gradient_mn = _aligned(student_mn, target, driver, smoothing)
        gradient_mn = gradient_mn if student.shape[-2] >= student.shape[-1] else gradient_mn.mT
    return hand_out(value.reshape(student.shape[:-2]), [gradient_mn.reshape(student.shape)], [student])


def low_rank_part(matrix_mn: Tensor, weights_r: Tensor, count: int, driver: str) -> Tensor:
    """W~ (rows, m, n) of matrices of any orientation."""
    tall_mn = tall(matrix_mn)
    fixed = _fixed(tall_mn, right_singular(tall_mn, driver)[1], weights_r, count)
    part_mn = fixed["low_rank"] if "low_rank" in fixed else fixed["left"] @ fixed["right"].mT
    return part_mn if matrix_mn.shape[-2] >= matrix_mn.shape[-1] else part_mn.mT


def _fixed(teacher_mn: Tensor, V_nn: Tensor, weights_n: Tensor, count: int) -> State:
    """What stays the same between two choices, singular values rising as eigenvalues do.

    Args:
        teacher_mn, V_nn: tall teachers (rows, m, n) and their right singular vectors, falling.
        weights_n: (rows, n), in the order of falling singular values, at most `count` of them above 0.

    Returns:
        V; root, p (rows, n or k); steps, p_i - p_j (rows, n, n or k); T~ as low_rank (rows, m, n) or, where k = `count`
        directions are few, as left (rows, m, k) @ right (rows, n, k)^T, with the index (rows, k) of the selected ones.
    """
    root_n = weights_n.sqrt().flip(-1)
    fixed = {"V": V_nn, "root": root_n}
    rising_nn = V_nn.flip(-1)
    if 2 * count < weights_n.shape[-1]:
        fixed["index"] = root_n.topk(count).indices
        fixed["root"] = root_n.gather(-1, fixed["index"])
        fixed["right"] = columns(rising_nn, fixed["index"])
        fixed["left"] = teacher_mn @ fixed["right"] * fixed["root"].unsqueeze(-2)
    else:
        fixed["low_rank"] = teacher_mn @ _projection(rising_nn, root_n)
    fixed["steps"] = root_n.unsqueeze(-1) - fixed["root"].unsqueeze(-2)
    return fixed


def _aligned(student_mn: Tensor, fixed: State, driver: str, smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses (rows,) and gradients (rows, m, n) of tall students; see this file's head.

    The student enters the second term as (A / a)^T and (A / a) around F * a^2, so that its unit a does not matter.
    """
    unit_mn, _ = unit_scale(student_mn)
    lambda_n, V_nn = eigenbasis(unit_mn, driver)  # sigma^2, rising
    if "index" in fixed:
        return _aligned_along_few(student_mn, unit_mn, fixed, lambda_n, V_nn, smoothing)
    P_nn = _projection(V_nn, fixed["root"])
    R_mn = torch.baddbmm(fixed["low_rank"], student_mn, P_nn, beta=-1)
    B_nn = V_nn.mT @ (unit_mn.mT @ R_mn) @ V_nn
    S_nn = _divided_differences(lambda_n, lambda_n, fixed["steps"], smoothing) * (B_nn + B_nn.mT)
    D_mn = torch.baddbmm(unit_mn @ (V_nn @ S_nn @ V_nn.mT), R_mn, P_nn, beta=2, alpha=2)
    return R_mn.square().sum((-2, -1)), D_mn


def _aligned_along_few(
    student_mn: Tensor, unit_mn: Tensor, fixed: State, lambda_n: Tensor, V_nn: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """With Y = V S_nk, where the rows of S in K are halved, V S V^T is Y V_K^T + V_K Y^T."""
    index_k, root_k = fixed["index"], fixed["root"].unsqueeze(-2)
    V_nk = columns(V_nn, index_k)
    R_mn = torch.baddbmm(fixed["left"] @ fixed["right"].mT, student_mn @ V_nk * root_k, V_nk.mT, beta=-1)
    unit_V_mk, R_V_mk = unit_mn @ V_nk, R_mn @ V_nk
    F_nk = _divided_differences(lambda_n, lambda_n.gather(-1, index_k), fixed["steps"], smoothing)
    S_nk = F_nk * (V_nn.mT @ (unit_mn.mT @ R_V_mk + R_mn.mT @ unit_V_mk))
    halved_n = torch.ones_like(lambda_n).scatter(-1, index_k, 0.5)
    Y_nk = V_nn @ (halved_n.unsqueeze(-1) * S_nk)
    D_mn = torch.baddbmm(unit_V_mk @ Y_nk.mT, R_V_mk * root_k + unit_mn @ Y_nk, V_nk.mT, beta=2, alpha=2)
    return R_mn.square().sum((-2, -1)), D_mn


def _projection(V_nn: Tensor, root_n: Tensor) -> Tensor:
    """P = V diag(p) V^T."""
    return (V_nn * root_n.unsqueeze(-2)) @ V_nn.mT


def _divided_differences(lambda_i: Tensor, lambda_j: Tensor, steps: Tensor, smoothing: float) -> Tensor:
    """F (rows, i, j) = (p_i - p_j) / (lambda_i - lambda_j), where lambda_i has all eigenvalues, the largest one last.

    Where two singular values coincide but their weights differ the loss has no derivative; x / (x^2 + eps^2) instead of
    1 / x then gives 0 (the mean over the two orders) in place of infinity, and differs from 1 / x by (eps / x)^2
    elsewhere. x is in units of sigma_0^2; eps is the smoothing, or what rounding asks for.
    """
    largest = lambda_i[..., -1:].clamp(min=_SMALLEST).unsqueeze(-1)
    gap = (lambda_i.unsqueeze(-1) - lambda_j.unsqueeze(-2)) / largest
    eps = max(smoothing, 100 * torch.finfo(gap.dtype).eps)
    return steps * gap / (gap.square().add_(eps**2).mul_(largest))
