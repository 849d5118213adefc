"""What a loss says of itself: its directions, and what it is."""

import pytest
import torch
from losses import make_loss
from runs import Run
from torch import Tensor, nn
from torch.testing import assert_close

from dskd import Curvature, DirectionSensitivityLoss, Own, Update
from dskd.controls import Plain
from dskd.sensitivity import magnitude, tempered

SHAPES = {"square": (5, 5), "wide": (4, 7), "tall": (7, 4)}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs() -> list[tuple[str, nn.Parameter, Tensor]]:
    return [
        (name, nn.Parameter(drawn(*shape, seed=i)), drawn(*shape, seed=9 + i))
        for i, (name, shape) in enumerate(SHAPES.items())
    ]


def moved(dskd: DirectionSensitivityLoss) -> dict[str, Tensor]:
    """The updates of one step in which all weights move."""
    updates = {}
    with dskd.observe(0.4), torch.no_grad():
        for i, (name, W) in enumerate(zip(dskd.names, dskd.students, strict=True)):
            updates[name] = 0.1 * drawn(*W.shape, seed=20 + i)
            W += updates[name]
    return updates


def prepared(dskd: DirectionSensitivityLoss) -> DirectionSensitivityLoss:
    for i, W in enumerate(dskd.students):
        W.grad = drawn(*W.shape, seed=30 + i)
    return dskd


# What it is
def test_a_loss_is_shown_with_its_size_reading_intervals_and_progress():
    dskd = prepared(DirectionSensitivityLoss(pairs(), Update(rank=3), svd_steps=2, grad_steps=2, drift=0.01))
    reading = "Update(rank=3, driver='gram', score=sensitivity, span='step')"
    held = "svd_steps=2, grad_steps=2, drift=0.01"
    shown = f"DirectionSensitivityLoss(3 pairs, 81 weights, {reading}, {held}; %d steps done, %d choices)"
    assert repr(dskd) == shown % (0, 0)
    for _ in range(3):
        moved(dskd)
    assert repr(dskd) == shown % (3, 1)


def test_a_drift_of_zero_and_the_thousands_of_weights():
    W = nn.Parameter(torch.zeros(100, 50))
    shown = repr(DirectionSensitivityLoss([("a", W, torch.ones(100, 50))]))
    assert "1 pairs, 5,000 weights" in shown
    assert "svd_steps=100, grad_steps=1; 0 steps" in shown


@pytest.mark.parametrize(
    ("reading", "shown"),
    [
        (Own(), "Own(rank=32, smoothing=0.0, driver='gram', score=sensitivity, span='step')"),
        (Own(score=tempered), "Own(rank=32, smoothing=0.0, driver='gram', score=tempered, span='step')"),
        (Update(0, "svd", magnitude, "interval"), "Update(rank=0, driver='svd', score=magnitude, span='interval')"),
        (Curvature(), "Curvature(memory=0.95, factors='full')"),
        (Plain(Curvature()), "Plain(reading=Curvature(memory=0.95, factors='full'))"),
    ],
)
def test_a_reading_is_shown_with_all_its_settings(reading, shown):
    assert repr(reading) == shown


# Its directions
@pytest.mark.parametrize("basis", ["own", "update", "curvature"])
def test_reports_name_the_pairs_in_their_order(basis):
    dskd = make_loss(pairs(), rank=3, basis=basis)
    for report in (dskd.direction_weights(), dskd.update_spectra(), dskd.effective_directions()):
        assert list(report) == list(SHAPES)


@pytest.mark.parametrize("basis", ["own", "update"])
def test_the_spectrum_is_that_of_the_update_by_its_largest_value(basis):
    dskd = prepared(make_loss(pairs(), rank=3, svd_steps=1, basis=basis))
    assert not any(row.any() for row in dskd.update_spectra().values())
    for name, update in moved(dskd).items():
        sigma = torch.linalg.svdvals(update)
        assert_close(dskd.update_spectra()[name], sigma / sigma[0], rtol=1e-6, atol=1e-9)


def test_the_curvature_decomposes_no_update_and_reports_zeros():
    dskd = prepared(make_loss(pairs(), svd_steps=1, basis="curvature"))
    moved(dskd)
    assert {name: tuple(row.shape) for name, row in dskd.update_spectra().items()} == {
        "square": (5,),
        "wide": (4,),
        "tall": (4,),
    }
    assert not any(row.any() for row in dskd.update_spectra().values())


def test_a_pair_without_a_choice_has_no_spectrum():
    dskd = prepared(make_loss([*pairs(), ("again", nn.Parameter(drawn(7, 4)), drawn(7, 4))], rank=3, svd_steps=1))
    with dskd.observe(0.4, skip=["again"]), torch.no_grad():
        for i, W in enumerate(dskd.students):
            W += 0.1 * drawn(*W.shape, seed=20 + i)
    assert dskd.update_spectra()["tall"][0] == 1
    assert not dskd.update_spectra()["again"].any()


# How many directions the weights amount to
def test_effective_directions_start_at_rank():
    run = Run(rank=3)
    assert run.dskd.effective_directions() == {name: 3.0 for name in run.students}


def test_effective_directions_of_a_rank_above_r_are_r():
    assert Run(rank=0).dskd.effective_directions() == {"square": 5.0, "wide": 4.0, "tall": 4.0, "conv": 4.0}


def test_effective_directions_are_one_over_the_sum_of_squares():
    run = Run(rank=3, svd_steps=2)
    run.train(2)
    for name, w in run.weights().items():
        assert run.dskd.effective_directions()[name] == pytest.approx(1 / sum(x * x for x in w.tolist()))
