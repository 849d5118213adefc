"""Matrices and weights drawn from a seed, the tolerances of the drivers, and the shapes that tests run over."""

import pytest
import torch
from torch import Tensor

from dskd.matrices import DRIVERS

SHAPES = {"square": (6, 6), "wide": (4, 9), "tall": (9, 4)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_driver = pytest.mark.parametrize("driver", DRIVERS)
TOLERANCE = {"svd": 1e-9, "gram": 1e-6, "randomized": 1e-6}  # of W^T W the eigenvectors keep half the digits


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_weights(*shape: int, seed: int = 9) -> torch.Tensor:
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights / weights.sum(-1, keepdim=True)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def falling(m: int, n: int, rate: float) -> Tensor:
    """A matrix whose singular values fall as exp(-rate i)."""
    U, V = torch.linalg.qr(random(m, n))[0], torch.linalg.qr(random(n, n, seed=1))[0]
    return U @ torch.diag(torch.exp(-rate * torch.arange(n, dtype=torch.float64))) @ V.mT
