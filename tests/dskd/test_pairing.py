"""Layer maps as method.md states them, and what a pair that does not fit is told."""

import pytest
import torch
from torch import nn

from dskd.pairing import expand_patterns, last_of_group, linear_names, pair_weights, spread_evenly


def network(**widths: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in widths.items()})


def test_twelve_layers_to_six_pair_with_every_second_one():
    assert last_of_group(12, 6) == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"), [(12, 4, [2, 5, 8, 11]), (6, 6, [0, 1, 2, 3, 4, 5]), (5, 1, [4])]
)
def test_other_ratios_pair_with_the_last_layer_of_every_group(teacher, student, pairs):
    assert last_of_group(teacher, student) == pairs


@pytest.mark.parametrize("student", [0, 5, 8, 24])
def test_layers_that_do_not_divide_are_refused_with_those_that_do(student):
    with pytest.raises(ValueError, match=r"possible are 1, 2, 3, 4, 6, 12"):
        last_of_group(12, student)


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        pytest.param(9, 3, [0, 4, 8], id="ResNet56 to ResNet20"),
        pytest.param(18, 5, [0, 5, 9, 13, 17], id="ResNet110 to ResNet32"),
        pytest.param(5, 1, [0], id="ResNet32x4 to ResNet8x4"),
        pytest.param(4, 4, [0, 1, 2, 3], id="equal depth"),
    ],
)
def test_blocks_spread_evenly_over_a_stage(teacher, student, pairs):
    assert spread_evenly(teacher, student) == pairs


@pytest.mark.parametrize("student", [0, 4])
def test_a_stage_with_more_student_than_teacher_blocks_is_refused(student):
    with pytest.raises(ValueError, match=f"3 teacher blocks .* {student} student blocks"):
        spread_evenly(3, student)


def test_pairs_hold_the_very_weights_of_the_named_layers():
    student, teacher = network(a=(3, 2)), network(b=(3, 2))
    [(name, student_weight, teacher_weight)] = pair_weights(student, teacher, [("a", "b")])
    assert name == "a"
    assert student_weight is student["a"].weight
    assert teacher_weight is teacher["b"].weight


def test_a_shape_mismatch_names_both_layers_and_both_shapes():
    with pytest.raises(ValueError, match="layer pair of different shapes") as caught:
        pair_weights(network(a=(3, 2)), network(b=(5, 4)), [("a", "b")])
    assert all(part in str(caught.value) for part in ("student a (2, 3)", "teacher b (4, 5)"))


def test_mismatched_pairs_are_left_out_on_request():
    student, teacher = network(a=(3, 2), c=(4, 4)), network(b=(5, 4), d=(4, 4))
    pairs = pair_weights(student, teacher, [("a", "b"), ("c", "d")], skip_mismatched=True)
    assert [name for name, _, _ in pairs] == ["c"]


def test_leaving_out_all_pairs_is_refused():
    with pytest.raises(ValueError, match="no layer pair of equal shapes"):
        pair_weights(network(a=(3, 2)), network(b=(5, 4)), [("a", "b")], skip_mismatched=True)


@pytest.mark.parametrize(("names", "role"), [(("x", "b"), "student"), (("a", "x"), "teacher")])
def test_a_layer_that_is_not_there_is_named_with_its_network(names, role):
    with pytest.raises(ValueError, match=f"{role} has no layer 'x'"):
        pair_weights(network(a=(3, 2)), network(b=(3, 2)), [names])


@pytest.mark.parametrize("pattern", ["{0}", "{}.x", "{"])
def test_braces_in_a_pattern_are_letters_like_any_other(pattern):
    assert expand_patterns(network(a=(3, 2)), [("a", pattern)]) == [("a", pattern)]
    assert expand_patterns(network(a=(3, 2)), [("*", f"*{pattern}")]) == [("a", f"a{pattern}")]


def test_a_layer_without_a_matrix_is_refused():
    student = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    with pytest.raises(ValueError, match="'norm' with a weight matrix"):
        pair_weights(student, student, [("norm", "norm")])


def test_linear_names_finds_linear_modules_at_any_depth():
    layer = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 3)), nn.Conv1d(2, 2, 1))
    assert linear_names(layer) == ["0", "1.1"]


def test_a_convolution_weight_pairs_as_it_is():
    student, teacher = nn.Sequential(nn.Conv2d(2, 4, 3)), nn.Sequential(nn.Conv2d(2, 4, 3))
    [(_, weight, _)] = pair_weights(student, teacher, [("0", "0")])
    assert weight.shape == torch.Size([4, 2, 3, 3])
