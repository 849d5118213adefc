"""The gradient that is held: when it is renewed, what the loss is in between, and what a held step costs."""

import contextlib

import pytest
import torch
from drawn import random
from losses import loss_of, make_loss, move
from runs import (
    SHAPES,
    Run,
    every_basis,
    every_singular_basis,
    first_weights,
    flat,
    oracle_gradients,
    oracle_loss,
    rank_of,
    update_with_oracle,
)
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dskd import (
    DirectionSensitivityLoss,
    Own,
)


@every_singular_basis
def test_grad_steps_1_is_the_exact_loss_in_every_step(basis):
    run = Run(rank=rank_of(basis), svd_steps=4, basis=basis, grad_steps=1)
    w, directions = first_weights(run, 3), run.copies()
    for step in range(1, 11):
        assert run.dskd().item() == pytest.approx(oracle_loss(run, w, basis, directions), rel=1e-5)
        assert_close(run.gradients(), oracle_gradients(run, w, basis, directions), rtol=1e-5, atol=1e-6)
        run.backward()
        chosen, updates = update_with_oracle(run, 3)
        if step % 4 == 0:
            w, directions = chosen, updates


@every_singular_basis
def test_the_loss_in_between_is_the_first_order_expansion(basis):
    run = Run(rank=rank_of(basis), svd_steps=100, basis=basis, grad_steps=3)
    start, w = run.copies(), first_weights(run, 3)
    for step in range(7):
        if step % 3 == 0:
            here = run.copies()
            base = oracle_loss(run, w, basis, directions=start)
            gradients = oracle_gradients(run, w, basis, directions=start)
        slope = sum((flat(gradients[name]) * (now - here[name])).sum() for name, now in run.copies().items())
        assert run.dskd().item() == pytest.approx(base + slope, rel=1e-6)
        assert_close(run.gradients(), gradients, rtol=1e-6, atol=1e-6)
        run.train(1)


def test_by_default_the_gradient_is_exact_in_every_step():
    default, explicit = Run(rank=3, svd_steps=5), Run(rank=3, svd_steps=5, grad_steps=1)
    pairs = [(name, weight, default.teachers[name]) for name, weight in default.students.items()]
    default.dskd = DirectionSensitivityLoss(pairs, Own(rank=3), svd_steps=5)
    assert default.train(12) == explicit.train(12)
    assert default.dskd.expansions == 12


@every_basis
def test_gradient_accumulation_sees_one_gradient(basis):
    run = Run(rank=rank_of(basis), svd_steps=4, basis=basis, grad_steps=2)
    for _ in range(6):
        first, second = run.gradients(), run.gradients()
        assert all(torch.equal(first[name], second[name]) for name in first)
        run.train(1)


def test_a_step_may_pass_without_a_call():
    run = Run(rank=3, svd_steps=4, grad_steps=2)
    run.train(1)
    for _ in range(6):
        run.optimizer.zero_grad()
        run.task_loss().backward()
        run.update()
    w = {name: row.numpy() for name, row in run.weights().items()}
    expected = oracle_loss(run, w, "own")
    assert run.dskd().item() == pytest.approx(expected, rel=1e-6)


# Drift
def expanded_at(share: float, steps: int, **settings) -> list[int]:
    """Numbers of the steps whose gradient was computed and not held."""
    dskd, students = loss_of([(64, 48), (48, 64)], svd_steps=1000, **settings)
    at = []
    for step in range(steps):
        before = dskd.expansions
        move(dskd, students, share)
        at += [step] if dskd.expansions > before else []
    return at


def test_without_drift_the_gradient_is_renewed_every_grad_steps():
    assert expanded_at(0.001, 10, grad_steps=3) == [0, 3, 6, 9]


def test_weights_that_stand_still_keep_their_gradient():
    assert expanded_at(0.0, 10, grad_steps=3, drift=0.01) == [0]


