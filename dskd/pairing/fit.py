"""Why two layers cannot pair."""

from collections.abc import Collection, Mapping

from torch import nn

from ..matrices import shape_of
from .layers import Layer, joined


def why_not(
    student: Layer, teacher: Layer | None, shared: Mapping[int, list[str]], paired: Collection[int], any_shape: bool
) -> str | None:
    """The reason in a few words; None where the layers pair.

    Args:
        shared: names of the parameters that share a weight of the student, by its id.
        paired: ids of weights that stand in a pair already.
        any_shape: whether a teacher of another shape will do.
    """
    if teacher is None:
        return "no counterpart"
    return _of_student(student, shared, paired) or _of_teacher(teacher) or _of_both(student, teacher, any_shape)


def _of_student(student: Layer, shared: Mapping[int, list[str]], paired: Collection[int]) -> str | None:
    weight = student.weight
    if nn.parameter.is_lazy(weight):
        return "lazy and without a shape as yet (run a batch first)"
    if not weight.is_leaf:
        return "computed from other tensors (a parametrization)"
    if not weight.requires_grad and student.adapter is not None:
        return "frozen under an adapter (merge the adapter, or train the base weight)"
    if not weight.requires_grad:
        return "frozen (requires_grad is False)"
    if id(weight) in paired:
        return "shared with a layer that is paired"
    own = joined(student.name, "weight") if student.parameter == "weight" else student.name
    names = [name for name in shared.get(id(weight), []) if name != own]
    return f"shared with {names[0]}" if names else None


def _of_teacher(teacher: Layer) -> str | None:
    adapter, weight = teacher.adapter, teacher.weight
    if nn.parameter.is_lazy(weight):
        return "the teacher's is lazy and without a shape as yet (run a batch first)"
    if adapter is not None and not getattr(adapter, "merged", False):
        return "the teacher's has an adapter beside it (merge the adapter)"
    if not weight.is_floating_point():
        return f"the teacher's is quantised ({weight.dtype})"
    return None


def _of_both(student: Layer, teacher: Layer, any_shape: bool) -> str | None:
    if student.weight is teacher.weight:
        return "the teacher's weight is the student's own"
    if any_shape:
        return None
    if student.dims != teacher.dims:
        return f"dimensions differ, {student.dims} beside {teacher.dims}"
    if student.weight.shape != teacher.weight.shape:
        return f"shapes differ, {shape_of(student.weight)} beside {shape_of(teacher.weight)}"
    return None
