"""DirectionSensitivityLoss in small training runs, each recomputed with the float64 oracle.

`python -m pytest tests/dskd/test_loss.py` compares with tests/golden/svd_loss.json. After a change of the numerics
that is meant, write the file anew with `PYTHONPATH=.:tests/helpers python tests/dskd/test_loss.py` and say why in the
commit.
"""

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from losses import make_loss
from runs import BASES, Run, every_basis, every_singular_basis, first_weights, oracle_gradients, oracle_loss, rank_of
from torch import nn
from torch.testing import assert_close

from dskd import DirectionSensitivityLoss, Own, Spectrum, Update
from dskd.matrices import DRIVERS

GOLDEN = Path(__file__).parents[1] / "golden" / "svd_loss.json"


# Before the first choice
def test_rank_0_starts_as_the_plain_squared_difference():
    run = Run(rank=0)
    gaps = {name: (student - run.teachers[name]).square().sum() for name, student in run.students.items()}
    assert_close(run.dskd(), (gaps["square"] / 5 + gaps["wide"] / 4 + gaps["tall"] / 4 + gaps["conv"] / 4) / 4)


@pytest.mark.parametrize("rank", [0, 3, 99])
def test_weights_start_uniform_over_the_leading_directions(rank):
    run = Run(rank=rank)
    for name, w in first_weights(run, rank).items():
        assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w))


@every_singular_basis
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("rank", [0, 3])
def test_loss_before_the_first_refresh_equals_the_oracle(basis, driver, rank):
    run = Run(rank=rank, basis=basis, driver=driver)
    expected = oracle_loss(run, first_weights(run, rank), basis, directions=run.copies())
    assert run.dskd().item() == pytest.approx(expected, rel=1e-6)


@every_singular_basis
@pytest.mark.parametrize("rank", [0, 3])
def test_gradient_before_the_first_refresh_equals_the_oracle(basis, rank):
    run = Run(rank=rank, basis=basis)
    expected = oracle_gradients(run, first_weights(run, rank), basis, directions=run.copies())
    assert_close(run.gradients(), expected, rtol=1e-6, atol=1e-6)


# The loss and autograd
def test_the_loss_scales_its_gradient():
    run = Run(rank=3)
    once = run.gradients()
    thrice = torch.autograd.grad(3 * run.dskd(), list(run.students.values()))
    assert_close(dict(zip(run.students, thrice, strict=True)), {name: 3 * value for name, value in once.items()})


def test_the_loss_is_there_without_autograd():
    run = Run(rank=3)
    with torch.no_grad():
        loss = run.dskd()
    assert not loss.requires_grad
    assert_close(loss, run.dskd().detach())


@pytest.mark.parametrize("basis", ["own", "update", "curvature"])
def test_the_loss_may_be_read_in_inference_mode_and_training_goes_on(basis):
    runs = [Run(rank=0 if basis == "curvature" else 3, basis=basis, svd_steps=2) for _ in range(2)]
    for _ in range(4):
        with torch.inference_mode():
            read = runs[0].dskd()
        assert_close(read.clone(), runs[1].dskd().detach())
        for run in runs:
            run.optimizer.zero_grad()
            (run.task_loss() + run.dskd()).backward()
            run.update()
    for name, weight in runs[0].students.items():
        assert torch.equal(weight, runs[1].students[name])