def test_weights_that_move_fast_are_renewed_every_grad_steps():
    assert expanded_at(0.1, 10, grad_steps=3, drift=0.01) == [0, 3, 6, 9]


def test_drift_renews_after_the_step_in_which_a_matrix_has_moved_too_far():
    # steps of 1% in directions that are almost orthogonal: after k of them 1% sqrt(k), above 2.5% from 7 on
    renewed = expanded_at(0.01, 15, grad_steps=1, drift=0.025)
    assert renewed[1] in (6, 7, 8)


def test_one_matrix_that_moves_is_enough():
    dskd, students = loss_of([(24, 16), (16, 24)], svd_steps=1000, grad_steps=1, drift=0.01)
    dskd()
    with dskd.observe(progress=0.5), torch.no_grad():
        students[1] *= 1.1
    dskd()
    assert dskd.expansions == 2


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_the_drift_of_matrices_of_any_scale_is_noticed(scale):
    W = nn.Parameter((random(24, 16) * scale).float())
    dskd = make_loss([("0", W, W.detach() * 2)], 3, 1000, grad_steps=1, drift=0.01)
    for _ in range(3):
        dskd.gradients()
        with dskd.observe(progress=0.5), torch.no_grad():
            W *= 1.1
    assert dskd.expansions == 3


def test_a_choice_of_directions_renews_the_gradient_whatever_the_drift():
    dskd, students = loss_of([(24, 16)], svd_steps=4, grad_steps=4, drift=10.0)
    for _ in range(9):
        move(dskd, students, 1e-4)
    assert (dskd.choices, dskd.expansions) == (2, 3)


def test_drift_below_zero_or_not_finite_is_refused():
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="drift"):
            loss_of([(4, 4)], drift=wrong)


# Cost of a held step
class NoDecompositions(TorchDispatchMode):
    """Fails on matrix products and decompositions."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "linalg" in name or name in (
            "mm",
            "bmm",
            "addmm",
            "baddbmm",
            "_linalg_eigh",
            "_linalg_svd",
            "geqrf",
            "topk",
        ):
            raise AssertionError(f"{name} in a step with a held gradient")
        return func(*args, **kwargs or {})


def on_meta(**settings) -> DirectionSensitivityLoss:
    """On the meta device tensors have no values, so every read of one by the host raises."""
    weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES.values()]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    pairs = [(name, weight, torch.empty_like(weight)) for name, weight in zip(SHAPES, weights, strict=True)]
    return make_loss(pairs, rank=rank_of(settings.get("basis")), **settings)


def observed_step(dskd: DirectionSensitivityLoss) -> None:
    dskd().backward()
    optimizer = torch.optim.SGD(dskd.students, lr=0.1)
    with dskd.observe(progress=0.0):
        optimizer.step()


@pytest.fixture
def no_autocast(monkeypatch):
    """Autocast knows no meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


@every_basis
@pytest.mark.usefixtures("no_autocast")
def test_a_held_step_never_reads_a_value_on_the_host(basis):
    dskd = on_meta(svd_steps=10, basis=basis)
    for _ in range(3):
        observed_step(dskd)


@every_basis
@pytest.mark.usefixtures("no_autocast")
def test_a_recomputed_gradient_never_reads_a_value_on_the_host(basis):
    dskd = on_meta(svd_steps=10, grad_steps=1, basis=basis)
    for _ in range(3):
        observed_step(dskd)


@pytest.mark.usefixtures("no_autocast")
def test_the_host_check_notices_a_read():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        observed_step(on_meta(svd_steps=1))  # a refresh looks whether gradients are finite


@every_basis
def test_a_held_step_multiplies_and_decomposes_no_matrices(basis):
    run = Run(rank=rank_of(basis), svd_steps=10, basis=basis)
    run.train(1)
    with NoDecompositions():
        run.train(8)
    with NoDecompositions(), pytest.raises(AssertionError, match="in a step with a held gradient"):
        run.train(2)
