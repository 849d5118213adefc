"""Scores of directions and the weights that follow, beside the float64 oracle."""

import numpy as np
import oracle
import pytest
import torch
from drawn import TOLERANCE, every_driver, every_shape, falling, random, random_weights
from torch.testing import assert_close

from dskd import direction_sensitivity, select_directions
from dskd.sensitivity import selected_count


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


def test_randomized_scores_select_what_exact_scores_select():
    update, grad = falling(150, 120, 0.1), falling(150, 120, 0.05) + 0.01 * random(150, 120, seed=3)
    exact = select_directions(direction_sensitivity(update, grad, 0.3, "svd"), 8)
    randomized = select_directions(direction_sensitivity(update, grad, 0.3, "randomized", 8), 8)
    assert randomized.shape == exact.shape
    assert torch.minimum(exact, randomized).sum() > 0.98


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
