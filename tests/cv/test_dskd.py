"""DSKD in the vision pipeline: the layer map, pairs by name, what every setting does, and the control arms."""

import json

import pytest
import torch
from cv_fixtures import (
    column,
    same_tensors,
    save_teacher,
    short_run,
)
from safetensors.torch import load_file
from torch import nn

import cv.assembly
import cv.trainer
from common import ROOT
from common.run.errors import UserError
from common.svd_loss import DirectionSensitivityLoss
from cv.blocks import copy_from_teacher
from cv.config import defaults, load_config
from cv.dskd import build_dskd, layer_map, layer_pairs
from cv.models import build_model
from cv.teachers import load_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a resnet14 with random weights."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def network(name: str) -> nn.Module:
    return build_model(name, 10)


def settings(**changes):
    block = defaults().DSKD
    block.merge_from_list([word for item in changes.items() for word in item])
    return block


def blocks(stage_map: list[int]) -> list[tuple[str, str]]:
    """Names of conv1 and conv2 in three stages, from the teacher's block of every student block of a stage."""
    return [
        (f"stages.{stage}.{ours}.{conv}", f"stages.{stage}.{theirs}.{conv}")
        for stage in range(3)
        for ours, theirs in enumerate(stage_map)
        for conv in ("conv1", "conv2")
    ]


@pytest.mark.parametrize(
    ("teacher", "student", "stage_map"),
    [
        ("resnet56", "resnet20", [0, 4, 8]),
        ("resnet110", "resnet32", [0, 5, 9, 13, 17]),
        ("resnet32x4", "resnet8x4", [0]),
        ("wrn_40_2", "wrn_16_2", [0, 5]),
        ("resnet20", "resnet20", [0, 1, 2]),
    ],
)
def test_blocks_pair_stage_by_stage_as_documented(teacher, student, stage_map):
    assert layer_map(network(student), network(teacher), settings()) == blocks(stage_map)


@pytest.mark.parametrize(("teacher", "student"), [("resnet56", "resnet20"), ("wrn_40_2", "wrn_16_2")])
def test_the_loss_compares_the_weights_of_the_mapped_layers(teacher, student):
    ours, theirs = network(student), network(teacher)
    names = layer_map(ours, theirs, settings())
    gaps = [ours.get_submodule(a).weight - theirs.get_submodule(b).weight for a, b in names]
    # before the first choice of directions each of the r = min(m, n) weighs 1 / r
    expected = sum(gap.double().square().sum() / min(len(gap), gap[0].numel()) for gap in gaps) / len(gaps)
    dskd = build_dskd(layer_pairs(ours, theirs, settings()), settings(), seed=1)
    torch.testing.assert_close(dskd().double(), expected, rtol=1e-5, atol=0)


def test_pairs_by_name_take_a_star_alike_in_both():
    pairs = [["stages.*.0.conv2", "stages.*.1.conv2"], ["classifier", "classifier"]]
    assert layer_map(network("resnet8"), network("resnet14"), settings(PAIRS=pairs)) == [
        ("stages.0.0.conv2", "stages.0.1.conv2"),
        ("stages.1.0.conv2", "stages.1.1.conv2"),
        ("stages.2.0.conv2", "stages.2.1.conv2"),
        ("classifier", "classifier"),
    ]


def test_a_student_layer_with_two_teachers_is_refused():
    pairs = [["stages.0.0.conv2", "stages.0.0.conv2"], ["stages.*.0.conv2", "stages.*.1.conv2"]]
    with pytest.raises(UserError, match=r"DSKD\.PAIRS names the student's layer stages\.0\.0\.conv2 2 times"):
        layer_pairs(network("resnet8"), network("resnet14"), settings(PAIRS=pairs))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (["stages.9.0.conv1", "stages.0.0.conv1"], r"the student has no layer 'stages\.9\.0\.conv1'"),
        (["stages.0.0.conv1", "stages.0.9.conv1"], r"the teacher has no layer 'stages\.0\.9\.conv1'"),
        (["bn1", "bn1"], r"the student has no layer 'bn1' with a weight matrix"),
        (["stages.*.0.conv1", "stages.0.0.conv1"], r"differ in their number of \*"),
    ],
)
def test_a_pair_that_is_not_there_is_named(pair, message):
    with pytest.raises(UserError, match=message):
        layer_pairs(network("resnet8"), network("resnet14"), settings(PAIRS=[pair]))


def test_pairs_of_different_shapes_are_refused_with_both_names_and_shapes():
    with pytest.raises(UserError) as caught:
        layer_pairs(network("wrn_16_1"), network("wrn_40_2"), settings())
    for part in ("student stages.0.0.conv1 (16, 16, 3, 3)", "teacher stages.0.0.conv1 (32, 16, 3, 3)"):
        assert part in str(caught.value)


