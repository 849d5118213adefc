"""`Curvature`: a pull towards the teacher that is weighted by a Kronecker-factored Fisher. Ours, not the paper's.

The gap D = W_s - W_t is weighed by running means A of G G^T and B of G^T G over the gradients G of the student's
weight: L = (s / r) tr(D^T A D B). That is K-FAC's quadratic model (Martens & Grosse, ICML 2015) around the teacher, so
a Kronecker-factored online EWC (Kirkpatrick et al., PNAS 2017; Ritter, Botev & Barber, NeurIPS 2018). It has none of
the method's choice of directions: all pairs of eigenvectors of A and B count, by the product of their eigenvalues.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrices import unit_scale
from .reading import Reading, State


@dataclass(frozen=True, repr=False)
class Curvature(Reading):
    """L = (s / r) tr(D^T A D B), D = W_s - W_t, r = min(m, n).

    The factor s = ||D|| / ||A D B||, a constant for the gradient, gives it the norm of that of ||D||^2 / r, so that
    lambda means the same whatever the curvature's scale. Until the first choice A and B are identities.

    Args:
        memory: share of the former factors that stays when a gradient is added: 0.95 is a mean over about 20.

    Raises:
        ValueError: memory outside [0, 1).
    """

    memory: float = 0.95
    gradual = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.memory < 1.0:
            raise ValueError(f"memory must lie in [0, 1), got {self.memory}")

    def start(self, student_mn: Tensor) -> State:
        return {"left": _identities(student_mn, -2), "right": _identities(student_mn, -1)}

    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        """The factors `left` (rows, m, m) and `right` (rows, n, n) with one gradient more in their running means."""
        left, right = add_curvature(chosen["left"], chosen["right"], gradient_mn, 1.0 - self.memory)
        return {"left": left, "right": right}

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        gap_mn = student_mn - target["teacher"]
        pull_mn = chosen["left"] @ gap_mn @ chosen["right"]
        gap, pull = (torch.linalg.matrix_norm(matrix) for matrix in (gap_mn, pull_mn))
        scale = gap / torch.where(pull > 0, pull, 1.0) / min(gap_mn.shape[-2:])
        return scale * (gap_mn * pull_mn).sum((-2, -1)), pull_mn * (2 * scale)[..., None, None]

    def weights(self, chosen: State) -> Tensor:
        """The eigenvalues (rows, r) of the smaller factor (the right of two equal ones), falling, by their sum."""
        smaller = min(chosen["right"], chosen["left"], key=lambda factor: factor.shape[-1])
        eigenvalues: Tensor = torch.linalg.eigvalsh(smaller)
        return eigenvalues.flip(-1).clamp(min=0) / smaller.shape[-1]


def _identities(matrix_mn: Tensor, side: int) -> Tensor:
    size = matrix_mn.shape[side]
    eye = torch.eye(size, dtype=matrix_mn.dtype, device=matrix_mn.device)
    return eye.expand(len(matrix_mn), size, size)


def add_curvature(left: Tensor, right: Tensor, grad: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Running means of G G^T and G^T G, each scaled to a mean eigenvalue of 1 (method.md, `curvature`).

    Args:
        left, right: (pairs, m, m) and (pairs, n, n), the means so far.
        grad: (pairs, m, n), finite; a zero gradient adds zeros.
        share: of the new products in the means, in (0, 1].

    Returns:
        The new means, in new memory.
    """
    grad_mn, _ = unit_scale(grad)
    total = grad_mn.square().sum((-2, -1), keepdim=True)
    unit_mn = grad_mn / torch.where(total > 0, total, 1.0).sqrt()
    m, n = grad.shape[-2:]
    return (
        torch.baddbmm(left, unit_mn, unit_mn.mT, beta=1.0 - share, alpha=share * m),
        torch.baddbmm(right, unit_mn.mT, unit_mn, beta=1.0 - share, alpha=share * n),
    )
