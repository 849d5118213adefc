"""The matched pairs of layers, grouped by shape, so that matrices of one shape are worked on together."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .matrices import as_matrix, working_dtype
from .processes import collect, rounds, share
from .readings import Reading, State
from .sharding import whole

Pairs = Sequence[tuple[str, Tensor, Tensor]]  # (name, student weight, teacher weight)
_AT_ONCE = 2**20  # elements of the matrices that are decomposed together, which bounds the memory of a refresh


@dataclass
class Group:
    """Pairs whose students' weights are (m, n) matrices, and whose teachers' are of one shape too.

    Attributes:
        index: of every row of the group its place among all pairs.
        teacher_mn: the shape of the teachers' matrices, (m, n) but for readings of `any_shape`.
        chosen: what the reading has chosen, a row a pair.
        targets: what it has computed of the teacher for this process's share, by the rows of a round.
        former: of those before the last choice what still holds.
        versions: of the teachers when their targets were computed.
    """

    index: list[int]
    m: int
    n: int
    teacher_mn: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    chosen: State = field(default_factory=dict)
    targets: dict[tuple[int, ...], State] = field(default_factory=dict)
    former: dict[tuple[int, ...], State] = field(default_factory=dict)
    versions: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def rounds(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """The rows in parts that are worked on together."""
        return rounds(rows, max(1, _AT_ONCE // max(self.m * self.n, math.prod(self.teacher_mn))))

    def stack(self, tensors: Sequence[Any], rows: Sequence[int], shape: tuple[int, int] | None = None) -> Tensor:
        """This process's share of some matrices, (share, m, n) or (share, *shape), in the working precision.

        Args:
            tensors: in the order of all pairs.
            rows: of a round, the same on every process.
            shape: of the matrices.
        """
        mine = set(share(rows))
        found = [whole(tensors[self.index[row]], row in mine) for row in rows]
        if not mine:  # a process without work of its own
            return torch.zeros(0, *(shape or (self.m, self.n)), dtype=self.dtype, device=self.device)
        return torch.stack([as_matrix(W.detach()).to(self.dtype) for W in found if W is not None])

    def start(self, reading: Reading, students: Sequence[Tensor]) -> None:
        """The state before the first choice, if there is none."""
        if not self.chosen:
            parts = []
            for rows in self.rounds(range(len(self))):
                mine = reading.start(self.stack(students, rows))
                parts.append({key: collect(part, len(rows)) for key, part in mine.items()})
            self.chosen = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def target(self, reading: Reading, teachers: Sequence[Tensor], rows: list[int]) -> State:
        """What the reading needs of this process's share of some teachers, renewed after a choice.

        All of it is computed anew where an operation in place has changed a teacher, a running mean of students say.
        """
        key, versions = tuple(rows), [_version(teachers[self.index[row]]) for row in rows]
        if self.versions.get(key) != versions:
            self.targets.pop(key, None)
            self.former.pop(key, None)
            self.versions[key] = versions
        if key not in self.targets:
            teacher_mn, former = self.stack(teachers, rows, self.teacher_mn), self.former.pop(key, {})
            self.targets[key] = reading.target(teacher_mn, self.of_rows(rows), former)
        return self.targets[key]

    def of_rows(self, rows: list[int]) -> State:
        """What was chosen for this process's share of some rows."""
        mine = share(rows)
        everything = mine == list(range(len(self)))
        return {key: value if everything else value[mine] for key, value in self.chosen.items()}

    def renew(self, reading: Reading, rows: list[int], mine: State) -> None:
        """Take over what was newly chosen, `mine` for this process's share of the rows.

        Former tensors are left as they are, since saved states keep them.
        """
        for key, part in mine.items():
            new = collect(part, len(rows))
            if len(rows) < len(self):
                former = self.chosen.get(key)
                every = new.new_zeros(len(self), *new.shape[1:]) if former is None else former.clone()
                every[rows] = new
                new = every
            self.chosen[key] = new
        for place, target in self.targets.items():
            self.former[place] = {name: target[name] for name in reading.lasting if name in target}
        self.targets = {}


def group_by_shape(pairs: Pairs) -> list[Group]:
    groups: dict[tuple[Any, ...], Group] = {}
    for i, (_, weight, teacher) in enumerate(pairs):
        m, n = weight.shape[0], weight.shape[1:].numel()
        teacher_mn = (teacher.shape[0], teacher.shape[1:].numel())
        kind = (m, n, teacher_mn, working_dtype(weight), weight.device)
        group = groups.setdefault(kind, Group([], *kind))
        group.index.append(i)
    return list(groups.values())


def _version(teacher: Tensor) -> int:
    """Counts the operations in place on a tensor; tensors of inference have no such count."""
    return 0 if teacher.is_inference() else teacher._version