def test_pairs_of_different_shapes_are_left_out_on_request():
    pairs = [["stages.*.0.conv1", "stages.*.0.conv1"], ["conv1", "conv1"]]
    kept = layer_pairs(network("wrn_16_1"), network("wrn_40_2"), settings(PAIRS=pairs, SKIP_MISMATCHED=True))
    assert [name for name, _, _ in kept] == ["conv1"]  # the stem has 16 channels in both


def test_networks_that_share_no_shape_are_refused_even_then():
    with pytest.raises(UserError, match="no layer pair of equal shapes is left"):
        layer_pairs(network("wrn_16_1"), network("wrn_40_2"), settings(SKIP_MISMATCHED=True))


@pytest.mark.parametrize(
    ("student", "teacher", "role"), [("vgg8", "resnet8", "student"), ("resnet8", "vgg8", "teacher")]
)
@pytest.mark.parametrize("other", ["vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"])
def test_a_network_without_residual_blocks_asks_for_the_pairs(student, teacher, role, other):
    student, teacher = (name.replace("vgg8", other) for name in (student, teacher))
    with pytest.raises(UserError, match=rf"the {role} \w+ has no stages of residual blocks; .* DSKD\.PAIRS"):
        layer_pairs(network(student), network(teacher), settings())


def test_networks_without_residual_blocks_pair_by_name():
    ours, theirs = network("vgg8"), network("vgg8")
    names = [name for name, module in ours.named_modules() if isinstance(module, nn.Conv2d)]
    kept = layer_pairs(ours, theirs, settings(PAIRS=[[name, name] for name in names]))
    assert [name for name, _, _ in kept] == names


def test_a_student_with_more_blocks_than_its_teacher_is_refused():
    with pytest.raises(UserError, match="1 teacher blocks cannot pair with 2 student blocks"):
        layer_pairs(network("resnet14"), network("resnet8"), settings())


def test_networks_with_unequal_numbers_of_stages_ask_for_the_pairs():
    student = network("resnet8")
    student.stages = student.stages[:2]
    with pytest.raises(
        UserError, match=r"the student has 2 stages and the teacher 3; name the layer pairs in DSKD\.PAIRS"
    ):
        layer_pairs(student, network("resnet14"), settings())


def test_the_map_is_printed_at_the_start_with_what_is_left_out(tmp_path, teacher, capsys):
    pairs = "[[stages.0.0.conv1, stages.0.1.conv1], [stages.2.0.conv1, stages.2.1.conv1]]"
    short_run(tmp_path, teacher, f"DSKD.ENABLED true DSKD.SKIP_MISMATCHED true DSKD.PAIRS '{pairs}'")
    printed = capsys.readouterr().out.splitlines()
    assert "  stages.0.0.conv1 <- stages.0.1.conv1" in printed
    assert "  stages.2.0.conv1 <- stages.2.1.conv1 (left out: shapes differ)" in printed


# 8 steps; directions are chosen after steps 3 and 6, gradients are exact in every second step
JOINED = "SOLVER.BATCH_SIZE 16 DSKD.ENABLED true DSKD.SVD_STEPS 3 DSKD.GRAD_STEPS 2"
LOSSES = ("loss_ce", "loss_kd", "dskd_loss")


@pytest.fixture(scope="module")
def joined(tmp_path_factory, teacher):
    return short_run(tmp_path_factory.mktemp("joined"), teacher, JOINED)


def test_the_task_loss_follows_from_dskd_alone(tmp_path, teacher, joined):
    alone = short_run(tmp_path, teacher, JOINED + " DSKD.ENABLED false")
    assert column(alone, "loss_kd")[0] == column(joined, "loss_kd")[0]
    assert column(alone, "loss_kd")[1] != column(joined, "loss_kd")[1]
    assert "dskd_loss" not in alone.steps[0]
    assert alone.result["dskd"] is None


@pytest.mark.parametrize(
    ("change", "steps_alike"),
    [
        ("DSKD.LAMBDA 0.4", 1),
        ("DSKD.RANK 2", 0),
        ("DSKD.SVD_STEPS 2", 2),
        ("DSKD.GRAD_STEPS 1", 1),
        ("DSKD.BASIS update", 0),
        ("DSKD.DIRECTION plain", 4),  # while all directions weigh alike, DSKD's gradient is along W_s - W_t, too
        ("DSKD.DIRECTION random", 1),
        ("DSKD.DIRECTION shuffled", 0),
        ("DSKD.DIRECTION shrink", 0),
        ("DSKD.DIRECTION released", 1),
        ("DSKD.ALPHA 1", 3),
        ("DSKD.SCORE tempered", 3),
        ("DSKD.SCORE magnitude", 3),
        ("DSKD.SCORE random", 3),
        ("DSKD.SPAN interval", 3),
        ("DSKD.PAIRS '[[stages.*.0.conv2, stages.*.1.conv2]]'", 0),
    ],
)
def test_every_setting_has_its_effect_and_not_before_its_time(tmp_path, teacher, joined, change, steps_alike):
    ours = column(short_run(tmp_path, teacher, f"{JOINED} {change}"), "dskd_loss")
    theirs = column(joined, "dskd_loss")
    assert ours[:steps_alike] == pytest.approx(theirs[:steps_alike], rel=1e-6)
    assert ours[-1] != pytest.approx(theirs[-1], rel=3e-5)


