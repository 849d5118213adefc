"""The pure functions of dskd/ beside the float64 oracle and finite differences."""

import numpy as np
import oracle
import pytest
import torch
from torch.testing import assert_close

from dskd import Update, direction_sensitivity, low_rank_alignment, select_directions
from dskd.matrices import DRIVERS, as_matrix, inner_product, right_singular
from dskd.sensitivity import selected_count

SHAPES = {"square": (6, 6), "wide": (4, 9), "tall": (9, 4)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_driver = pytest.mark.parametrize("driver", DRIVERS)
TOLERANCE = {"svd": 1e-9, "gram": 1e-6, "randomized": 1e-6}  # of W^T W the eigenvectors keep half the digits


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_weights(*shape: int, seed: int = 9) -> torch.Tensor:
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights / weights.sum(-1, keepdim=True)


def gradient(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, driver: str) -> torch.Tensor:
    student = student.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(low_rank_alignment(student, teacher, weights, driver).sum(), student)
    return result


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# The oracle itself: its closed-form gradient is the derivative of its loss.
@every_shape
def test_oracle_gradient_is_the_finite_difference_of_its_loss(shape):
    student, teacher = random(*shape, seed=1), random(*shape, seed=2)
    w = random_weights(min(shape)).numpy()
    numeric = oracle.finite_difference(lambda matrix: oracle.own_loss(matrix, teacher, w), student)
    np.testing.assert_allclose(oracle.own_gradient(student, teacher, w), numeric, rtol=1e-6, atol=1e-7)


# Scores
@every_driver
@every_shape
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_scores_equal_the_oracle(shape, driver, alpha):
    update, grad = random(*shape, seed=1), random(*shape, seed=2)
    expected = torch.from_numpy(oracle.scores(update, grad, alpha)[2])
    assert_close(direction_sensitivity(update, grad, alpha, driver), expected, rtol=TOLERANCE[driver], atol=1e-12)


def test_scores_of_a_hand_computed_pair():
    update = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    grad = torch.diag(torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64))
    # g = (3, 4, 1), c = 1/2 sigma^2 G_ii^4 = (4.5, 32, 0.5)
    assert_close(direction_sensitivity(update, grad, 0.0), torch.tensor([3.0, 4.0, 1.0], dtype=torch.float64) / 8)
    assert_close(direction_sensitivity(update, grad, 1.0), torch.tensor([4.5, 32.0, 0.5], dtype=torch.float64) / 37)


def test_the_arguments_of_the_scores_may_come_in_any_order():
    update, grad = random(4, 3, seed=1), random(4, 3, seed=2)
    assert torch.equal(
        direction_sensitivity(alpha=0.5, update=update, grad=grad), direction_sensitivity(update, grad, 0.5)
    )


@every_driver
@every_shape
def test_scores_of_a_batch_are_those_of_its_matrices(shape, driver):
    update, grad = random(2, 3, *shape, seed=1), random(2, 3, *shape, seed=2)
    batched = direction_sensitivity(update, grad, 0.4, driver)
    assert batched.shape == (2, 3, min(shape))
    for i in np.ndindex(2, 3):
        expected = torch.from_numpy(oracle.scores(update[i], grad[i], 0.4)[2])
        assert_close(batched[i], expected, rtol=TOLERANCE[driver], atol=1e-12)


@every_driver
@pytest.mark.parametrize(("of_update", "of_grad"), [(1e-20, 1e15), (1e15, 1e-20), (1.0, -65536.0)])
def test_scores_do_not_depend_on_scale(driver, of_update, of_grad):
    update, grad = random(7, 5, seed=1, dtype=torch.float32), random(7, 5, seed=2, dtype=torch.float32)
    scaled = direction_sensitivity(of_update * update, of_grad * grad, 0.5, driver)
    assert_close(scaled, direction_sensitivity(update, grad, 0.5, driver), rtol=1e-4, atol=1e-6)


@every_driver
@every_shape
def test_scores_in_float32_are_close_to_float64(shape, driver):
    update, grad = random(*shape, seed=1), random(*shape, seed=2)
    single = direction_sensitivity(update.float(), grad.float(), 0.5, driver)
    assert single.dtype == torch.float32
    assert_close(single.double(), direction_sensitivity(update, grad, 0.5, driver), rtol=1e-3, atol=1e-5)


