"""The alignment of `Own` and its gradient in closed form, beside the float64 oracle and finite differences."""

import numpy as np
import oracle
import pytest
import torch
from drawn import TOLERANCE, cosine, every_driver, every_shape, random, random_weights
from losses import loss_of, make_loss
from torch import Tensor, nn
from torch.testing import assert_close

from dskd import direction_sensitivity, low_rank_alignment, select_directions


# The oracle itself: its closed-form gradient is the derivative of its loss.
@every_shape
def test_oracle_gradient_is_the_finite_difference_of_its_loss(shape):
    student, teacher = random(*shape, seed=1), random(*shape, seed=2)
    w = random_weights(min(shape)).numpy()
    numeric = oracle.finite_difference(lambda matrix: oracle.own_loss(matrix, teacher, w), student)
    np.testing.assert_allclose(oracle.own_gradient(student, teacher, w), numeric, rtol=1e-6, atol=1e-7)


def gradient(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, driver: str) -> torch.Tensor:
    student = student.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(low_rank_alignment(student, teacher, weights, driver).sum(), student)
    return result


@every_driver
@every_shape
def test_own_loss_equals_the_oracle(shape, driver):
    student, teacher, w = random(*shape, seed=1), random(*shape, seed=2), random_weights(min(shape))
    expected = oracle.own_loss(student, teacher, w.numpy())
    assert low_rank_alignment(student, teacher, w, driver).item() == pytest.approx(expected, rel=TOLERANCE[driver])


@every_driver
@every_shape
def test_own_gradient_equals_the_oracle(shape, driver):
    student, teacher, w = random(*shape, seed=1), random(*shape, seed=2), random_weights(min(shape))
    expected = torch.from_numpy(oracle.own_gradient(student, teacher, w.numpy()))
    tolerance = TOLERANCE[driver]
    assert_close(gradient(student, teacher, w, driver), expected, rtol=tolerance, atol=tolerance)


@every_driver
@every_shape
def test_own_gradient_of_selected_directions_equals_the_oracle(shape, driver):
    student, teacher = random(*shape, seed=1), random(*shape, seed=2)
    w = select_directions(random_weights(min(shape)), 3)  # weights of exactly zero, in and outside K
    expected = torch.from_numpy(oracle.own_gradient(student, teacher, w.numpy()))
    tolerance = TOLERANCE[driver]
    assert_close(gradient(student, teacher, w, driver), expected, rtol=tolerance, atol=tolerance)


@every_driver
@every_shape
def test_own_passes_gradcheck(shape, driver):
    student, teacher, w = random(*shape, seed=3).requires_grad_(), random(*shape, seed=4), random_weights(min(shape))
    assert torch.autograd.gradcheck(lambda matrix: low_rank_alignment(matrix, teacher, w, driver), student)


@every_driver
@every_shape
def test_own_of_a_batch_is_that_of_its_matrices(shape, driver):
    student, teacher, w = random(2, 2, *shape, seed=1), random(2, 2, *shape, seed=2), random_weights(2, 2, min(shape))
    losses, gradients = low_rank_alignment(student, teacher, w, driver), gradient(student, teacher, w, driver)
    assert losses.shape == (2, 2)
    for i in np.ndindex(2, 2):
        expected = torch.from_numpy(oracle.own_gradient(student[i], teacher[i], w[i].numpy()))
        assert losses[i].item() == pytest.approx(oracle.own_loss(student[i], teacher[i], w[i].numpy()), rel=1e-6)
        assert_close(gradients[i], expected, rtol=1e-6, atol=1e-6)


@every_driver
@pytest.mark.parametrize("shape", [(64, 64), (16, 144), (96, 24)])
def test_own_in_float32_is_close_to_float64(shape, driver):
    student, teacher = random(*shape, seed=1), random(*shape, seed=2)
    w = select_directions(random_weights(min(shape)), 12)
    exact = low_rank_alignment(student, teacher, w, "svd").item()
    single = low_rank_alignment(student.float(), teacher.float(), w.float(), driver)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(exact, rel=1e-3)
    in_single = gradient(student.float(), teacher.float(), w.float(), driver)
    assert cosine(in_single, gradient(student, teacher, w, "svd")) > 0.9999


def test_own_of_bf16_weights_is_worked_on_in_float32():
    student, teacher = random(6, 8, seed=1, dtype=torch.bfloat16), random(6, 8, seed=2, dtype=torch.bfloat16)
    w = random_weights(6).float()
    loss = low_rank_alignment(student, teacher, w)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, low_rank_alignment(student.float(), teacher.float(), w))
    in_float32 = gradient(student.float(), teacher.float(), w, "gram")
    assert torch.equal(gradient(student, teacher, w, "gram"), in_float32.bfloat16())


