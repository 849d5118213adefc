"""The gradient of the authors' release, for comparison: not the gradient of the loss that it is reported beside."""

import torch
from torch import Tensor


def released_gradient(student: Tensor, teacher_low_rank: Tensor, weights: Tensor) -> Tensor:
    """Back-propagation of || W~_s - W~_t ||_F^2 through the right singular vectors of the student alone.

    W~_s = U diag(sqrt(w) sigma) V^T, where U and sigma count as constants. What is not finite, which repeated and
    vanishing singular values bring about, becomes 0. Unlike the method itself this is not symmetric under
    transposition: the matrix must be given as the network has it, (out, in).

    Args:
        student: (m, n).
        teacher_low_rank: (m, n), W~_t.
        weights: (r,) of the directions, r = min(m, n).

    Returns:
        (m, n).
    """
    student = student.detach().requires_grad_()
    with torch.enable_grad():
        U_mr, sigma_r, Vh_rn = torch.linalg.svd(student, full_matrices=False)
        aligned = (U_mr.detach() * (weights.sqrt() * sigma_r.detach())) @ Vh_rn
        (gradient,) = torch.autograd.grad((aligned - teacher_low_rank).square().sum(), student)
    return torch.where(gradient.isfinite(), gradient, 0.0)
