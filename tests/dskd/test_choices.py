"""When directions are chosen and from what, and which pairs keep theirs."""

import warnings

import oracle
import pytest
import torch
from drawn import random
from losses import loss_of, make_loss, move
from runs import (
    Run,
    every_basis,
    every_singular_basis,
    oracle_gradients,
    oracle_loss,
    overflow,
    rank_of,
    update_with_oracle,
)
from torch import nn
from torch.testing import assert_close

from dskd.matrices import DRIVERS


@pytest.mark.parametrize("driver", DRIVERS)
@every_singular_basis
@pytest.mark.parametrize("rank", [0, 3])
def test_directions_follow_the_real_update_and_gradient(rank, basis, driver):
    run = Run(rank=rank, svd_steps=4, basis=basis, driver=driver)
    for step in range(1, 13):
        run.backward()
        expected, updates = update_with_oracle(run, rank)
        if step % 4 == 0:
            for name, w in expected.items():
                assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w), rtol=1e-5, atol=1e-7)
            assert run.dskd().item() == pytest.approx(oracle_loss(run, expected, basis, updates), rel=1e-5)
            assert_close(run.gradients(), oracle_gradients(run, expected, basis, updates), rtol=1e-5, atol=1e-6)


@every_basis
def test_directions_change_at_multiples_of_svd_steps_and_only_there(basis):
    run = Run(rank=rank_of(basis), svd_steps=4, basis=basis)
    changed = []
    for step in range(1, 13):
        before = run.weights()
        run.train(1)
        if any(not torch.equal(before[name], w) for name, w in run.weights().items()):
            changed.append(step)
    assert changed == [4, 8, 12]


@pytest.mark.parametrize("lambda_size", [0.0, 3.0])
def test_the_gradient_that_counts_is_the_one_of_the_whole_loss(lambda_size):
    run = Run(rank=3, svd_steps=1)
    run.backward(lambda_size)
    expected, _ = update_with_oracle(run, 3)
    for name, w in expected.items():
        assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w), rtol=1e-5, atol=1e-7)


def test_nesterov_momentum_does_not_change_the_gradient_that_is_seen():
    run = Run(rank=3, svd_steps=3)
    run.optimizer = torch.optim.SGD(run.students.values(), lr=0.05, momentum=0.9, nesterov=True, foreach=True)
    run.train(3)  # the third step shows that gradients must be copied, so that the fourth makes up for it
    run.backward()
    before = run.students["square"].grad.clone()
    expected, _ = update_with_oracle(run, 3)
    assert not torch.equal(before, run.students["square"].grad), "this optimizer no longer changes .grad in place"
    for name, w in expected.items():
        assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w), rtol=1e-5, atol=1e-7)


@every_basis
def test_a_scaled_gradient_gives_the_same_directions(basis):
    plain, scaled = (Run(rank=rank_of(basis), svd_steps=1, basis=basis) for _ in range(2))
    plain.train(1)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**16)
    scaler.scale(scaled.task_loss() + 0.1 * scaled.dskd()).backward()
    with scaled.dskd.observe(progress=0.0):
        scaler.step(scaled.optimizer)
    scaler.update()
    assert_close(scaled.weights(), plain.weights(), rtol=1e-9, atol=1e-12)
    assert_close(scaled.dskd(), plain.dskd(), rtol=1e-9, atol=0)


def test_an_optimizer_that_leaves_the_gradient_alone_needs_no_copy_of_it():
    dskd, students = loss_of([(9, 6)], svd_steps=2)
    seen = []
    choose = dskd._choose
    dskd._choose = lambda step: seen.extend(step.gradients) or choose(step)
    for _ in range(2):
        move(dskd, students, 0.01)
    assert [grad.data_ptr() for grad in seen] == [students[0].grad.data_ptr()]