def test_the_driver_shows_in_the_rounding_from_the_first_choice_of_directions_on(tmp_path, teacher, joined):
    changed = short_run(tmp_path, teacher, f"{JOINED} DSKD.DRIVER svd")
    for name in LOSSES:
        assert column(changed, name)[:3] == column(joined, name)[:3]
    assert column(changed, "dskd_loss")[3:] != column(joined, "dskd_loss")[3:]
    assert column(changed, "dskd_loss") == pytest.approx(column(joined, "dskd_loss"), rel=1e-4)


def test_the_total_is_the_parts_with_dskd_times_lambda(joined):
    for line in joined.steps:
        total = line["loss_ce"] + line["loss_kd"] + 0.2 * line["dskd_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-6)


def test_the_settings_stand_in_the_result(joined):
    assert joined.result["dskd"] == joined.config["DSKD"]
    assert joined.result["dskd"]["SVD_STEPS"] == 3


def test_the_concentration_of_the_directions_is_logged(joined):
    effective = column(joined, "effective_directions")
    # 16, 16, 32, 32, 64 and 64 rows, all of equal weight up to the third step, after which directions are chosen
    assert effective[:3] == pytest.approx([224 / 6] * 3)
    assert all(1 <= value < 224 / 6 for value in effective[3:])


def test_dskd_falls_and_leaves_the_teacher_alone(tmp_path, teacher, monkeypatch):
    teachers = []

    def load(*args, **how):
        teachers.append(load_teacher(*args, **how))
        return teachers[0]

    monkeypatch.setattr(cv.assembly, "load_teacher", load)
    run = short_run(tmp_path, teacher, "SOLVER.EPOCHS 2 DSKD.ENABLED true DSKD.SVD_STEPS 3 DSKD.LAMBDA 1")
    values = column(run, "dskd_loss")
    assert values[2] < values[1] < values[0]  # one and the same loss up to the first choice of directions
    assert values[5] < values[3]  # and up to the second
    assert same_tensors(teachers[0].network.state_dict(), load_file(teacher / "model.safetensors"))


def test_dskd_joins_plain_training_too(tmp_path, teacher):
    run = short_run(tmp_path, teacher, "DISTILLER.TYPE vanilla DSKD.ENABLED true")
    assert set(run.steps[0]) >= {"loss_ce", "dskd_loss"}
    assert "loss_kd" not in run.steps[0]
    assert run.result["teacher"] == "resnet14"


SHAPES = {"square": (6, 6), "wide": (4, 3, 3, 3), "tall": (9, 5), "second of a shape": (6, 6)}


def arms(basis: str, rank: int, steps: int) -> dict[str, tuple[DirectionSensitivityLoss, list[nn.Parameter], list]]:
    """DSKD and its two control arms on equal weights, after the same optimizer steps."""
    made = {}
    for direction in ("sensitive", "plain", "random"):
        torch.manual_seed(5)
        students = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES.values()]
        teachers = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES.values()]
        pairs = list(zip(SHAPES, students, teachers, strict=True))
        block = settings(RANK=rank, BASIS=basis, SVD_STEPS=1, GRAD_STEPS=1, DRIFT=0.0, DIRECTION=direction)
        dskd = build_dskd(pairs, block, seed=5)
        optimizer = torch.optim.SGD(students, lr=0.1)
        for step in range(steps):
            for weight in students:
                weight.grad = torch.randn(weight.shape, dtype=torch.float64)
            with dskd.observe(step / 10):
                optimizer.step()
        optimizer.zero_grad()
        made[direction] = dskd, students, teachers
    return made


def gradients(dskd: DirectionSensitivityLoss, students: list[nn.Parameter]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(dskd(), students))


@pytest.mark.parametrize("basis", ["own", "update"])
@pytest.mark.parametrize(("rank", "steps"), [(0, 0), (2, 0), (0, 3), (2, 3)])
@pytest.mark.parametrize("direction", ["plain", "random"])
def test_control_arms_have_dskd_gradient_norm_in_every_matrix(basis, rank, steps, direction):
    made = arms(basis, rank, steps)
    wanted = [gradient.norm() for gradient in gradients(*made["sensitive"][:2])]
    norms = [gradient.norm() for gradient in gradients(*made[direction][:2])]
    assert min(wanted) > 0
    torch.testing.assert_close(torch.stack(norms), torch.stack(wanted))


