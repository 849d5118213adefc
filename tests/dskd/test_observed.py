"""`observe` sees the update and the gradients of the step inside, or refuses."""

import pytest
import torch
from losses import make_loss
from torch import Tensor, nn
from torch.testing import assert_close

SHAPES = [(5, 4), (4, 6)]
READINGS = ("own", "update", "curvature")


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(**settings):
    students = [nn.Parameter(drawn(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    pairs = [(str(i), W, drawn(*W.shape, seed=50 + i)) for i, W in enumerate(students)]
    return make_loss(pairs, **{"rank": 2, "svd_steps": 1, "grad_steps": 1} | settings), students


def task(students: list[nn.Parameter]) -> Tensor:
    return sum((W * drawn(*W.shape, seed=7)).square().sum() for W in students)


def seen(dskd) -> list[list[Tensor]]:
    """Copies of the update and the gradient of every pair at every choice."""
    found, choose = [], dskd._choose

    def noted(step):
        found.append([G.clone() for G in step.gradients])
        return choose(step)

    dskd._choose = noted
    return found


# A backward pass inside
@pytest.mark.parametrize("basis", READINGS)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["after_another", "alone"])
def test_a_backward_pass_inside_is_refused(before, set_to_none, basis):
    """What a closure does that is called inside of the optimizer's step."""
    dskd, students = make(basis=basis)
    optimizer = torch.optim.SGD(students, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = task(students) + dskd()
        loss.backward()
        return loss

    if before:
        task(students).backward()
    told = r"a backward pass ran inside of the step.*`dskd\.attach"
    with pytest.raises(RuntimeError, match=told), dskd.observe(0.1):
        optimizer.step(closure)


def test_it_is_refused_between_two_choices_too_where_gradients_are_new():
    dskd, students = make(svd_steps=10)
    optimizer = torch.optim.SGD(students, lr=0.1)
    task(students).backward()

    def closure() -> None:
        optimizer.zero_grad()
        task(students).backward()

    with pytest.raises(RuntimeError, match="a backward pass ran inside"), dskd.observe(0.1):
        optimizer.step(closure)


def test_a_refused_step_leaves_no_hooks_and_the_next_one_is_fine():
    dskd, students = make()
    optimizer = torch.optim.SGD(students, lr=0.1)
    task(students).backward()
    with pytest.raises(RuntimeError), dskd.observe(0.1):
        task(students).backward()
    assert not any(W._post_accumulate_grad_hooks for W in students)
    with dskd.observe(0.1):
        optimizer.step()
    assert (dskd.steps, dskd.choices) == (1, 1)


def test_an_error_inside_passes_and_leaves_no_hooks():
    dskd, students = make()
    task(students).backward()
    with pytest.raises(ZeroDivisionError), dskd.observe(0.1):
        _ = 1 / 0
    assert not any(W._post_accumulate_grad_hooks for W in students)
    assert dskd.steps == 0


def test_gradients_may_be_set_to_none_inside_after_the_step():
    dskd, students = make()
    optimizer = torch.optim.SGD(students, lr=0.1)
    task(students).backward()
    with dskd.observe(0.1):
        optimizer.step()
        optimizer.zero_grad()
    assert dskd.choices == 1


@pytest.mark.filterwarnings("error")
def test_gradients_that_are_zeroed_inside_are_copied_from_then_on():
    dskd, students = make()
    optimizer = torch.optim.SGD(students, lr=0.1)
    found = seen(dskd)
    for step in range(3):
        task(students).backward()
        wanted = [W.grad.clone() for W in students]
        with dskd.observe(0.1):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert dskd.choices == step
    assert_close(found[-1], wanted, rtol=0, atol=0)


# What is seen
def test_the_gradient_is_the_one_at_the_beginning():
    dskd, students = make()
    optimizer = torch.optim.SGD(students, lr=0.1)
    found = seen(dskd)
    task(students).backward()
    nn.utils.clip_grad_norm_(students, 0.5)
    wanted = [W.grad.clone() for W in students]
    with dskd.observe(0.1):
        optimizer.step()
    assert_close(found[0], wanted, rtol=0, atol=0)


def test_nothing_is_copied_where_no_choice_is_due():
    dskd, _ = make(svd_steps=3)
    assert [dskd.begin_step(0.1).before is None, dskd.due] == [True, False]
    dskd.steps = 2
    assert [dskd.begin_step(0.1).before is None, dskd.due] == [False, True]
