"""The matched pairs of layers: checked, and grouped by shape, so that matrices of one shape are worked on together."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .matrices import as_matrix, shape_of, working_dtype
from .pairing.pairs import LayerPairs
from .processes import collect, rounds, share
from .readings import Reading, State
from .sharding import check_sharding, local, whole


class _HasPairs(Protocol):
    pairs: LayerPairs


_Loss = TypeVar("_Loss", bound=_HasPairs)
_R = TypeVar("_R")
_CannotDecompose: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
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


def naming_what_is_not_finite(expand: Callable[[_Loss], _R]) -> Callable[[_Loss], _R]:
    """Where a matrix cannot be decomposed, say of which pair it is and what is wrong with it."""

    @wraps(expand)
    def wrapped(loss: _Loss) -> _R:
        try:
            return expand(loss)
        except _CannotDecompose as error:
            for name, student, teacher in loss.pairs:
                for role, weight in (("student", student), ("teacher", teacher)):
                    if not local(weight).isfinite().all():
                        raise _CannotDecompose(
                            f"pair {name}: the {role}'s weight is not finite, so that DSKD cannot decompose it; look "
                            "for what made it so (a step with a gradient that was not finite, a learning rate too high)"
                        ) from error
            raise

    return wrapped


def check_pairs(pairs: Pairs, any_shape: bool = False) -> LayerPairs:
    """Refuse what cannot be aligned, by the pair's name.

    Args:
        any_shape: whether a teacher's shape may be another one than the student's.

    Returns:
        The pairs, whose `check` refuses weights that are the networks' no longer, if `pair_layers` gave them.

    Raises:
        ValueError: no pairs, a repeated name, shapes of a pair that differ, a weight that is no matrix or has no
            values, a student weight that cannot be trained or is the teacher's, or one that its layer has no longer.
        TypeError: a pair that is no (name, student weight, teacher weight), or weights that are no floating point.
    """
    pairs = pairs if isinstance(pairs, LayerPairs) else LayerPairs(pairs)
    if not pairs:
        raise ValueError("DSKD needs at least one pair of layers")
    for pair in pairs:
        _check_kind(pair)
    counts = Counter(name for name, _, _ in pairs)
    for name, student, teacher in pairs:
        if counts[name] > 1:
            raise ValueError(f"the pair name {name!r} occurs {counts[name]} times")
        if student.shape != teacher.shape and not any_shape:
            raise ValueError(_of_other_shapes(name, student, teacher))
        if _same_memory(student, teacher):
            raise ValueError(f"pair {name}: the teacher's weight is the student's own; give a copy (.detach().clone())")
        for weight in (student, teacher):
            if weight.ndim < 2:
                raise ValueError(
                    f"pair {name}: {shape_of(weight)} is no matrix; weights of 2 and more dimensions can pair"
                )
            check_sharding(name, weight)
        if not student.is_leaf:
            raise ValueError(
                f"pair {name}: the student's weight is computed from other tensors; give the parameter that is trained"
            )
        if not student.requires_grad:
            raise ValueError(
                f"pair {name}: the student's weight is frozen (requires_grad is False): DSKD could not move it; "
                "train it, or leave the pair out (of a LoRA layer train the base weight, or merge the adapter first)"
            )
    pairs.check()
    return pairs


def _check_kind(pair: Any) -> None:
    if not isinstance(pair, tuple | list) or len(pair) != 3 or not isinstance(pair[0], str):
        raise TypeError(f"a pair is (name, student weight, teacher weight), got {_short(pair)}")
    for role, weight in zip(("student", "teacher"), pair[1:], strict=True):
        if isinstance(weight, nn.Module):
            raise TypeError(f"pair {pair[0]}: the {role} is a {type(weight).__name__}; give its weight, a tensor")
        if not isinstance(weight, Tensor):
            raise TypeError(f"pair {pair[0]}: the {role}'s weight is a {type(weight).__name__}, not a tensor")
        if nn.parameter.is_lazy(weight):
            raise ValueError(
                f"pair {pair[0]}: the {role}'s weight is lazy and without a shape as yet; run a batch first"
            )
        if not weight.is_floating_point():
            raise TypeError(f"pair {pair[0]}: the {role}'s weight is of {weight.dtype}; DSKD takes real floating point")
        if not weight.numel():
            raise ValueError(f"pair {pair[0]}: the {role}'s weight {shape_of(weight)} is empty; leave the pair out")


def _same_memory(student: Tensor, teacher: Tensor) -> bool:
    ours, theirs = local(student), local(teacher)
    return ours.device == theirs.device and 0 != ours.data_ptr() == theirs.data_ptr()


def _version(teacher: Tensor) -> int:
    """Counts the operations in place on a tensor; tensors of inference have no such count."""
    return 0 if teacher.is_inference() else teacher._version


def _of_other_shapes(name: str, student: Tensor, teacher: Tensor) -> str:
    turned = student.ndim == 2 and student.shape == teacher.shape[::-1]
    hint = (
        "; one is (in, out) and the other (out, in): give the transpose of the teacher's"
        if turned
        else "; the reading Spectrum takes pairs of unequal shape"
    )
    return f"pair {name}: student {shape_of(student)} and teacher {shape_of(teacher)} must match{hint}"


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{len(value)} items: {', '.join(type(item).__name__ for item in value)}"
    return type(value).__name__
