"""The matched pairs of layers, put together by shape, so that matrices of one shape are decomposed together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.matrices import as_matrix, shape_of, tall, working
from common.ranks import rounds

Pairs = Sequence[tuple[str, Tensor, Tensor]]  # (name, student weight, teacher weight)
_AT_ONCE = 2**20  # elements of the matrices that are decomposed together, which bounds the memory of a refresh


class Group:
    """Pairs of one (tall) shape, decomposed together. Tensors: (pairs, ...) stacks in the working precision."""

    def __init__(self, names: list[str], students: list[Tensor], teachers: list[Tensor]):
        self.names, self.students, self.teachers = names, students, teachers
        self.m, self.r = tall(as_matrix(students[0])).shape
        self.dtype = working(students[0].detach()).dtype
        self.teacher_V: dict[int, Tensor] = {}  # right singular vectors of the teachers that this rank needs
        self.weights = self.left = self.right = None  # None: no refresh has chosen directions yet
        self.spectrum = None  # (pairs, r) singular values of the updates of the last choice, in units of the largest

    def rounds(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """The rows in parts that are worked on together."""
        return rounds(rows, max(1, _AT_ONCE // (self.m * self.r)))

    def stack(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        return torch.stack([tall(working(as_matrix(tensors[i].detach()))) for i in rows]).to(self.dtype)


def group_by_shape(pairs: Pairs) -> list[Group]:
    members: dict[tuple, list] = {}
    for pair in pairs:
        weight = pair[1]
        key = (tall(as_matrix(weight)).shape, working(weight).dtype, weight.device)
        members.setdefault(key, []).append(pair)
    return [Group(*(list(column) for column in zip(*group, strict=True))) for group in members.values()]


def check_pairs(pairs: Pairs) -> None:
    if not pairs:
        raise ValueError("DSKD needs at least one pair of layers")
    names = [name for name, _, _ in pairs]
    for name, student, teacher in pairs:
        if names.count(name) > 1:
            raise ValueError(f"the pair name {name!r} occurs {names.count(name)} times")
        if student.shape != teacher.shape:
            raise ValueError(f"pair {name}: student {shape_of(student)} and teacher {shape_of(teacher)} must match")
        if student.ndim < 2:
            raise ValueError(
                f"pair {name}: {shape_of(student)} is no matrix; weights of 2 and more dimensions can pair"
            )