@every_driver
def test_mixed_precision_does_not_reach_the_functions(driver):
    update, grad, teacher = (random(24, 16, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    w = random_weights(16).float()
    expected = [direction_sensitivity(update, grad, 0.5, driver), gradient(update, teacher, w, driver)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = [direction_sensitivity(update, grad, 0.5, driver), gradient(update, teacher, w, driver)]
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_functions_take_their_arguments_by_name():
    update, grad, teacher = (random(6, 4, seed=seed) for seed in (1, 2, 3))
    w = random_weights(4)
    by_name = (
        direction_sensitivity(update=update, grad=grad, alpha=0.5),
        low_rank_alignment(student=update, teacher=teacher, weights=w),
        select_directions(scores=w, rank=2),
    )
    by_place = (
        direction_sensitivity(update, grad, 0.5),
        low_rank_alignment(update, teacher, w),
        select_directions(w, 2),
    )
    assert_close(by_name, by_place)


def test_equal_weights_over_all_directions_give_the_plain_squared_difference():
    student, teacher = random(5, 7, seed=1), random(5, 7, seed=2)
    loss = low_rank_alignment(student, teacher, torch.full((5,), 0.2, dtype=torch.float64))
    assert_close(loss, (student - teacher).square().sum() / 5)


def test_own_loss_of_equal_matrices_is_zero():
    student, w = random(5, 7), random_weights(5)
    assert low_rank_alignment(student, student.clone(), w).item() == pytest.approx(0, abs=1e-25)


def test_own_gives_the_teacher_no_gradient():
    student, teacher = random(4, 3, seed=1).requires_grad_(), random(4, 3, seed=2).requires_grad_()
    low_rank_alignment(student, teacher, random_weights(3)).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_own_of_a_transposed_pair_is_the_same():
    student, teacher, w = random(4, 7, seed=1), random(4, 7, seed=2), random_weights(4)
    assert_close(low_rank_alignment(student.mT, teacher.mT, w), low_rank_alignment(student, teacher, w))


def test_own_refuses_two_shapes():
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        low_rank_alignment(random(3, 4), random(4, 3), random_weights(3))


def test_own_refuses_weights_of_another_length():
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        low_rank_alignment(random(3, 4), random(3, 4), random_weights(4))


# Smoothing
def smoothed_gradient(student: Tensor, teacher: Tensor, w: Tensor, smoothing: float) -> Tensor:
    """D = H P + 2 A V (F o sym(V^T A^T H V)) V^T of a tall student, F with x / (x^2 + smoothing^2) for 1 / x."""
    U, sigma, Vh = torch.linalg.svd(student, full_matrices=False)
    teacher_U, teacher_sigma, teacher_Vh = torch.linalg.svd(teacher, full_matrices=False)
    p = w.sqrt()
    H = 2 * (U @ torch.diag(p * sigma) @ Vh - teacher_U @ torch.diag(p * teacher_sigma) @ teacher_Vh)
    squares = (sigma / sigma[0]) ** 2
    x = squares[:, None] - squares[None, :]
    F = (p[:, None] - p[None, :]) * (x / (x**2 + smoothing**2)).fill_diagonal_(0) / sigma[0] ** 2
    Q = Vh @ student.T @ H @ Vh.T
    return H @ Vh.T @ torch.diag(p) @ Vh + 2 * student @ Vh.T @ (F * (Q + Q.T) / 2) @ Vh


@pytest.mark.parametrize("rank", [2, 5, 0])
@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_a_smoothed_gradient_follows_its_formula(rank, smoothing):
    W, teacher = nn.Parameter(random(11, 8)), random(11, 8, seed=1)
    dskd = make_loss([("W", W, teacher)], rank, 1, smoothing=smoothing, driver="svd")
    (W * random(11, 8, seed=2)).sum().backward()
    with dskd.observe(progress=0.3), torch.no_grad():
        W -= 0.1 * W.grad
    (gradient,) = torch.autograd.grad(dskd(), W)
    expected = smoothed_gradient(W.detach(), teacher, dskd.direction_weights()["W"], smoothing)
    assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def test_smoothing_does_not_change_the_loss():
    losses = [loss_of([(9, 6)], smoothing=smoothing)[0]().item() for smoothing in (0.0, 0.1)]
    assert losses[0] == losses[1]


def test_smoothing_tames_close_singular_values():
    U, V = torch.linalg.qr(random(9, 6))[0], torch.linalg.qr(random(6, 6, seed=1))[0]
    W = nn.Parameter(U @ torch.diag(torch.tensor([5, 3, 2 + 1e-6, 2, 1, 0.5], dtype=torch.float64)) @ V.mT)
    norms = {}
    for smoothing in (0.0, 0.01):
        dskd = make_loss([("W", W, random(9, 6, seed=3))], 3, smoothing=smoothing)
        norms[smoothing] = torch.autograd.grad(dskd(), W)[0].norm().item()
    assert norms[0.0] > 1e3 * norms[0.01]


def test_smoothing_below_zero_or_not_finite_is_refused():
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="smoothing"):
            loss_of([(4, 4)], smoothing=wrong)
