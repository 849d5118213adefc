"""Which directions of an update matter: their sensitivities, and the weights of the selected ones (docs/method.md).

Shapes: matrices are (..., m, n) with any leading batch dimensions and r = min(m, n); suffixes name them (`V_nq` is
n x q). Every formula is symmetric under transposition, so wide matrices are turned (`tall`) and m >= n holds inside.
Nothing needs the left singular vectors: sigma_i u_i is W v_i, which stays accurate where sigma_i is tiny.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.matrices import right_singular, shape_of, tall, unit_scale, without_autocast, working


@without_autocast
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
    update_mn, grad_mn = (unit_scale(tall(working(t.detach()))) for t in (update, grad))
    _, V_nq = right_singular(update_mn, driver, selected_count(rank, update_mn.shape[-1]))
    return score_directions(update_mn, grad_mn, V_nq, alpha)


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


def selected_count(rank: int, r: int) -> int:
    """How many of r directions a rank setting selects: 0 or more than r means all."""
    if rank < 0:
        raise ValueError(f"rank must be 0 (all directions) or positive, got {rank}")
    return min(rank, r) if rank else r


def score_directions(update_mn: Tensor, grad_mn: Tensor, V_nq: Tensor, alpha: float, tempered: bool = False) -> Tensor:
    """J of the directions V_nq of tall updates, with sqrt(c) for c if `tempered`, and 0 of the other n - q."""
    scaled_left_mq = update_mn @ V_nq  # sigma_i u_i
    grad_right_mq = grad_mn @ V_nq
    first_order = (scaled_left_mq * grad_right_mq).sum(-2).abs()
    second_order = 0.5 * (grad_mn.mT @ scaled_left_mq).square().sum(-2) * grad_right_mq.square().sum(-2)
    second_order = second_order.sqrt() if tempered else second_order
    scores = (1.0 - alpha) * _share_of_sum(first_order) + alpha * _share_of_sum(second_order)
    return pad(scores, (0, V_nq.shape[-2] - V_nq.shape[-1]))


def add_curvature(left: Tensor, right: Tensor, grad: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Running means of G G^T and G^T G, each scaled to a mean eigenvalue of 1 (method.md, `curvature`).

    Args:
        left, right: (pairs, m, m) and (pairs, n, n), the means so far.
        grad: (pairs, m, n), finite; a zero gradient adds zeros.
        share: of the new products in the means, in (0, 1].

    Returns:
        The new means, in new memory.
    """
    grad_mn = unit_scale(grad)
    total = grad_mn.square().sum((-2, -1), keepdim=True)
    unit_mn = grad_mn / torch.where(total > 0, total, 1.0).sqrt()
    m, n = grad.shape[-2:]
    return (
        torch.baddbmm(left, unit_mn, unit_mn.mT, beta=1.0 - share, alpha=share * m),
        torch.baddbmm(right, unit_mn.mT, unit_mn, beta=1.0 - share, alpha=share * n),
    )


def _share_of_sum(scores: Tensor) -> Tensor:
    total = scores.sum(-1, keepdim=True)
    return scores / torch.where(total > 0, total, 1.0)
