"""Matrix views and decompositions below the DSKD loss. Suffixes name shapes: `V_nr` is (..., n, r), r = min(m, n)."""

import warnings
from collections.abc import Sequence
from functools import cache
from numbers import Integral

import torch
from torch import Tensor

from .sharding import largest_over_parts, local, sharded_like, sum_over_parts

DRIVERS = ("gram", "svd", "randomized")
_OVERSAMPLING = 32
_POWER_ITERATIONS = 2


def check_driver(driver: str) -> None:
    if driver not in DRIVERS:
        raise ValueError(f"driver must be one of {', '.join(DRIVERS)}, got {driver!r}")


def right_singular(matrix: Tensor, driver: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Singular values (..., q), falling, and right singular vectors (..., n, q) of a tall (..., m, n) matrix.

    Args:
        matrix: (..., m, n), m >= n.
        driver: "svd", LAPACK's / cuSOLVER's full decomposition; "gram", the eigenvectors of W^T W, 2 to 3 times
            cheaper and as accurate for all directions with sigma_i well above sqrt(machine epsilon) * sigma_0;
            "randomized", subspace iteration from a fixed random start (Halko, Martinsson & Tropp, SIAM Review 2011,
            Algorithm 4.4), which finds some leading directions only, better the faster singular values fall.
        count: how many leading directions "randomized" must find (`None`: all, by "gram"). The others find all, q = n.

    Raises:
        ValueError: an unknown driver.
    """
    unit_mn, largest = unit_scale(matrix)  # squares of AdamW updates would leave float32's range
    sigma_q, V_nq = right_singular_of_unit(unit_mn, driver, count)
    return sigma_q * largest.squeeze(-1), V_nq


def right_singular_of_unit(matrix: Tensor, driver: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """As `right_singular`, of a matrix of unit scale."""
    check_driver(driver)
    if driver == "svd":
        _, sigma_n, Vh_nn = torch.linalg.svd(matrix, full_matrices=False)
        return sigma_n, Vh_nn.mT
    if driver == "gram" or count is None or 2 * (count + _OVERSAMPLING) > matrix.shape[-1]:
        eigenvalues_n, V_nn = eigh(matrix.mT @ matrix)
        return eigenvalues_n.flip(-1).clamp(min=0).sqrt(), V_nn.flip(-1)
    basis_nq = torch.linalg.qr(matrix.mT @ _random_start(matrix, count + _OVERSAMPLING))[0]
    for _ in range(_POWER_ITERATIONS):
        basis_nq = torch.linalg.qr(matrix.mT @ (matrix @ basis_nq))[0]
    projected_mq = matrix @ basis_nq
    eigenvalues_q, rotation_qq = eigh(projected_mq.mT @ projected_mq)
    return eigenvalues_q.flip(-1).clamp(min=0).sqrt(), basis_nq @ rotation_qq.flip(-1)


def eigenbasis(unit_mn: Tensor, driver: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (rows, n), rising, and eigenvectors (rows, n, n) of A^T A."""
    if driver == "svd":
        sigma_n, V_nn = right_singular_of_unit(unit_mn, driver)
        return sigma_n.square().flip(-1), V_nn.flip(-1)
    lambda_n, V_nn = eigh(unit_mn.mT @ unit_mn)
    return lambda_n, V_nn


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), rising, and eigenvectors (..., n, n) of symmetric matrices (..., n, n).

    A matrix that the device's solver gives up on (cuSOLVER's may, on low rank) is decomposed on the CPU in float64.
    """
    try:
        lambda_n, V_nn = torch.linalg.eigh(matrix)
        return lambda_n, V_nn
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of the solver, or of torch in its name
        if matrix.ndim > 2:
            each = [eigh(one) for one in matrix]
            return torch.stack([one[0] for one in each]), torch.stack([one[1] for one in each])
        lambda_n, V_nn = torch.linalg.eigh(matrix.cpu().double())
    _say_once(f"a matrix could not be decomposed on {matrix.device.type} and was on the CPU in float64, which is slow")
    return lambda_n.to(matrix), V_nn.to(matrix)


@cache
def _say_once(text: str) -> None:
    warnings.warn(f"DSKD: {text}", stacklevel=3)


def _random_start(matrix: Tensor, q: int) -> Tensor:
    """Gaussian (m, q), the same in every call and on every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[-2], q, generator=generator, dtype=matrix.dtype).to(matrix.device)


def columns(matrix: Tensor, index: Tensor) -> Tensor:
    """The columns (..., n, k) of (..., n, r) that an index (..., k) names."""
    return matrix.gather(-1, index.unsqueeze(-2).expand(*matrix.shape[:-1], index.shape[-1]))


def inner_product(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """sum <D, W> over lists of tensors, each pair of one shape and memory layout."""
    products = []
    for D, W in ((local(D), local(W)) for D, W in zip(gradients, weights, strict=True)):
        products.append(torch.dot(flat(D), flat(W.to(D.dtype))) if D.stride() == W.stride() else (D * W).sum())
    return sum_over_parts(products, weights).sum()


def flat(tensor: Tensor) -> Tensor:
    """All elements in storage order, without a copy for contiguous and channels_last tensors."""
    return tensor.reshape(-1) if tensor.is_contiguous() else tensor.movedim(1, -1).reshape(-1)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as a matrix: (out, in, kh, kw) becomes (out, in * kh * kw)."""
    return weight.flatten(1)


def tall(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if it is wider than high."""
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The precision that the method works in: float64 stays, all others become float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def working(tensor: Tensor) -> Tensor:
    return tensor.to(working_dtype(tensor))


def unit_scale(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix with its largest absolute entry at 1, and that entry (..., 1, 1), or 1 of a zero matrix.

    So that products of four factors stay within float32's range.
    """
    largest = matrix.abs().amax((-2, -1), keepdim=True)  # several times faster on a CPU than the infinity norm
    largest = torch.where(largest > 0, largest, 1.0)
    return matrix / largest, largest


def with_norm_of(wanted: Tensor, matrix: Tensor) -> Tensor:
    """The matrix with the Frobenius norm of another one, at any scale of the two; zeros if one is zero."""
    unit_mn, _ = unit_scale(matrix)
    unit_wanted, largest = unit_scale(wanted)
    norm: Tensor = torch.linalg.matrix_norm(unit_mn, keepdim=True).clamp(min=1.0)  # is 1 or more, or 0
    wanted_norm: Tensor = torch.linalg.matrix_norm(unit_wanted, keepdim=True)
    return unit_mn * (wanted_norm / norm) * largest


def largest_entries(*lists: Sequence[Tensor | None]) -> list[list[float]]:
    """The largest absolute entry of every tensor of some lists, 0 for None, read by the host at once."""
    present = [tensor for tensors in lists for tensor in tensors if tensor is not None]
    sizes = iter(largest_over_parts(present).tolist())
    return [[0.0 if tensor is None else next(sizes) for tensor in tensors] for tensors in lists]


def in_layout_of(weight: Tensor, matrix: Tensor) -> Tensor:
    """A matrix in the shape and memory layout (channels_last, say) of a weight: inner products then need no copy."""
    part = sharded_like(weight, matrix.reshape(weight.shape))
    return torch.empty_like(weight.detach(), dtype=matrix.dtype).copy_(part)


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number, numpy's included, of at least so much; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
