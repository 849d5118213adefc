"""L2-SP, averaged weights and frozen layers: the right values, in a run, resumed, and refused where they cannot be."""

import pytest
import torch
from helpers.cv_fixtures import column, same_tensors, save_teacher, short_config, short_run
from torch import nn

from common.run.errors import UserError
from cv.blocks import copy_from_teacher
from cv.export import load_model
from cv.models import build_model
from cv.regularisers import StartingPoint, averaged, freeze
from cv.trainer import train

COPIED = "DISTILLER.START teacher"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def test_l2sp_is_half_the_squared_distance_from_the_start():
    network = nn.Linear(3, 2).double()
    network.bias.requires_grad_(False)
    penalty = StartingPoint(network, 0.7)
    with torch.no_grad():
        network.weight += torch.tensor([[1.0, 2.0, 0.0], [0.0, -3.0, 0.5]])
        network.bias += 5.0
    value = penalty()
    assert value.item() == pytest.approx(0.35 * (1 + 4 + 9 + 0.25), rel=1e-12)
    value.backward()
    torch.testing.assert_close(network.weight.grad, 0.7 * (network.weight.detach() - penalty.start[0]))


def test_the_average_is_the_running_mean_of_weights_and_batch_statistics():
    network = nn.BatchNorm1d(2)
    average = averaged(network, 0.75)
    expected = None
    for step in (1.0, 2.0, 4.0):
        with torch.no_grad():
            network.weight.fill_(step)
            network.running_mean.fill_(-step)
        average.update_parameters(network)
        expected = step if expected is None else 0.75 * expected + 0.25 * step
    torch.testing.assert_close(average.module.weight, torch.full((2,), expected))
    torch.testing.assert_close(average.module.running_mean, torch.full((2,), -expected))
    assert not average.module.weight.requires_grad


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["conv9.weight"], "no parameter of the student is named conv9.weight; the nearest is conv1.weight"),
        (["*"], "it leaves no parameter of the student to be trained"),
    ],
)
def test_names_that_do_not_fit_are_refused(patterns, message):
    with pytest.raises(UserError, match=message):
        freeze(build_model("resnet8", 10), patterns)


def test_frozen_layers_end_as_they_were_copied(tmp_path, teacher):
    run = short_run(tmp_path / "run", teacher, f"{COPIED} DISTILLER.FREEZE '[conv1.*, stages.0.*]'")
    source, _ = load_model(teacher)
    start = build_model("resnet8", 10)
    copy_from_teacher(start, source)
    for name, before in start.named_parameters():
        frozen = name.startswith(("conv1.", "stages.0."))
        assert torch.equal(run.weights[name], before) is frozen, name


def test_l2sp_holds_the_student_at_its_start(tmp_path, teacher):
    free, held = (
        short_run(tmp_path / name, teacher, f"{COPIED} SOLVER.L2SP {strength} SOLVER.LR 0.01")
        for name, strength in (("free", 0), ("held", 10))
    )
    source, _ = load_model(teacher)
    start = build_model("resnet8", 10)
    copy_from_teacher(start, source)

    def distance(run) -> float:
        return sum((run.weights[name] - W).square().sum().item() for name, W in start.named_parameters())

    assert distance(held) < 0.9 * distance(free)
    assert column(held, "l2sp_loss")[0] == 0.0  # before the first step
    assert column(held, "l2sp_loss")[-1] > 0.0


def test_the_average_is_what_is_evaluated_and_saved(tmp_path, teacher):
    run = short_run(tmp_path, teacher, "SOLVER.EMA 0.5")
    saved = {
        key.removeprefix("average.module."): W for key, W in run.checkpoint["weights"].items() if "average." in key
    }
    assert same_tensors({key: saved[key] for key in run.weights}, run.weights)
    assert not torch.equal(run.checkpoint["weights"]["student.conv1.weight"], run.weights["conv1.weight"])


def test_a_resumed_run_goes_on_with_average_and_start(tmp_path, teacher):
    overrides = f"{COPIED} SOLVER.EMA 0.9 SOLVER.L2SP 0.1 DISTILLER.FREEZE [conv1.*]"
    whole = short_run(tmp_path / "whole", teacher, f"{overrides} SOLVER.EPOCHS 2")
    train(short_config(tmp_path / "parts", teacher, overrides))
    resumed = short_run(tmp_path / "parts", teacher, f"{overrides} SOLVER.EPOCHS 2", resume=True)
    assert same_tensors(resumed.checkpoint["weights"], whole.checkpoint["weights"])
