"""How far apart two matrices are along weighted directions: the losses of the readings `own`, `update`, `curvature`.

The gradient of `own` (docs/method.md, "The gradient of `own`"). With p = sqrt(w), P = V diag(p) V^T and
H = 2 (A P - T~), with respect to the student's tall matrix A it is

    D = H P + A V S V^T,   S = 2 F o sym(V^T A^T H V),   F_ij = (p_i - p_j) / (sigma_i^2 - sigma_j^2),  F_ii = 0.

Only the k selected directions have p > 0, and S vanishes where neither index is selected. Few directions: every product
takes k columns, m n k operations. Many: n x n matrices first, six products of m n^2 operations in all.

Between two close singular values 1 / (sigma_i^2 - sigma_j^2) is large, and turns over as soon as the weights move by
about their gap. `smoothing` replaces 1 / x by x / (x^2 + smoothing^2), x in units of sigma_0^2, which is roughly the
mean over such movements and stays right for longer.
"""

import torch
from torch import Tensor

from common.matrices import columns, right_singular, shape_of, tall, without_autocast, working


@without_autocast
def low_rank_alignment(
    student: Tensor, teacher: Tensor, weights: Tensor, driver: str = "svd", smoothing: float = 0.0
) -> Tensor:
    """Alignment loss of the reading `own`: || W~_s - W~_t ||_F^2 with W~ = sum_i sqrt(w_i) sigma_i u_i v_i^T.

    Each network's *own* singular triplets are taken; index i pairs the student's i-th with the teacher's i-th. The
    gradient with respect to `student` is in closed form (docs/method.md), exact unless smoothed, and stays finite for
    rank-deficient, all-zero and repeated-singular-value matrices; `teacher` and `weights` are constants.

    Args:
        student, teacher: (..., m, n).
        weights: (..., r) from `select_directions`.
        driver: the decomposition, see `right_singular`.
        smoothing: of the gradient between close singular values (above, in this file); 0 = exact.

    Returns:
        (...) losses, one a matrix, in float32 or better.

    Raises:
        ValueError: shapes do not match.
    """
    _check_shapes(student, teacher, weights)
    student_mn, teacher_mn = tall(working(student)), tall(working(teacher.detach()))
    _, teacher_V_nn = right_singular(teacher_mn, driver)
    weights = weights.detach().to(student_mn.dtype)
    count = int((weights > 0).sum(-1).max()) if weights.numel() else 0
    return own_alignment(student_mn, teacher_mn, teacher_V_nn, weights, max(count, 1), driver, smoothing)


