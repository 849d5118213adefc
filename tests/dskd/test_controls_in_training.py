"""Controls in small training runs: what they share with the method, and what is drawn when."""

import pytest
import torch
from runs import Run
from torch.testing import assert_close


@pytest.mark.parametrize("direction", ["plain", "random"])
@pytest.mark.parametrize(("basis", "rank"), [("own", 0), ("own", 3), ("update", 0), ("update", 3), ("curvature", 0)])
def test_a_control_has_the_norms_and_the_loss_of_dskd(basis, direction, rank):
    dskd, control = Run(rank=rank, basis=basis), Run(rank=rank, basis=basis, direction=direction)
    for name, gradient in dskd.gradients().items():
        assert control.gradients()[name].norm().item() == pytest.approx(gradient.norm().item())
    assert control.dskd().item() == pytest.approx(dskd.dskd().item())


def test_the_plain_control_goes_along_the_difference_of_the_weights():
    run = Run(rank=3, direction="plain")
    for name, gradient in run.gradients().items():
        gap = run.students[name].detach() - run.teachers[name]
        assert_close(gradient / gradient.norm(), gap / gap.norm())


def test_the_random_control_is_drawn_anew_at_every_expansion_and_repeats():
    first, second = (Run(rank=3, grad_steps=2, direction="random") for _ in range(2))
    for step in range(4):
        before = first.gradients()
        first.train(1)
        second.train(1)
        drawn, repeated = first.gradients(), second.gradients()
        for name in drawn:
            assert torch.equal(drawn[name], repeated[name])
            assert torch.equal(drawn[name], before[name]) == (step % 2 == 0)


def test_the_random_control_differs_between_pairs_of_one_shape():
    run = Run(shapes={"a": (30, 30), "b": (30, 30)}, rank=3, direction="random")
    a, b = run.gradients().values()
    assert abs((a * b).sum() / a.norm() / b.norm()).item() < 0.2
