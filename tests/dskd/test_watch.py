"""What can run but cannot be right is warned of, once, and what is right is not."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from dskd import Curvature, DirectionSensitivityLoss, Own
from dskd.watch import Watch

UNSEEN = "the student's weights keep changing and the loss sees no optimizer step"
FRUITLESS = "directions were due 3 times in a row and no pair had both a gradient and an update"
TOO_FEW = "9 steps are planned and directions are chosen every 10 (svd_steps): none will be chosen"


@pytest.fixture
def heard():
    """The warnings of DSKD."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(each.message).removeprefix("DSKD: ") for each in caught if "DSKD: " in str(each.message)]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(svd_steps: int = 2, grad_steps: int = 1, reading=None) -> tuple[nn.Parameter, DirectionSensitivityLoss]:
    W = nn.Parameter(drawn(5, 4))
    pairs = [("a", W, drawn(5, 4, seed=2))]
    return W, DirectionSensitivityLoss(pairs, reading or Own(2), svd_steps, grad_steps=grad_steps)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# The loss is not told of steps
@pytest.mark.parametrize(("grad_steps", "first"), [(1, 4), (3, 10)])
def test_weights_that_change_unseen_are_told_of_once(heard, grad_steps, first):
    W, dskd = make(grad_steps=grad_steps)
    optimizer = torch.optim.SGD([W], lr=0.01)
    at = []
    for call in range(1, 20):
        step(optimizer, dskd())
        at += [call] * (len(heard()) - len(at))
    assert at == [first]
    assert heard()[0].startswith(UNSEEN)
    assert "dskd.attach(optimizer, total_steps)" in heard()[0]


@pytest.mark.parametrize("reading", [Own(2), Curvature()], ids=["own", "curvature"])
@pytest.mark.parametrize("followed_by", ["attach", "observe"])
def test_a_loss_that_is_told_says_nothing(heard, followed_by, reading):
    W, dskd = make(reading=reading)
    optimizer = torch.optim.SGD([W], lr=0.01)
    if followed_by == "attach":
        dskd.attach(optimizer, 30)
    for number in range(30):
        optimizer.zero_grad()
        dskd().backward()
        if followed_by == "attach":
            optimizer.step()
        else:
            with dskd.observe(number / 30):
                optimizer.step()
    assert heard() == []


def test_calls_without_a_change_say_nothing(heard):
    _, dskd = make()
    for _ in range(30):
        dskd().backward()
    assert heard() == []


def test_a_weight_that_is_loaded_between_two_steps_says_nothing(heard):
    W, dskd = make()
    optimizer = torch.optim.SGD([W], lr=0.01)
    dskd.attach(optimizer, 20)
    for _ in range(10):
        step(optimizer, dskd())
        with torch.no_grad():
            W.copy_(W.clone())
        dskd()
    assert heard() == []


# Nothing is found where directions are due
def still(W: nn.Parameter, dskd: DirectionSensitivityLoss, steps: int, *, gradient: bool, update: bool) -> None:
    for _ in range(steps):
        W.grad = torch.ones_like(W) if gradient else None
        with dskd.observe(0.5), torch.no_grad():
            W += 0.01 if update else 0.0


def test_a_student_that_this_optimizer_does_not_train_is_told_of_once(heard):
    W, dskd = make(svd_steps=2)
    still(W, dskd, 4, gradient=False, update=True)
    assert heard() == []
    still(W, dskd, 10, gradient=False, update=True)
    assert len(heard()) == 1
    assert heard()[0].startswith(FRUITLESS)


def test_a_student_that_stands_still_is_told_of(heard):
    W, dskd = make(svd_steps=2)
    still(W, dskd, 4, gradient=True, update=False)
    assert [text.startswith(FRUITLESS) for text in heard()] == [True]


def test_a_choice_that_finds_something_starts_the_count_anew(heard):
    W, dskd = make(svd_steps=1)
    for _ in range(4):
        still(W, dskd, 2, gradient=False, update=True)
        still(W, dskd, 1, gradient=True, update=True)
    assert heard() == []


def test_steps_between_choices_do_not_count(heard):
    W, dskd = make(svd_steps=100)
    still(W, dskd, 60, gradient=False, update=True)
    assert heard() == []


# Too few steps
def test_a_training_shorter_than_the_first_choice_is_told_of(heard):
    W, dskd = make(svd_steps=10)
    dskd.attach(torch.optim.SGD([W], lr=0.1), 9)
    assert heard() == [TOO_FEW]


def test_a_training_that_reaches_it_is_not(heard):
    W, dskd = make(svd_steps=10)
    dskd.attach(torch.optim.SGD([W], lr=0.1), 10)
    assert heard() == []


@pytest.mark.parametrize(("taken", "told"), [(5, 0), (7, 1)])
def test_a_training_longer_than_planned_is_told_of_once(heard, taken, told):
    W, dskd = make(svd_steps=2)
    optimizer = torch.optim.SGD([W], lr=0.1)
    dskd.attach(optimizer, 5, weight=0.1)
    for _ in range(taken):
        optimizer.step()
    assert heard() == ["the training takes more than the 5 steps planned (total_steps)"] * told


# The words themselves
def test_a_text_is_said_once_and_another_one_besides(heard):
    watch = Watch()
    for text in ("one", "two", "one", "two"):
        watch.warn(text)
    assert heard() == ["one", "two"]
