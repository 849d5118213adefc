"""Float32 weights and gradients far from 1, whose squares leave its range, beside float64 numpy."""

import numpy as np
import oracle
import pytest
import torch
from drawn import random
from torch import nn

from dskd import Curvature, DirectionSensitivityLoss, Own, Spectrum, Update
from dskd.controls import DiagonalFisher, Plain
from dskd.matrices import with_norm_of

LARGEST = float(torch.finfo(torch.float32).max)
scales = pytest.mark.parametrize("exponent", [-30, -23, -19, 0, 17, 19, 25, 36])
shapes = pytest.mark.parametrize("shape", [(7, 4), (4, 7)], ids=["tall", "wide"])


class Trained:
    """A loss after some steps that chose directions; all in float32, as numpy float64 sees it."""

    def __init__(self, reading, shape, student, teacher=None, gradient=1.0, steps=2):
        teacher = student if teacher is None else teacher
        self.W = nn.Parameter((random(*shape, seed=1) * student).float())
        self.teacher = (random(*shape, seed=2) * teacher).float()
        self.start, self.gradients, self.update = oracle.as_array(self.W), [], None
        self.loss = DirectionSensitivityLoss([("layer", self.W, self.teacher)], reading, svd_steps=1)
        self.loss()
        for step in range(steps):
            self.W.grad = (random(*shape, seed=10 + step) * gradient).float()
            before = oracle.as_array(self.W)
            with self.loss.observe(0.5), torch.no_grad():
                self.W += (random(*shape, seed=20 + step) * 0.1 * student).float()
            self.gradients.append(oracle.as_array(self.W.grad))
            self.update = oracle.as_array(self.W) - before

    def check(self, value: float, gradient: np.ndarray) -> None:
        found, D = self.loss().item(), oracle.as_array(self.loss.gradients()[0])
        assert np.abs(D - gradient).max() <= 1e-4 * np.abs(gradient).max()
        if value > LARGEST:
            assert found == float("inf")  # what rounding gives
        else:
            assert found == pytest.approx(value, rel=1e-4, abs=1e-44)


def anchored(gap, pull) -> tuple[float, np.ndarray]:
    """The loss and gradient of a gap D that is weighed to `pull`, A D B say."""
    step = np.linalg.norm(gap) / np.linalg.norm(pull) / min(gap.shape)
    return step * (gap * pull).sum(), 2 * step * pull


@shapes
@scales
@pytest.mark.parametrize("steps", [0, 3])
def test_curvature(exponent, shape, steps):
    run = Trained(Curvature(), shape, 10.0**exponent, gradient=10.0**exponent, steps=steps)
    gap = oracle.as_array(run.W) - oracle.as_array(run.teacher)
    A, B = oracle.mean_factors(run.gradients) if steps else (np.eye(shape[0]), np.eye(shape[1]))
    run.check(*anchored(gap, A @ gap @ B))


@pytest.mark.parametrize(("weights", "gradients"), [(1e19, 1e-19), (1e-19, 1e19), (1e-30, 1e30)])
def test_curvature_of_gradients_far_from_the_weights_scale(weights, gradients):
    run = Trained(Curvature(factors="diagonal"), (7, 4), weights, gradient=gradients)
    gap = oracle.as_array(run.W) - oracle.as_array(run.teacher)
    A, B = oracle.mean_factors(run.gradients)
    run.check(*anchored(gap, np.diag(np.diag(A)) @ gap @ B))


def test_a_gap_that_the_factors_hardly_weigh():
    """As after many steps without a gradient there: of A and B 1e-12 is left, so that the pull is 1e-24 of the gap."""
    student, teacher = torch.zeros(1, 3, 3), torch.diag(torch.tensor([0.0, 0.0, 1.0]))[None]
    factor = torch.diag(torch.tensor([1.0, 1.0, 1e-12]))[None]
    value, gradient = Curvature().value_and_gradient(student, {"teacher": teacher}, {"left": factor, "right": factor})
    assert value.item() == pytest.approx(1 / 3)
    np.testing.assert_allclose(gradient[0], -2 / 3 * teacher[0])


@scales
def test_the_diagonal_fisher(exponent):
    run = Trained(DiagonalFisher(), (5, 3), 10.0**exponent, gradient=10.0**exponent)
    gap, fisher = oracle.as_array(run.W) - oracle.as_array(run.teacher), np.ones((5, 3))
    for G in run.gradients:
        fisher = 0.95 * fisher + 0.05 * (G / 10.0**exponent) ** 2 / ((G / 10.0**exponent) ** 2).mean()
    run.check(*anchored(gap, fisher * gap))


@shapes
@scales
@pytest.mark.parametrize("steps", [0, 2])
def test_spectrum(exponent, shape, steps):
    run = Trained(Spectrum(3), shape, 10.0**exponent, gradient=10.0**exponent, steps=steps)
    w = oracle.first_weights(4, 3)
    if steps:
        w = oracle.weights(oracle.scores(run.update, run.gradients[-1], 0.5)[2], 3)
    c = oracle.spectrum_scale(run.start, run.teacher)
    run.check(oracle.spectrum_loss(run.W, run.teacher, w, c), oracle.spectrum_gradient(run.W, run.teacher, w, c))


@pytest.mark.parametrize(("student", "teacher"), [(1e-19, 1e19), (1e19, 1e-20), (1e-25, 1e25), (1e17, 1e-37)])
def test_spectrum_of_a_teacher_of_another_scale(student, teacher):
    run = Trained(Spectrum(3), (7, 4), student, teacher, steps=0)
    w, c = oracle.first_weights(4, 3), oracle.spectrum_scale(run.start, run.teacher)
    run.check(oracle.spectrum_loss(run.W, run.teacher, w, c), oracle.spectrum_gradient(run.W, run.teacher, w, c))


@shapes
@scales
def test_own_and_update(exponent, shape):
    size = 10.0**exponent
    run = Trained(Own(3), shape, size, gradient=size)
    w = oracle.weights(oracle.scores(run.update, run.gradients[-1], 0.5)[2], 3)
    run.check(oracle.own_loss(run.W, run.teacher, w), oracle.own_gradient(run.W, run.teacher, w))
    run = Trained(Update(3), shape, size, gradient=size)
    run.check(
        oracle.update_loss(run.W, run.teacher, run.update, w), oracle.update_gradient(run.W, run.teacher, run.update, w)
    )


@scales
@pytest.mark.parametrize("reading", [Own(0), Curvature()], ids=["own", "curvature"])
def test_the_plain_control(exponent, reading):
    run = Trained(Plain(reading), (7, 4), 10.0**exponent, steps=0)
    gap = oracle.as_array(run.W) - oracle.as_array(run.teacher)
    run.check((gap**2).sum() / 4, gap / 2)


@pytest.mark.parametrize("exponents", [(-38, 37), (37, -38), (0, 19), (-19, 0)])
def test_a_matrix_with_the_norm_of_another(exponents):
    wanted, matrix = ((random(2, 4, 3, seed=i) * 10.0**e).float() for i, e in enumerate(exponents))
    ours, theirs = oracle.as_array(wanted), oracle.as_array(matrix)
    norms = [np.linalg.norm(each, axis=(1, 2), keepdims=True) for each in (ours, theirs)]
    np.testing.assert_allclose(with_norm_of(wanted, matrix), theirs * (norms[0] / norms[1]), rtol=1e-5)


def test_zeros_have_no_norm_to_take_or_give():
    zeros, ones = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    assert with_norm_of(zeros, ones).abs().max() == 0
    assert with_norm_of(ones, zeros).abs().max() == 0