def test_an_optimizer_that_changes_the_gradient_delays_the_first_choice_by_a_step():
    W = nn.Parameter(random(9, 6))
    optimizer = torch.optim.SGD([W], lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    dskd = make_loss([("W", W, random(9, 6, seed=1))], 3, svd_steps=4)
    chosen = []
    for step in range(12):
        optimizer.zero_grad()
        (dskd() + (W * random(9, 6, seed=2)).sum()).backward()
        before = dskd.choices
        with dskd.observe(progress=0.5):
            optimizer.step()
        chosen += [step + 1] if dskd.choices > before else []
    assert chosen == [5, 8, 12]


# Which pairs keep their directions
def kept(basis: str, spoil=None, skip=()) -> dict[str, bool]:
    """Which pairs have the same direction weights before and after the second refresh."""
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    run.train(3)
    run.backward()
    if spoil is not None:
        spoil(run)
    before = run.weights()
    run.update(skip)
    return {name: torch.equal(before[name], w) for name, w in run.weights().items()}


ONLY_WIDE = {"square": False, "wide": True, "tall": False, "conv": False}


def no_gradient(run: Run) -> None:
    run.students["wide"].grad = None


def zero_gradient(run: Run) -> None:
    run.students["wide"].grad.zero_()


def zero_update(run: Run) -> None:
    groups = [{"params": [run.students["wide"]], "lr": 0.0}]
    groups.append({"params": [weight for name, weight in run.students.items() if name != "wide"]})
    run.optimizer = torch.optim.SGD(groups, lr=0.05)


@every_basis
@pytest.mark.parametrize("spoil", [no_gradient, zero_gradient, zero_update])
def test_a_pair_that_cannot_be_scored_keeps_its_directions(basis, spoil):
    assert kept(basis, spoil) == ONLY_WIDE


@every_basis
def test_a_skipped_pair_keeps_its_directions(basis):
    assert kept(basis, skip=["wide"]) == ONLY_WIDE


@every_singular_basis
def test_a_skipped_pair_keeps_its_loss_function(basis):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    run.train(1)
    run.backward()
    w, updates = update_with_oracle(run, 3)  # the first refresh, of all
    run.train(1)
    run.backward()
    chosen, moved = update_with_oracle(run, 3, skip=["wide", "conv"])  # the second, of square and tall
    w, updates = w | chosen, updates | moved
    assert run.dskd().item() == pytest.approx(oracle_loss(run, w, basis, updates), rel=1e-5)


@every_singular_basis
def test_a_pair_skipped_from_the_start_keeps_the_leading_directions(basis):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    start = run.copies()
    run.train(1)
    run.backward()
    w, updates = update_with_oracle(run, 3, skip=["wide"])
    w["wide"], updates["wide"] = oracle.first_weights(4, 3), start["wide"]
    assert run.dskd().item() == pytest.approx(oracle_loss(run, w, basis, updates), rel=1e-5)


# Gradients that are not finite
@pytest.mark.filterwarnings("ignore:DSKD")
def test_a_gradient_that_is_not_finite_keeps_all_directions():
    run = Run(rank=3, svd_steps=4)
    run.train(3)
    before = run.weights()
    overflow(run)
    assert all(torch.equal(before[name], w) for name, w in run.weights().items())


def test_gradients_that_are_not_finite_warn_once():
    run = Run(rank=3, svd_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            overflow(run)
    assert [str(w.message).startswith("DSKD: a gradient or update is not finite") for w in caught] == [True]


@pytest.mark.filterwarnings("ignore:DSKD")
@every_singular_basis
def test_a_postponed_refresh_is_made_up_at_the_next_good_step(basis):
    run = Run(rank=rank_of(basis), svd_steps=4, basis=basis)
    run.train(3)
    overflow(run)
    overflow(run)
    run.backward()
    expected, updates = update_with_oracle(run, 3)
    for name, w in expected.items():
        assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w), rtol=1e-5, atol=1e-7)
    assert run.dskd().item() == pytest.approx(oracle_loss(run, expected, basis, updates), rel=1e-5)


@pytest.mark.filterwarnings("ignore:DSKD")
def test_the_schedule_goes_on_after_a_postponed_refresh():
    run = Run(rank=3, svd_steps=4)
    run.train(3)
    overflow(run)
    run.train(1)
    changed = []
    for step in range(6, 10):
        before = run.weights()
        run.train(1)
        if not torch.equal(before["square"], run.weights()["square"]):
            changed.append(step)
    assert changed == [8]


@pytest.mark.filterwarnings("ignore:DSKD")
def test_an_update_that_is_not_finite_keeps_all_directions():
    run = Run(rank=3, svd_steps=1)
    run.train(2)
    before = run.weights()
    run.backward()
    with run.dskd.observe(progress=0.1), torch.no_grad():
        run.students["wide"][0, 0] = float("nan")
    assert all(torch.equal(before[name], w) for name, w in run.weights().items())


def test_an_overflow_elsewhere_in_the_model_postpones_the_refresh():
    run = Run(rank=3, svd_steps=4)
    run.train(3)
    run.backward()
    with run.dskd.observe(progress=0.15):
        pass  # the scaler left the step out because of a weight that is in no pair
    run.step += 1
    before = run.weights()
    run.train(1)
    assert not any(torch.equal(before[name], w) for name, w in run.weights().items())


# What `observe` refuses
@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_outside_the_unit_interval_is_refused(progress):
    run = Run(rank=3)
    with pytest.raises(ValueError, match="progress"), run.dskd.observe(progress=progress):
        pass


def test_an_unknown_name_to_skip_is_refused():
    run = Run(rank=3, svd_steps=1)
    run.backward()
    with pytest.raises(ValueError, match="squares"):
        run.update(["squares"])
