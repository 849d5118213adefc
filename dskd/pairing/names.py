"""Layers by their names: pairs of weights from pairs of names, and names from patterns with "*"."""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .pairs import LayerPairs, LeftOut, Owner


def pair_weights(
    student: nn.Module,
    teacher: nn.Module,
    names: Sequence[tuple[str, str]],
    *,
    skip_mismatched: bool = False,
    any_shape: bool = False,
) -> LayerPairs:
    """The pairs that `DirectionSensitivityLoss` takes, from module names.

    Args:
        student, teacher: the networks that the names refer to.
        names: (student module, teacher module), each with a `weight`, such as ("stages.0.1.conv1", "stages.0.4.conv1").
        skip_mismatched: leave out pairs whose shapes differ instead of refusing them.
        any_shape: take pairs whose shapes differ, for the reading `Spectrum`.

    Returns:
        (student module name, student weight, teacher weight) of every pair; they know the modules, see `LayerPairs`.

    Raises:
        ValueError: a name that is not there, shapes that differ (both layers and shapes are named), nothing left.
    """
    pairs = LayerPairs(how="by name", teacher_names=dict(names))
    for student_name, teacher_name in names:
        student_weight = _weight(student, student_name, "student")
        teacher_weight = _weight(teacher, teacher_name, "teacher")
        if any_shape or student_weight.shape == teacher_weight.shape:
            pairs.append((student_name, student_weight, teacher_weight))
            modules = (student.get_submodule(student_name), teacher.get_submodule(teacher_name))
            pairs.owners[student_name] = (Owner(modules[0], "weight"), Owner(modules[1], "weight"))
        elif not skip_mismatched:
            raise ValueError(
                f"layer pair of different shapes: student {student_name} {tuple(student_weight.shape)}, "
                f"teacher {teacher_name} {tuple(teacher_weight.shape)}; name other layers or skip mismatched pairs"
            )
        else:
            pairs.left_out.append(LeftOut(student_name, teacher_name, "shapes differ"))
    if not pairs:
        raise ValueError("no layer pair of equal shapes is left for DSKD")
    return pairs


def expand_patterns(student: nn.Module, patterns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Layer names from (student pattern, teacher pattern): each "*" of the teacher's takes what the student's matched.

    ("stages.*.0.conv1", "stages.*.4.conv1") pairs that block of every stage. A name without "*" stands for itself.

    Raises:
        ValueError: a pattern that matches no layer of the student, or two patterns with unequal numbers of "*".
    """
    return expand_names([name for name, _ in student.named_modules()], patterns)


def expand_names(student_names: Iterable[str], patterns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """As `expand_patterns`, of a student whose layers have these names."""
    names = []
    for student_pattern, teacher_pattern in patterns:
        if student_pattern.count("*") != teacher_pattern.count("*"):
            raise ValueError(f"layer patterns {student_pattern!r} and {teacher_pattern!r} differ in their number of *")
        expression = re.compile(re.escape(student_pattern).replace(r"\*", "([^.]+)"))
        matches = [match for name in student_names if (match := expression.fullmatch(name))]
        if not matches:
            raise ValueError(f"the student has no layer {student_pattern!r}")
        first, *rest = teacher_pattern.split("*")
        for match in matches:
            taken = (part for pair in zip(match.groups(), rest, strict=True) for part in pair)
            names.append((match.group(), first + "".join(taken)))
    return names


def linear_names(layer: nn.Module) -> list[str]:
    """Names of all linear modules inside a layer: the six matrices of a BERT layer, for one."""
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def _weight(network: nn.Module, name: str, role: str) -> Tensor:
    try:
        weight = network.get_submodule(name).weight
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"the {role} has no layer {name!r} with a weight matrix")
    return weight