def test_a_weight_in_two_pairs_gets_both_gradients():
    run = Run(shapes={"a": (5, 4), "b": (5, 4)}, rank=2)
    weight = run.students["a"]
    pairs = [("a", weight, run.teachers["a"]), ("b", weight, run.teachers["b"])]
    (actual,) = torch.autograd.grad(make_loss(pairs, rank=2)(), weight)
    w = oracle.first_weights(4, 2)
    expected = sum(oracle.own_gradient(weight, teacher, w) for teacher in run.teachers.values()) / 2
    assert_close(actual, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


# Precision and layout
@every_basis
@pytest.mark.parametrize(("of_student", "of_teacher"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_student_and_teacher_may_differ_in_precision(basis, of_student, of_teacher):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    same = {name: teacher.float() for name, teacher in run.teachers.items()}
    losses = []
    for dtype in (of_student, of_teacher):
        students = {name: nn.Parameter(weight.detach().float().to(of_student)) for name, weight in run.students.items()}
        pairs = [(name, weight, same[name].to(dtype)) for name, weight in students.items()]
        losses.append(make_loss(pairs, rank=rank_of(basis), basis=basis)())
    assert losses[0].dtype == of_student
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)


@every_basis
def test_bf16_weights_are_worked_on_in_float32(basis):
    half = Run(dtype=torch.bfloat16, rank=rank_of(basis), basis=basis)
    single = Run(dtype=torch.bfloat16, rank=rank_of(basis), basis=basis)
    students = {name: nn.Parameter(weight.detach().float()) for name, weight in single.students.items()}
    pairs = [(name, weight, single.teachers[name].float()) for name, weight in students.items()]
    single.students, single.dskd = students, make_loss(pairs, rank=rank_of(basis), basis=basis)
    assert half.dskd().dtype == torch.float32
    assert torch.equal(half.dskd(), single.dskd())
    rounded = {name: value.bfloat16() for name, value in single.gradients().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in half.gradients().items())


@every_basis
def test_float32_runs_are_close_to_float64(basis):
    settings = {"rank": rank_of(basis), "svd_steps": 4, "basis": basis}
    single, double = Run(dtype=torch.float32, **settings), Run(dtype=torch.float32, **settings)
    for name, weight in double.students.items():
        double.students[name].data = weight.data.double()
        for tensors in (double.teachers, double.targets, double.noise):
            tensors[name] = tensors[name].double()
    pairs = [(name, weight, double.teachers[name]) for name, weight in double.students.items()]
    double.dskd = make_loss(pairs, **settings)
    np.testing.assert_allclose(single.train(10), double.train(10), rtol=1e-3)


@every_basis
def test_autocast_does_not_reach_the_loss(basis):
    inside, outside = (Run(dtype=torch.float32, rank=rank_of(basis), svd_steps=2, basis=basis) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert inside.train(6) == outside_losses(outside)
    assert all(torch.equal(inside.weights()[name], w) for name, w in outside.weights().items())


def outside_losses(run: Run) -> list[float]:
    with torch.autocast("cpu", enabled=False):
        return run.train(6)


def convolutions(basis: str, layout=torch.contiguous_format) -> Run:
    shapes = {"a": (6, 3, 3, 3), "b": (6, 3, 3, 3), "point": (4, 8, 1, 1), "depth": (8, 1, 3, 3)}
    return Run(shapes=shapes, layout=layout, rank=rank_of(basis), svd_steps=4, grad_steps=2, basis=basis)


@every_basis
def test_convolution_weights_are_their_flattened_matrices(basis):
    conv, matrix = convolutions(basis), convolutions(basis)
    for tensors in (matrix.teachers, matrix.targets):
        tensors.update({name: value.flatten(1) for name, value in tensors.items()})
    matrix.noise = {name: value.flatten(2) for name, value in matrix.noise.items()}
    matrix.students = {name: nn.Parameter(weight.detach().flatten(1)) for name, weight in matrix.students.items()}
    matrix.optimizer = torch.optim.SGD(matrix.students.values(), lr=0.02, momentum=0.9)
    pairs = [(name, weight, matrix.teachers[name]) for name, weight in matrix.students.items()]
    matrix.dskd = make_loss(pairs, rank=rank_of(basis), svd_steps=4, grad_steps=2, basis=basis)
    assert conv.train(10) == pytest.approx(matrix.train(10), rel=1e-9)
    for name, value in conv.gradients().items():
        assert_close(value.flatten(1), matrix.gradients()[name])


@every_basis
def test_channels_last_weights_give_the_same_losses_and_gradients(basis):
    first, last = convolutions(basis), convolutions(basis, torch.channels_last)
    assert last.students["a"].is_contiguous(memory_format=torch.channels_last)
    assert last.train(10) == pytest.approx(first.train(10), rel=1e-9)
    gradients = last.gradients()
    assert_close(gradients, first.gradients())
    assert gradients["a"].is_contiguous(memory_format=torch.channels_last)


def test_a_weight_that_is_a_slice_gives_the_same_loss():
    whole = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = torch.zeros(6, 3, 3, 3, dtype=torch.float64)
    sliced = make_loss([("a", nn.Parameter(whole[:, 1:4]), teacher)], rank=2)
    copied = make_loss([("a", nn.Parameter(whole[:, 1:4].clone()), teacher)], rank=2)
    for dskd in (sliced, copied):
        dskd()
        with torch.no_grad():
            dskd.students[0].mul_(1.1)
    assert_close(sliced(), copied())


# Bad settings
@pytest.mark.parametrize("name", ["svd_steps", "grad_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, float("nan"), float("inf"), True, "5", None])
def test_an_interval_that_is_no_number_of_steps_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of at least 1, got {value!r}"):
        DirectionSensitivityLoss([("layer", nn.Parameter(torch.ones(3, 2)), torch.zeros(3, 2))], **{name: value})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "0.1", None])
def test_a_drift_that_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match=rf"drift must be 0 or a positive number, got {value!r}"):
        DirectionSensitivityLoss([("layer", nn.Parameter(torch.ones(3, 2)), torch.zeros(3, 2))], drift=value)


@pytest.mark.parametrize("reading", [Own, Update, Spectrum])
@pytest.mark.parametrize("value", [-1, 1.5, float("nan"), float("inf"), True, "3"])
def test_a_rank_that_is_no_number_of_directions_is_refused(reading, value):
    with pytest.raises(
        ValueError, match=rf"rank must be 0 \(all directions\) or a positive whole number, got {value!r}"
    ):
        reading(rank=value)


# Golden values
def golden_losses() -> dict[str, list[float]]:
    """20 steps in float32 with refreshes after 5, 10, 15 and gradients held for 2 steps."""
    settings = {"dtype": torch.float32, "svd_steps": 5, "grad_steps": 2}
    return {basis: Run(basis=basis, rank=rank_of(basis), **settings).train(20) for basis in BASES}


@every_basis
def test_losses_equal_the_golden_ones(basis):
    np.testing.assert_allclose(golden_losses()[basis], json.loads(GOLDEN.read_text())[basis], rtol=1e-4)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_losses(), indent=1) + "\n", encoding="utf-8")


def test_whole_numbers_of_numpy_are_whole_numbers():
    losses = []
    for kind in (int, np.int64):
        torch.manual_seed(0)
        student = nn.Parameter(torch.randn(12, 9))
        reading = Own(rank=kind(2))
        loss = DirectionSensitivityLoss([("a", student, torch.randn(12, 9))], reading, kind(2), grad_steps=kind(1))
        optimizer = torch.optim.SGD([student], lr=0.1)
        loss.attach(optimizer, total_steps=kind(8), weight=0.1)
        for _ in range(5):
            student.grad = torch.randn(12, 9)
            optimizer.step()
        losses.append(loss().item())
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="svd_steps"):
        DirectionSensitivityLoss([("a", student, torch.randn(12, 9))], svd_steps=np.bool_(True))
