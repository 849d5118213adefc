"""Which student layer stands beside which teacher layer, and the weight pairs that follow from it."""

import re
from collections.abc import Sequence

from torch import Tensor, nn


def last_of_group(teacher_layers: int, student_layers: int) -> list[int]:
    """Teacher layer of every student layer where student layer i replaces the i-th group of L/l teacher layers.

    The last layer of the group: (i + 1) * L / l - 1, so that 12 and 6 give 1, 3, 5, 7, 9, 11.

    Raises:
        ValueError: the teacher's layers do not divide into the student's.
    """
    if not 0 < student_layers <= teacher_layers or teacher_layers % student_layers:
        divisors = [str(n) for n in range(1, teacher_layers + 1) if teacher_layers % n == 0]
        raise ValueError(
            f"{teacher_layers} layers do not divide into {student_layers} groups; possible are {', '.join(divisors)}"
        )
    group = teacher_layers // student_layers
    return [(i + 1) * group - 1 for i in range(student_layers)]


def spread_evenly(teacher_blocks: int, student_blocks: int) -> list[int]:
    """Teacher block of every student block of a stage: ceil(linspace(0, B - 1, b)); 9 and 3 give 0, 4, 8.

    Raises:
        ValueError: the student has more blocks than the teacher.
    """
    if not 0 < student_blocks <= teacher_blocks:
        raise ValueError(f"a stage of {teacher_blocks} teacher blocks cannot pair with {student_blocks} student blocks")
    gaps, last = student_blocks - 1, teacher_blocks - 1
    return [-(-i * last // gaps) if gaps else 0 for i in range(student_blocks)]  # in integers: no rounding surprises


def pair_weights(
    student: nn.Module, teacher: nn.Module, names: Sequence[tuple[str, str]], *, skip_mismatched: bool = False
) -> list[tuple[str, Tensor, Tensor]]:
    """The pairs that `DirectionSensitivityLoss` takes, from module names.

    Args:
        student, teacher: the networks that the names refer to.
        names: (student module, teacher module), each with a `weight`, such as ("stages.0.1.conv1", "stages.0.4.conv1").
        skip_mismatched: leave out pairs whose shapes differ instead of refusing them.

    Returns:
        (student module name, student weight, teacher weight) of every pair.

    Raises:
        ValueError: a name that is not there, shapes that differ (both layers and shapes are named), nothing left.
    """
    pairs = []
    for student_name, teacher_name in names:
        student_weight = _weight(student, student_name, "student")
        teacher_weight = _weight(teacher, teacher_name, "teacher")
        if student_weight.shape == teacher_weight.shape:
            pairs.append((student_name, student_weight, teacher_weight))
        elif not skip_mismatched:
            raise ValueError(
                f"layer pair of different shapes: student {student_name} {tuple(student_weight.shape)}, "
                f"teacher {teacher_name} {tuple(teacher_weight.shape)}; name other layers or skip mismatched pairs"
            )
    if not pairs:
        raise ValueError("no layer pair of equal shapes is left for DSKD")
    return pairs


def expand_patterns(student: nn.Module, patterns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Layer names from (student pattern, teacher pattern): each "*" of the teacher's takes what the student's matched.

    ("stages.*.0.conv1", "stages.*.4.conv1") pairs that block of every stage. A name without "*" stands for itself.

    Raises:
        ValueError: a pattern that matches no layer of the student, or two patterns with unequal numbers of "*".
    """
    names = []
    for student_pattern, teacher_pattern in patterns:
        if student_pattern.count("*") != teacher_pattern.count("*"):
            raise ValueError(f"layer patterns {student_pattern!r} and {teacher_pattern!r} differ in their number of *")
        expression = re.compile(re.escape(student_pattern).replace(r"\*", "([^.]+)"))
        matches = [match for name, _ in student.named_modules() if (match := expression.fullmatch(name))]
        if not matches:
            raise ValueError(f"the student has no layer {student_pattern!r}")
        for match in matches:
            taken = iter(match.groups())
            names.append((match.group(), re.sub(r"\*", lambda _, taken=taken: next(taken), teacher_pattern)))
    return names


def linear_names(layer: nn.Module) -> list[str]:
    """Names of all linear modules inside a layer: the six matrices of a BERT layer, for one."""
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def _weight(network: nn.Module, name: str, role: str) -> Tensor:
    try:
        weight = network.get_submodule(name).weight
    except AttributeError:
        weight = None
    if weight is None or weight.ndim < 2:
        raise ValueError(f"the {role} has no layer {name!r} with a weight matrix")
    return weight