@without_autocast
def update_alignment(student: Tensor, teacher: Tensor, weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Alignment loss of the reading `update`: sum_i w_i (u_i^T (W_s - W_t) v_i)^2 along the directions of an update.

    Args:
        student, teacher: (..., m, n).
        weights: (..., k) weights of the directions.
        left, right: (..., m, k) and (..., n, k), the directions u_i and v_i as columns.

    Returns:
        (...) losses, differentiable by autograd.
    """
    gap_mn = working(student) - working(teacher.detach())
    along_k = (left * (gap_mn @ right)).sum(-2)
    return (weights * along_k.square()).sum(-1)


@without_autocast
def curvature_alignment(student: Tensor, teacher: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Alignment loss of the reading `curvature`: (s / r) tr(D^T A D B), D = W_s - W_t, r = min(m, n).

    That is (s / r) sum_ij a_i b_j (u_i^T D v_j)^2 along the eigenvectors u_i of A and v_j of B: the change of the loss
    in a Kronecker-factored quadratic model (Martens & Grosse, ICML 2015) for a step from student to teacher. The factor
    s = ||D|| / ||A D B||, a constant for the gradient, gives it the norm of that of ||D||^2 / r, so that lambda means
    the same whatever the curvature's scale. With A = B = 1 it is ||D||^2 / r.

    Args:
        student, teacher: (..., m, n).
        left, right: (..., m, m) and (..., n, n), the factors A and B, symmetric and without negative eigenvalues.

    Returns:
        (...) losses, differentiable once by autograd but for s.
    """
    gap_mn = working(student) - working(teacher.detach())
    pull_mn = left @ gap_mn.detach() @ right
    gap, pull = (torch.linalg.matrix_norm(matrix) for matrix in (gap_mn.detach(), pull_mn))
    scale = gap / torch.where(pull > 0, pull, 1.0)
    product = (gap_mn * pull_mn).sum((-2, -1))  # of whose gradient, 2 A D B, this is one half
    return scale * (2 * product - product.detach()) / min(gap_mn.shape[-2:])


def own_alignment(
    student_mn: Tensor,
    teacher_mn: Tensor,
    teacher_V_nn: Tensor,
    weights_n: Tensor,
    count: int,
    driver: str,
    smoothing: float = 0.0,
) -> Tensor:
    """Losses (...) of tall matrices (..., m, n), of whose weights (..., n) at most `count` are above zero."""
    root_n = weights_n.sqrt()
    index_k = weights_n.topk(count).indices if 2 * count < weights_n.shape[-1] else None
    teacher_low_rank_mn = _weighted(teacher_mn, teacher_V_nn, root_n, index_k)
    return _OwnAlignment.apply(student_mn, teacher_low_rank_mn, root_n, index_k, driver, smoothing)


class _OwnAlignment(torch.autograd.Function):
    """|| A P - T~ ||_F^2, where P comes from A's own right singular vectors; `index_k` is None for many directions."""

    @staticmethod
    def forward(ctx, student_mn, teacher_low_rank_mn, root_n, index_k, driver, smoothing):
        sigma_n, V_nn = right_singular(student_mn, driver)
        difference_mn = _weighted(student_mn, V_nn, root_n, index_k) - teacher_low_rank_mn
        if ctx.needs_input_grad[0]:
            gradient = _gradient_of_many if index_k is None else _gradient_of_few
            ctx.save_for_backward(gradient(student_mn, difference_mn, sigma_n, V_nn, root_n, index_k, smoothing))
        return difference_mn.square().sum((-2, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient_mn,) = ctx.saved_tensors
        return grad_output[..., None, None] * gradient_mn, None, None, None, None, None


def _weighted(matrix_mn: Tensor, V_nn: Tensor, root_n: Tensor, index_k: Tensor | None) -> Tensor:
    """W~ = W P = sum_i p_i sigma_i u_i v_i^T."""
    if index_k is None:
        return matrix_mn @ _projection(V_nn, root_n)
    V_nk, root_k = columns(V_nn, index_k), root_n.gather(-1, index_k)
    return (matrix_mn @ V_nk * root_k.unsqueeze(-2)) @ V_nk.mT


def _projection(V_nn: Tensor, root_n: Tensor) -> Tensor:
    return (V_nn * root_n.unsqueeze(-2)) @ V_nn.mT


def _gradient_of_many(
    student_mn: Tensor, difference_mn: Tensor, sigma_n: Tensor, V_nn: Tensor, root_n: Tensor, _: None, smoothing: float
) -> Tensor:
    F_nn, scale = _divided_differences(sigma_n, sigma_n, root_n, root_n, smoothing)
    unit_mn = student_mn / scale
    Q_nn = V_nn.mT @ (unit_mn.mT @ difference_mn) @ V_nn  # half of V^T A^T H V
    S_nn = 2 * F_nn * (Q_nn + Q_nn.mT)
    return difference_mn @ (2 * _projection(V_nn, root_n)) + unit_mn @ (V_nn @ S_nn @ V_nn.mT)


def _gradient_of_few(
    student_mn: Tensor,
    difference_mn: Tensor,
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
    unit_V_mk, H_V_mk = unit_mn @ V_nk, 2 * (difference_mn @ V_nk)
    S_nk = F_nk * (V_nn.mT @ (unit_mn.mT @ H_V_mk + 2 * (difference_mn.mT @ unit_V_mk)))
    halved_n = torch.ones_like(sigma_n).scatter(-1, index_k, 0.5)
    Y_nk = V_nn @ (halved_n.unsqueeze(-1) * S_nk)
    return (H_V_mk * root_k.unsqueeze(-2) + unit_mn @ Y_nk) @ V_nk.mT + unit_V_mk @ Y_nk.mT


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


def _check_shapes(student: Tensor, teacher: Tensor, weights: Tensor) -> None:
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(f"student {shape_of(student)} and teacher {shape_of(teacher)} must be matrices of one shape")
    expected = (*student.shape[:-2], min(student.shape[-2:]))
    if tuple(weights.shape) != expected:
        raise ValueError(f"weights must have the shape {expected}, got {shape_of(weights)}")
