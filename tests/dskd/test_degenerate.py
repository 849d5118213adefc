"""Degenerate matrices: scores, weights, losses and gradients stay finite, and what must be non-negative is."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import make_loss
from torch import Tensor, nn

from dskd import direction_sensitivity, low_rank_alignment, select_directions
from dskd.matrices import DRIVERS

SHAPES = [(1, 1), (1, 6), (6, 1), (2, 2), (3, 7), (7, 3), (5, 5)]
KINDS = ["zero", "one_entry", "constant", "rank_one", "identity", "repeated", "nearly_repeated", "graded", "full"]
examples = settings(max_examples=150, deadline=None, derandomize=True)


def matrix(kind: str, shape: tuple[int, int], exponent: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A matrix of one kind with entries around 10**exponent."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(full, full_matrices=False)
    r = min(shape)
    values = {
        "zero": lambda: torch.zeros(shape, dtype=torch.float64),
        "one_entry": lambda: torch.nn.functional.one_hot(torch.tensor(seed % full.numel()), full.numel()).view(shape),
        "constant": lambda: torch.ones(shape),
        "rank_one": lambda: full[:, :1] @ full[:1],
        "identity": lambda: torch.eye(*shape),
        "repeated": lambda: left @ right,
        "nearly_repeated": lambda: left @ torch.diag(1 + 1e-7 * sigma) @ right,
        "graded": lambda: left @ torch.diag(10.0 ** -torch.arange(0, 6 * r, 6, dtype=torch.float64)) @ right,
        "full": lambda: full,
    }
    return (values[kind]().double() * 10.0**exponent).to(dtype)


@st.composite
def matrices(draw, count: int, exponents: st.SearchStrategy[int]) -> list[Tensor]:
    """Some matrices of one shape and precision, each of its own kind and scale; sometimes all the same."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    drawn = [
        matrix(draw(st.sampled_from(KINDS)), shape, draw(exponents), draw(st.integers(0, 50)), dtype)
        for _ in range(count)
    ]
    return [drawn[0].clone() for _ in drawn] if draw(st.booleans()) and draw(st.booleans()) else drawn


any_scale = st.sampled_from([-38, -30, -12, 0, 12, 30, 37])
squarable = st.sampled_from([-38, -30, -12, 0, 6, 17])  # the loss itself must fit into float32
ranks = st.sampled_from([0, 1, 2, 4, 100])
drivers = st.sampled_from(DRIVERS)
alphas = st.sampled_from([0.0, 0.5, 1.0])


def assert_weights(weights: Tensor, rank: int) -> None:
    assert bool(weights.isfinite().all())
    assert bool((weights >= 0).all())
    assert weights.sum(-1).tolist() == pytest.approx([1.0] * len(weights), rel=1e-5)
    if rank:
        assert int((weights > 0).sum(-1).max()) <= rank


@examples
@given(matrices(2, any_scale), ranks, alphas, drivers)
def test_scores_and_weights(tensors, rank, alpha, driver):
    update, grad = tensors
    scores = direction_sensitivity(update, grad, alpha, driver)
    assert bool(scores.isfinite().all())
    assert bool((scores >= 0).all())
    assert scores.sum().item() <= 1 + 1e-5
    assert_weights(select_directions(scores[None], rank), rank)


@examples
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), ranks)
def test_weights_of_any_scores(scores, rank):
    assert_weights(select_directions(torch.tensor([scores]), rank), rank)


@examples
@given(matrices(3, squarable), ranks, drivers)
def test_own_loss_and_gradient(tensors, rank, driver):
    student, teacher, update = tensors
    weights = select_directions(direction_sensitivity(update, student, 0.5, driver), rank)
    student.requires_grad_()
    loss = low_rank_alignment(student, teacher, weights, driver)
    loss.backward()
    assert bool(loss.isfinite())
    assert loss.item() >= 0
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("basis", ["own", "update", "curvature"])
@pytest.mark.parametrize("grad_steps", [1, 3])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(tensors=matrices(4, st.sampled_from([-30, -12, 0, 6])), rank=ranks, driver=drivers)
def test_three_steps_of_the_whole_loss(basis, grad_steps, tensors, rank, driver):
    start, teacher, update, grad = tensors
    rank = 0 if basis == "curvature" else rank  # it takes all
    student = nn.Parameter(start)
    dskd = make_loss([("layer", student, teacher)], rank, 1, basis=basis, grad_steps=grad_steps, driver=driver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "DSKD: directions were due")  # true of zeros
        for progress in (0.0, 0.5, 1.0):
            loss = dskd()
            (of_loss,) = torch.autograd.grad(loss, student)
            assert bool(loss.isfinite())
            assert bool(of_loss.isfinite().all())
            student.grad = grad.clone()
            with dskd.observe(progress), torch.no_grad():
                student.add_(update)
            assert_weights(dskd.direction_weights()["layer"][None], rank)


# The closed-form gradient where autograd through an SVD gives NaN
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("kind", ["zero", "identity", "repeated", "rank_one"])
def test_equal_weights_give_the_gradient_of_the_squared_difference(kind, driver):
    student = matrix(kind, (5, 5), 0, 3, torch.float64).requires_grad_()
    teacher = matrix("full", (5, 5), 0, 4, torch.float64)
    low_rank_alignment(student, teacher, torch.full((5,), 0.2, dtype=torch.float64), driver).backward()
    torch.testing.assert_close(student.grad, 2 * (student.detach() - teacher) / 5)


@pytest.mark.parametrize("driver", DRIVERS)
def test_loss_of_a_zero_student_is_the_teachers_part(driver):
    teacher = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    loss = low_rank_alignment(torch.zeros(3, 3), teacher, torch.tensor([0.5, 0.5, 0.0]), driver)
    assert loss.item() == pytest.approx(0.5 * 9 + 0.5 * 4)


@pytest.mark.parametrize("driver", DRIVERS)
def test_loss_of_a_rank_deficient_student(driver):
    student = torch.diag(torch.tensor([3.0, 0.0, 0.0]))
    teacher = torch.diag(torch.tensor([2.0, 0.0, 0.0]))
    loss = low_rank_alignment(student, teacher, torch.tensor([0.25, 0.5, 0.25]), driver)
    assert loss.item() == pytest.approx(0.25)
