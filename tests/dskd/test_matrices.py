"""Decompositions, the randomized one above all, and views of weights as matrices."""

import pytest
import torch
from drawn import every_driver, falling, random
from losses import make_loss
from runs import every_singular_basis
from torch import nn
from torch.testing import assert_close

from dskd.matrices import as_matrix, inner_product, right_singular


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


# The randomized driver
def test_the_randomized_driver_finds_the_leading_directions_of_a_falling_spectrum():
    matrix = falling(150, 120, 0.1)
    expected_sigma, expected_V = right_singular(matrix, "svd")
    sigma, V = right_singular(matrix, "randomized", 8)
    assert V.shape == (120, 40)
    assert_close(sigma[:8], expected_sigma[:8], rtol=1e-6, atol=0)
    assert_close((V[:, :8] * expected_V[:, :8]).sum(0).abs(), torch.ones(8, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_randomized_driver_gives_the_same_in_every_call():
    matrix = falling(150, 120, 0.02)
    torch.manual_seed(1)
    first = right_singular(matrix, "randomized", 8)
    torch.manual_seed(2)
    assert_close(right_singular(matrix, "randomized", 8), first, rtol=0, atol=0)


def test_the_randomized_driver_takes_all_directions_where_few_are_left_out():
    matrix = random(50, 40)
    assert_close(right_singular(matrix, "randomized", 8), right_singular(matrix, "gram"), rtol=0, atol=0)


@every_singular_basis
def test_a_run_with_the_randomized_driver_stays_close_to_the_exact_one(basis):
    losses = {}
    for driver in ("svd", "randomized"):
        W = nn.Parameter(falling(150, 120, 0.05))
        dskd = make_loss([("W", W, random(150, 120))], 8, 2, basis=basis, driver=driver)
        losses[driver] = []
        for step in range(6):
            loss = dskd()
            (loss + (W * falling(150, 120, 0.1)).sum()).backward()
            with dskd.observe(progress=step / 6), torch.no_grad():
                W -= 0.01 * W.grad
            W.grad = None
            losses[driver].append(loss.item())
    assert losses["randomized"] == pytest.approx(losses["svd"], rel=0.02)


# Views and products
def test_a_convolution_weight_is_read_as_out_by_the_rest():
    weight = torch.arange(48.0).view(2, 3, 2, 4)
    assert torch.equal(as_matrix(weight), torch.arange(48.0).view(2, 24))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inner_product_of_two_layouts(layout):
    a, b = (random(4, 3, 2, 2, seed=seed).to(memory_format=layout) for seed in (1, 2))
    assert_close(inner_product([a, a], [b, a]), (a * b).sum() + (a * a).sum())
