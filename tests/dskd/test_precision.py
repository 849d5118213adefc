"""The method's products are in full precision whatever the training has chosen; a solver that fails is replaced."""

import warnings

import pytest
import torch
from drawn import random
from torch import nn
from torch.testing import assert_close

from dskd import Curvature, DirectionSensitivityLoss, Own, Update, matrices
from dskd.matrices import eigh
from dskd.precision import full_precision


@pytest.fixture(params=["highest", "high", "medium"])
def chosen(request):
    """A training that has chosen its precision by torch's switch for all backends."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def trained(reading) -> DirectionSensitivityLoss:
    """After a choice and an exact gradient; matrices that are large enough for bf16 products on a CPU that has them."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(96, 96)) for _ in range(2)]
    pairs = [(str(i), W, torch.randn(96, 96)) for i, W in enumerate(weights)]
    loss = DirectionSensitivityLoss(pairs, reading, svd_steps=1)
    for W in weights:
        W.grad = torch.randn(96, 96)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    with loss.observe(0.5):
        optimizer.step()
    return loss


@pytest.mark.parametrize("reading", [Own(0), Own(8), Update(8), Curvature()], ids=repr)
def test_no_bit_depends_on_the_precision_of_the_training(reading, chosen):
    asked = torch.get_float32_matmul_precision()
    gradients = trained(reading).gradients()
    assert torch.get_float32_matmul_precision() == asked == chosen
    torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, gradients, trained(reading).gradients()))


def test_a_failure_inside_leaves_the_precision_as_it_was(chosen):
    with pytest.raises(KeyError), full_precision(torch.device("cpu")):
        raise KeyError
    assert torch.get_float32_matmul_precision() == chosen


@pytest.fixture
def solver(monkeypatch):
    """A solver that gives up on low rank in float32; the shapes and types that it was asked for."""
    asked, solve = [], torch.linalg.eigh

    def fails_on_low_rank(matrix):
        asked.append((tuple(matrix.shape), matrix.dtype))
        ranks = torch.linalg.matrix_rank(matrix, hermitian=True)
        if matrix.dtype == torch.float32 and (ranks < matrix.shape[-1]).any():
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_on_low_rank)
    matrices._say_once.cache_clear()
    return asked


def grams(*ranks: int) -> torch.Tensor:
    """(len(ranks), 5, 5) symmetric matrices in float32."""
    factors = [random(5, rank, seed=rank) for rank in ranks]
    return torch.stack([factor @ factor.mT for factor in factors]).float()


def test_a_matrix_that_the_solver_gives_up_on_is_decomposed_in_float64(solver):
    matrix = grams(5, 2, 5)
    with pytest.warns(UserWarning, match="could not be decomposed on cpu"):
        lambda_n, V_nn = eigh(matrix)
    assert lambda_n.dtype == V_nn.dtype == torch.float32
    assert_close((V_nn * lambda_n.unsqueeze(-2)) @ V_nn.mT, matrix, rtol=1e-5, atol=1e-5)
    assert [shape for shape, _ in solver] == [(3, 5, 5), (5, 5), (5, 5), (5, 5), (5, 5)]  # together, then each
    assert [dtype for _, dtype in solver].count(torch.float64) == 1


def test_that_is_said_once(solver):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            eigh(grams(2, 3))
    assert len(told) == 1


def test_too_little_memory_is_not_the_solvers_failure(monkeypatch):
    def fails(matrix):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(torch.OutOfMemoryError):
        eigh(grams(5))
