"""The study of the held gradient: its measurements on a pair with a closed form, and what is made of them."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from common import ROOT
from common.matrices import DRIVERS
from common.svd_loss import DirectionSensitivityLoss

sys.path.append(str(ROOT / "scripts"))
from scripts.study.exactness import adaptive_interval, applied
from scripts.study.held_gradient import HeldGradient, Reference


@pytest.fixture(scope="module")
def observed() -> tuple[HeldGradient, list[np.ndarray], np.ndarray]:
    """5 steps on one 4 x 3 pair, directions chosen after 3; the weights after every step, and the teacher's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator) for _ in range(2))
    student = nn.Parameter(student)
    noise = torch.randn(6, 4, 3, generator=generator)
    dskd = DirectionSensitivityLoss([("a", student, teacher)], rank=0, svd_steps=3)
    optimizer = torch.optim.SGD([student], lr=0.1)
    held = HeldGradient([("a", student, teacher)], dskd, {"first": [0], "second": [3]}, ages=(1, 2), total=6)
    weights = [student.detach().double().numpy().copy()]
    for step in range(5):
        optimizer.zero_grad()
        (dskd() + (student * noise[step]).sum()).backward()
        held.before_step(step + 1)
        with dskd.observe(step / 6):
            optimizer.step()
        held.after_step(step + 1)
        weights.append(student.detach().double().numpy().copy())
    return held, weights, teacher.double().numpy()


# Before the first choice of all directions the loss is ||W_s - W_t||^2 / 3
def test_the_cosine_is_that_of_the_exact_gradients(observed):
    held, weights, teacher = observed
    gaps = [(W - teacher).ravel() for W in weights[:3]]
    expected = [gaps[0] @ gap / np.linalg.norm(gaps[0]) / np.linalg.norm(gap) for gap in gaps]
    assert held.references[0].ages == [0, 1, 2]
    np.testing.assert_allclose(np.ravel(held.references[0].cosine[0.0]), expected, rtol=1e-6)


def test_the_drift_is_relative_to_the_weight(observed):
    held, weights, _ = observed
    expected = [np.linalg.norm(W - weights[0]) / np.linalg.norm(weights[0]) for W in weights[:3]]
    np.testing.assert_allclose(np.ravel(held.references[0].drift), expected, rtol=1e-6)


def test_the_value_is_compared_with_its_first_order_expansion(observed):
    held, weights, teacher = observed
    gap = weights[0] - teacher
    expanded = [(np.sum(gap**2) + np.sum(2 * gap * (W - weights[0]))) / 3 for W in weights[:3]]
    exact = [np.sum((W - teacher) ** 2) / 3 for W in weights[:3]]
    expected = np.abs(np.divide(expanded, exact) - 1)
    np.testing.assert_allclose(held.references[0].value_error, expected, rtol=1e-4, atol=1e-6)


def test_every_driver_is_compared_where_directions_were_chosen(observed):
    first, second = observed[0].references
    assert first.overlap == {}
    for driver in DRIVERS:
        assert second.overlap[driver] == pytest.approx([1.0], abs=1e-4)
        assert second.gradient[driver] == pytest.approx([1.0], abs=1e-6)


REFERENCE = Reference(
    "stage",
    0,
    ages=[0, 1, 3],
    cosine={0.0: [[1.0, 1.0], [0.9, 1.0], [0.5, 0.8]]},
    drift=[[0.0, 0.0], [0.02, 0.01], [0.04, 0.05]],
)


def test_the_applied_gradient_is_averaged_over_the_interval():
    np.testing.assert_allclose(applied(REFERENCE, 1), [1.0, 1.0])
    np.testing.assert_allclose(applied(REFERENCE, 3), [(1.0 + 0.9 + 0.7) / 3, (1.0 + 1.0 + 0.9) / 3])


@pytest.mark.parametrize(("threshold", "steps"), [(0.01, 1), (0.02, 2), (0.035, 3), (0.1, 3)])
def test_the_adaptive_rule_ends_an_interval_when_any_pair_has_moved_too_far(threshold, steps):
    assert adaptive_interval(REFERENCE, threshold) == steps


def test_the_basis_update_is_compared_where_directions_were_chosen(observed):
    held, weights, teacher = observed
    assert held.references[0].along_update == []
    w = held.dskd.direction_weights()["a"].double().numpy()
    U, _, Vh = np.linalg.svd(weights[3] - weights[2], full_matrices=False)
    gradients = [
        sum(w[i] * (U[:, i] @ (W - teacher) @ Vh[i]) * np.outer(U[:, i], Vh[i]) for i in range(3)).ravel()
        for W in weights[3:6]
    ]
    expected = [gradients[0] @ g / np.linalg.norm(gradients[0]) / np.linalg.norm(g) for g in gradients]
    np.testing.assert_allclose(np.ravel(held.references[1].along_update), expected, rtol=1e-4)