def test_scores_of_bf16_input_are_worked_on_in_float32():
    update, grad = random(6, 8, seed=1, dtype=torch.bfloat16), random(6, 8, seed=2, dtype=torch.bfloat16)
    scores = direction_sensitivity(update, grad, 0.5)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, direction_sensitivity(update.float(), grad.float(), 0.5))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_scores_sum_to_one(alpha):
    scores = direction_sensitivity(random(4, 7, 5, seed=1), random(4, 7, 5, seed=2), alpha)
    assert_close(scores.sum(-1), torch.ones(4, dtype=torch.float64))


def test_scores_of_a_zero_gradient_are_zero():
    zero = torch.zeros(5, 3, dtype=torch.float64)
    assert torch.equal(direction_sensitivity(random(5, 3), zero, 0.5), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_scores_refuse_progress_outside_the_unit_interval(alpha):
    with pytest.raises(ValueError, match="alpha"):
        direction_sensitivity(random(3, 3), random(3, 3), alpha)


def test_scores_refuse_two_shapes():
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        direction_sensitivity(random(3, 4), random(4, 3), 0.5)


def test_scores_refuse_a_vector():
    with pytest.raises(ValueError, match="matrices"):
        direction_sensitivity(random(3), random(3), 0.5)


# Weights
def test_weights_of_a_hand_computed_selection():
    scores = torch.tensor([0.1, 0.5, 0.2, 0.05, 0.4])
    # K = {1, 4, 2}; minus 0.2: 0.3, 0.2, 0; divided by 0.5
    assert_close(select_directions(scores, 3), torch.tensor([0.0, 0.6, 0.0, 0.0, 0.4]))


@pytest.mark.parametrize("rank", [0, 2, 5, 8, 50])
def test_weights_equal_the_oracle(rank):
    scores = random_weights(4, 8)
    expected = np.stack([oracle.weights(row, rank) for row in scores.numpy()])
    assert_close(select_directions(scores, rank), torch.from_numpy(expected))


def test_equal_scores_weigh_uniformly_and_the_leading_directions_win():
    assert_close(select_directions(torch.full((6,), 0.25), 4), torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]))


def test_rank_one_gives_all_weight_to_the_largest_score():
    assert torch.equal(select_directions(torch.tensor([0.2, 0.7, 0.1]), 1), torch.tensor([0.0, 1.0, 0.0]))


def test_weights_refuse_a_negative_rank():
    with pytest.raises(ValueError, match="rank"):
        select_directions(torch.ones(3), -1)


@pytest.mark.parametrize(("rank", "expected"), [(0, 5), (3, 3), (5, 5), (9, 5)])
def test_selected_count(rank, expected):
    assert selected_count(rank, 5) == expected


# The alignment loss `own`
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
    assert low_rank_alignment(student, student.clone(), w).item() == 0.0


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


# The alignment loss `update`
@every_shape
def test_update_loss_and_gradient_equal_the_oracle(shape):
    student, teacher, update = random(*shape, seed=1), random(*shape, seed=2), random(*shape, seed=3)
    w = random_weights(min(shape))
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    order = w.argsort(descending=True)  # directions come with the largest weight first
    chosen = {"weights": w[None], "left": left[None, :, order], "right": right.mT[None, :, order]}
    loss, actual = Update(0).value_and_gradient(student[None], {"teacher": teacher[None]}, chosen)
    assert loss.item() == pytest.approx(oracle.update_loss(student, teacher, update, w.numpy()))
    assert_close(actual[0], torch.from_numpy(oracle.update_gradient(student, teacher, update, w.numpy())))


# Matrices
@every_driver
def test_right_singular_values_and_vectors(driver):
    matrix = random(3, 7, 4, seed=5)
    sigma, V = right_singular(matrix, driver)
    expected = torch.linalg.svdvals(matrix)
    assert_close(sigma, expected, rtol=1e-7, atol=1e-7)
    assert_close((matrix @ V).norm(dim=-2), expected, rtol=1e-7, atol=1e-7)
    assert_close(V.mT @ V, torch.eye(4, dtype=torch.float64).expand(3, 4, 4), rtol=0, atol=1e-12)


def test_right_singular_refuses_an_unknown_driver():
    with pytest.raises(ValueError, match="gesvd"):
        right_singular(random(3, 3), "gesvd")


def test_a_convolution_weight_is_read_as_out_by_the_rest():
    weight = torch.arange(48.0).view(2, 3, 2, 4)
    assert torch.equal(as_matrix(weight), torch.arange(48.0).view(2, 24))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inner_product_of_two_layouts(layout):
    a, b = (random(4, 3, 2, 2, seed=seed).to(memory_format=layout) for seed in (1, 2))
    assert_close(inner_product([a, a], [b, a]), (a * b).sum() + (a * a).sum())
