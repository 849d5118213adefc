"""The rival of the method: a full SVD of every matched matrix in every step, with autograd through it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def per_step_svd_loss(pairs: Sequence[tuple[str, Tensor, Tensor]], weights: dict[str, Tensor]) -> Tensor:
    """Mean over pairs of || W~_s - W~_t ||_F^2, everything decomposed anew."""
    losses = []
    for name, student, teacher in pairs:
        aligned = []
        for matrix in (student.flatten(1), teacher.detach().flatten(1)):
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            aligned.append((U * (weights[name].sqrt() * S)) @ Vh)
        losses.append((aligned[0] - aligned[1]).square().sum())
    return torch.stack(losses).mean()
