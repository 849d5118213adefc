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

FACTORS = ("full", "diagonal")


@dataclass(frozen=True, repr=False)
class Curvature(Reading):
    """L = (s / r) tr(D^T A D B), D = W_s - W_t, r = min(m, n).

    The factor s = ||D|| / ||A D B||, a constant for the gradient, gives it the norm of that of ||D||^2 / r, so that
    lambda means the same whatever the curvature's scale. Until the first choice A and B are identities.

    Args:
        memory: share of the former factors that stays when a gradient is added: 0.95 is a mean over about 20. With a
            gradient every k-th step (svd_steps k), 0.95**k remembers as many steps.
        factors: "full", m^2 + n^2 numbers a matrix, or "diagonal", which keeps no more than the diagonal of the larger
            factor: about min(m, n)^2 numbers. A square matrix has two full ones in both cases.

    Raises:
        ValueError: memory outside [0, 1), unknown factors.
    """

    memory: float = 0.95
    factors: str = "full"
    gradual = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.memory < 1.0:
            raise ValueError(f"memory must lie in [0, 1), got {self.memory}")
        if self.factors not in FACTORS:
            raise ValueError(f"factors must be one of {', '.join(FACTORS)}, got {self.factors!r}")

    def start(self, student_mn: Tensor) -> State:
        m, n = student_mn.shape[-2:]
        diagonal = self.factors == "diagonal"
        sides = {"left": (m, diagonal and m > n), "right": (n, diagonal and n > m)}
        return {side: _identities(student_mn, size, thin) for side, (size, thin) in sides.items()}

    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        """The factors `left` (rows, m, m) and `right` (rows, n, n) with one gradient more in their running means.

        A diagonal is (rows, m) or (rows, n).
        """
        left, right = add_curvature(chosen["left"], chosen["right"], gradient_mn, 1.0 - self.memory)
        return {"left": left, "right": right}

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        gap_mn, size = unit_scale(student_mn - target["teacher"])
        pull_mn, _ = unit_scale(self.weighed(gap_mn, chosen))
        gap, pull = (torch.linalg.matrix_norm(matrix, keepdim=True) for matrix in (gap_mn, pull_mn))
        step = gap / pull.clamp(min=1.0) / min(gap_mn.shape[-2:]) * size  # of unit scale a norm is 1 or more, or 0
        value = (gap_mn * pull_mn).sum((-2, -1), keepdim=True) * step * size
        return value[..., 0, 0], pull_mn * (2 * step)

    def weighed(self, gap_mn: Tensor, chosen: State) -> Tensor:
        """A D B."""
        left, right = chosen["left"], chosen["right"]
        half_mn = left @ gap_mn if left.ndim == 3 else left.unsqueeze(-1) * gap_mn
        return half_mn @ right if right.ndim == 3 else half_mn * right.unsqueeze(-2)

    def weights(self, chosen: State) -> Tensor:
        """The eigenvalues (rows, r) of the smaller factor (the right of two equal ones), falling, by their sum."""
        smaller = min(chosen["right"], chosen["left"], key=lambda factor: factor.shape[-1])
        eigenvalues: Tensor = torch.linalg.eigvalsh(smaller)
        return eigenvalues.flip(-1).clamp(min=0) / smaller.shape[-1]


def _identities(matrix_mn: Tensor, size: int, thin: bool) -> Tensor:
    one = matrix_mn.new_ones(size)
    one = one if thin else one.diag()
    return one.expand(len(matrix_mn), *one.shape)


def add_curvature(left: Tensor, right: Tensor, grad: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Running means of G G^T and G^T G, each scaled to a mean eigenvalue of 1 (method.md, `curvature`).

    Args:
        left, right: (pairs, m, m) and (pairs, n, n), the means so far, or (pairs, m) and (pairs, n), their diagonals.
        grad: (pairs, m, n), finite; a zero gradient adds zeros.
        share: of the new products in the means, in (0, 1].

    Returns:
        The new means, in new memory.
    """
    grad_mn, _ = unit_scale(grad)
    total = grad_mn.square().sum((-2, -1), keepdim=True)
    unit_mn = grad_mn / torch.where(total > 0, total, 1.0).sqrt()
    return _add_products(left, unit_mn, share), _add_products(right, unit_mn.mT, share)


def _add_products(mean: Tensor, unit_mn: Tensor, share: float) -> Tensor:
    m = unit_mn.shape[-2]
    if mean.ndim == 3:
        return torch.baddbmm(mean, unit_mn, unit_mn.mT, beta=1.0 - share, alpha=share * m)
    return torch.lerp(mean, m * unit_mn.square().sum(-1), share)
