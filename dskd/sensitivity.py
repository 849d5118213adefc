"""Which directions of an update matter: their scores, and the weights of the selected ones (docs/method.md).

Shapes: matrices are (..., m, n) with any leading batch dimensions and r = min(m, n); suffixes name them (`V_nq` is
n x q). Every formula is symmetric under transposition, so wide matrices are turned (`tall`) and m >= n holds inside.
Nothing needs the left singular vectors: sigma_i u_i is W v_i, which stays accurate where sigma_i is tiny.

A score is a function of tall updates (..., m, n), the gradients (..., m, n) at those steps, the leading singular
values (..., q) and right singular vectors (..., n, q) of the updates, and the progress of the training in [0, 1]. It
gives (..., q) scores, whatever their scale.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from .matrices import is_whole, right_singular, shape_of, tall, unit_scale, working
from .precision import in_full_precision

Score = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def sensitivity(update_mn: Tensor, grad_mn: Tensor, sigma_q: Tensor, V_nq: Tensor, progress: float) -> Tensor:
    """J, the method's score: first order (g) early in the training, second order (c) late."""
    return _blend(*_orders(update_mn, grad_mn, V_nq), progress)


def tempered(update_mn: Tensor, grad_mn: Tensor, sigma_q: Tensor, V_nq: Tensor, progress: float) -> Tensor:
    """J with sqrt(c_i) in place of c_i, which spreads the second order over more directions."""
    first, second = _orders(update_mn, grad_mn, V_nq)
    return _blend(first, second.sqrt(), progress)


def magnitude(update_mn: Tensor, grad_mn: Tensor, sigma_q: Tensor, V_nq: Tensor, progress: float) -> Tensor:
    """The singular value of the update, which asks nothing of the gradient."""
    return sigma_q


def _orders(update_mn: Tensor, grad_mn: Tensor, V_nq: Tensor) -> tuple[Tensor, Tensor]:
    """g_i = sigma_i |u_i^T G v_i| and c_i = 1/2 sigma_i^2 (u_i^T G G^T u_i)(v_i^T G^T G v_i)."""
    scaled_left_mq = update_mn @ V_nq  # sigma_i u_i
    grad_right_mq = grad_mn @ V_nq
    first = (scaled_left_mq * grad_right_mq).sum(-2).abs()
    second = 0.5 * (grad_mn.mT @ scaled_left_mq).square().sum(-2) * grad_right_mq.square().sum(-2)
    return first, second


def _blend(first: Tensor, second: Tensor, progress: float) -> Tensor:
    return (1.0 - progress) * _share_of_sum(first) + progress * _share_of_sum(second)


def _share_of_sum(scores: Tensor) -> Tensor:
    total = scores.sum(-1, keepdim=True)
    return scores / torch.where(total > 0, total, 1.0)


@in_full_precision
def direction_sensitivity(update: Tensor, grad: Tensor, alpha: float, driver: str = "svd", rank: int = 0) -> Tensor:
    """Sensitivity J of every singular direction of a parameter update (method.md, steps 1 to 3).

    J_i = (1 - alpha) g_i / sum(g) + alpha c_i / sum(c), with first order g_i = sigma_i |u_i^T G v_i| and second order
    c_i = 1/2 sigma_i^2 (u_i^T G G^T u_i)(v_i^T G^T G v_i), the Kronecker-factored empirical Fisher (Martens & Grosse,
    ICML 2015) as curvature. The scales of update and gradient cancel.

    Args:
        update: (..., m, n), the weight after the optimizer step minus the weight before it.
        grad: (..., m, n), the gradient at that step.
        alpha: training progress in [0, 1]: gradient rules at 0, curvature at 1.
        driver: the decomposition, see `right_singular`.
        rank: how many directions are to be selected, for the driver "randomized", which scores 32 more and gives 0 to
            those that it does not look for.

    Returns:
        (..., r) scores in the order of falling singular values of `update`; they sum to 1. A term whose sum is zero
        (zero update or zero gradient) counts as zero, so that all scores of such a matrix are 0.

    Raises:
        ValueError: shapes differ or alpha lies outside [0, 1].
    """
    if update.shape != grad.shape or update.ndim < 2:
        raise ValueError(f"update and grad must be matrices of one shape, got {shape_of(update)} and {shape_of(grad)}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha (training progress) must lie in [0, 1], got {alpha}")
    update_mn, grad_mn = (unit_scale(tall(working(t.detach())))[0] for t in (update, grad))
    return scored_directions(sensitivity, update_mn, grad_mn, alpha, driver, rank)[0]


def scored_directions(
    score: Score, update_mn: Tensor, grad_mn: Tensor, progress: float, driver: str, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (..., n) of tall matrices of unit scale, 0 where the driver does not look; sigma (..., q); V."""
    n = update_mn.shape[-1]
    sigma_q, V_nq = right_singular(update_mn, driver, selected_count(rank, n))
    scores_q = score(update_mn, grad_mn, sigma_q, V_nq, progress)
    return padded(scores_q, n), sigma_q, V_nq


def padded(values_q: Tensor, n: int) -> Tensor:
    """(..., n), zeros behind the q values."""
    return pad(values_q, (0, n - values_q.shape[-1]))


def select_directions(scores: Tensor, rank: int) -> Tensor:
    """Weights of the `rank` directions with the largest scores (method.md, steps 4 and 5).

    Over the selected set K the scores are min-max normalised and divided by their sum; everything outside K weighs 0.
    Equal scores: the lower index (larger singular value) is taken first, and a set of equal scores weighs uniformly.

    Args:
        scores: (..., r) finite scores.
        rank: size of K; 0 or anything above r means all r directions.

    Returns:
        (..., r) weights, non-negative, each row summing to 1, in the order of `scores`.

    Raises:
        ValueError: rank is negative.
    """
    k = selected_count(rank, scores.shape[-1])
    top, index = torch.sort(scores, dim=-1, descending=True, stable=True)
    top, index = top[..., :k], index[..., :k]
    above_least = top - top[..., -1:]
    total = above_least.sum(-1, keepdim=True)
    weights = torch.where(total > 0, above_least / total, 1.0 / k)
    return torch.zeros_like(scores).scatter(-1, index, weights)


def uniform_weights(student_mn: Tensor, rank: int) -> Tensor:
    """Weights (rows, r) before the first choice: alike on the `rank` leading directions."""
    r = min(student_mn.shape[-2:])
    scores = torch.zeros(r, dtype=student_mn.dtype, device=student_mn.device)
    return select_directions(scores, rank).expand(len(student_mn), r)


def selected_count(rank: int, r: int) -> int:
    """How many of r directions a rank setting selects: 0 or more than r means all."""
    return min(rank, r) if check_rank(rank) else r


def check_score(score: Score) -> None:
    if not callable(score):
        raise TypeError(f"score must be a function such as dskd.sensitivity.tempered, got {score!r}")


def check_rank(rank: int) -> int:
    if not is_whole(rank, 0):
        raise ValueError(f"rank must be 0 (all directions) or a positive whole number, got {rank!r}")
    return rank