@pytest.mark.parametrize("basis", ["own", "update"])
def test_the_plain_arm_points_along_the_difference_of_the_weights(basis):
    dskd, students, teachers = arms(basis, 2, 3)["plain"]
    for gradient, ours, theirs in zip(gradients(dskd, students), students, teachers, strict=True):
        gap = ours.detach() - theirs
        torch.testing.assert_close(gradient / gradient.norm(), gap / gap.norm())


def test_the_random_arm_draws_a_direction_of_its_own_for_every_matrix_and_step():
    dskd, students, _ = arms("own", 2, 3)["random"]
    first = gradients(dskd, students)
    with dskd.observe(0.5), torch.no_grad():
        for weight in students:
            weight += 0.01
    second = gradients(dskd, students)
    directions = [(g / g.norm()).flatten() for g in (first[0], first[3], second[0], second[3])]
    cosines = torch.stack(directions) @ torch.stack(directions).T
    assert cosines.fill_diagonal_(0).abs().max() < 0.6


def test_pairs_that_cannot_be_aligned_are_the_users_error():
    pair = ("w", nn.Parameter(torch.ones(2, 2), requires_grad=False), torch.zeros(2, 2))
    with pytest.raises(UserError, match="pair w: the student's weight is frozen"):
        build_dskd([pair], settings(), seed=1)


# A student that starts as the teacher's blocks


def test_a_student_of_the_teachers_depth_starts_as_the_teacher():
    ours, theirs = network("resnet14"), network("resnet14")
    copy_from_teacher(ours, theirs)
    assert same_tensors(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(("teacher", "student"), [("resnet56", "resnet20"), ("wrn_40_2", "wrn_16_2")])
def test_a_shallower_student_starts_with_the_paired_blocks_and_the_rest_of_the_teacher(teacher, student):
    ours, theirs = network(student), network(teacher)
    copy_from_teacher(ours, theirs)
    layers = layer_map(ours, theirs, settings())
    layers += [("conv1", "conv1"), ("stages.1.0.bn1", "stages.1.0.bn1"), ("classifier", "classifier")]
    for a, b in layers:
        assert same_tensors(ours.get_submodule(a).state_dict(), theirs.get_submodule(b).state_dict())


def test_a_tensor_that_cannot_be_copied_is_named_with_both_shapes():
    with pytest.raises(UserError) as caught:
        copy_from_teacher(network("wrn_16_1"), network("wrn_40_2"))
    for part in ("stages.0.0.conv1.weight (16, 16, 3, 3)", "(32, 16, 3, 3)", "START random"):
        assert part in str(caught.value)


def test_networks_without_blocks_cannot_start_from_the_teacher():
    with pytest.raises(UserError, match=r"DISTILLER\.START teacher: the student VGG has no stages"):
        copy_from_teacher(network("vgg8"), network("resnet8"))


def test_a_run_that_starts_from_the_teacher_says_so_and_trains_from_there(tmp_path, teacher, capsys):
    run = short_run(tmp_path, teacher, "SOLVER.LR 1e-9 DISTILLER.START teacher DISTILLER.STUDENT resnet14")
    assert "started as a copy of its blocks" in capsys.readouterr().out
    before = load_file(teacher / "model.safetensors")
    torch.testing.assert_close(run.weights["classifier.weight"], before["classifier.weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("control", ["sensitive", "random"])
def test_networks_of_unequal_width_pair_by_their_spectra(tmp_path, control):
    teacher = save_teacher(tmp_path / "teacher", "wrn_40_2")
    networks = "DISTILLER.TEACHER wrn_40_2 DISTILLER.STUDENT wrn_16_1"
    dskd = f"DSKD.ENABLED true DSKD.BASIS spectrum DSKD.SVD_STEPS 2 DSKD.DIRECTION {control}"
    run = short_run(tmp_path / "run", teacher, f"{networks} {dskd} SOLVER.EPOCHS 1")
    assert all(value > 0 for value in column(run, "dskd_loss"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "directions.jsonl").read_text().splitlines()]
    assert lines[-1]["distance"].keys() == lines[-1]["weights"].keys()
    assert all(value > 0 for value in lines[-1]["distance"].values())


def test_the_plain_difference_of_unequal_shapes_is_refused():
    message = r"DSKD\.DIRECTION = 'plain': expected sensitive, random.* with DSKD\.BASIS spectrum"
    with pytest.raises(UserError, match=message):
        load_config(str(ROOT / "configs/demo/base.yaml"), ["DSKD.BASIS", "spectrum", "DSKD.DIRECTION", "plain"])
