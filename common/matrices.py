"""Matrix views and decompositions below the DSKD loss. Suffixes name shapes: `V_nr` is (..., n, r), r = min(m, n)."""

from collections.abc import Sequence

import torch
from torch import Tensor

DRIVERS = ("gram", "svd")


def right_singular(matrix: Tensor, driver: str) -> tuple[Tensor, Tensor]:
    """Singular values (..., n), falling, and right singular vectors (..., n, n) of a tall (..., m, n) matrix.

    driver "svd" is LAPACK's / cuSOLVER's full decomposition; "gram" takes the eigenvectors of W^T W, which is 2 to 3
    times cheaper and as accurate for all directions with sigma_i well above sqrt(machine epsilon) * sigma_0.
    """
    if driver == "svd":
        _, sigma_n, Vh_nn = torch.linalg.svd(matrix, full_matrices=False)
        return sigma_n, Vh_nn.mT
    if driver == "gram":
        scaled = unit_scale(matrix)  # squares of AdamW updates would leave float32's range otherwise
        eigenvalues_n, V_nn = torch.linalg.eigh(scaled.mT @ scaled)
        sigma_n = eigenvalues_n.flip(-1).clamp(min=0).sqrt() * largest_entry(matrix).squeeze(-1)
        return sigma_n, V_nn.flip(-1)
    raise ValueError(f"driver must be one of {', '.join(DRIVERS)}, got {driver!r}")


def inner_product(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """sum <D, W> over lists of tensors, each pair of one shape and memory layout."""
    return torch.stack(
        [
            (torch.dot(flat(D), flat(W.to(D.dtype))) if D.stride() == W.stride() else (D * W).sum())
            for D, W in zip(gradients, weights, strict=True)
        ]
    ).sum()


def flat(tensor: Tensor) -> Tensor:
    """All elements in storage order, without a copy for contiguous and channels_last tensors."""
    return tensor.reshape(-1) if tensor.is_contiguous() else tensor.movedim(1, -1).reshape(-1)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as a matrix: (out, in, kh, kw) becomes (out, in * kh * kw)."""
    return weight.flatten(1)


def tall(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if it is wider than high."""
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def working(tensor: Tensor) -> Tensor:
    """In the precision that the method works in: float64 stays, all others become float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def largest_entry(matrix: Tensor) -> Tensor:
    """(..., 1, 1), the largest absolute entry."""
    return matrix.abs().amax((-2, -1), keepdim=True)


def unit_scale(matrix: Tensor) -> Tensor:
    """Largest entry 1, so that products of four factors stay within float32's range; a zero matrix stays zero."""
    largest = largest_entry(matrix)
    return matrix / torch.where(largest > 0, largest, 1.0)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
