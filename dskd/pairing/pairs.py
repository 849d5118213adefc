"""The pairs that `pair_layers` finds: what the loss takes, with what was left out, and who owns the weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..matrices import shape_of


@dataclass(frozen=True)
class LeftOut:
    """A layer of the student that does not pair, the layer of the teacher beside it ("" for none), and why not."""

    student: str
    teacher: str
    reason: str


@dataclass(frozen=True)
class Owner:
    """The module that holds a weight, and its name there."""

    module: nn.Module
    parameter: str


class LayerPairs(list[tuple[str, Tensor, Tensor]]):
    """A list of (student layer, student weight, teacher weight) that prints as a table.

    Args:
        pairs: its items.
        how: by what they were paired, in words.
        teacher_names: of the paired layers, by the student's name.
        left_out: the student's layers that do not pair.
        owners: of both weights by the student's layer, for `check`; weights without owners are not checked.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[str, Tensor, Tensor]] = (),
        how: str = "",
        teacher_names: Mapping[str, str] | None = None,
        left_out: Sequence[LeftOut] = (),
        owners: Mapping[str, tuple[Owner | None, Owner | None]] | None = None,
    ):
        super().__init__(pairs)
        self.how, self.left_out = how, list(left_out)
        self.teacher_names, self.owners = dict(teacher_names or {}), dict(owners or {})

    def check(self) -> None:
        """Make sure that the weights are still those of the networks' layers, and that the student's can train.

        Raises:
            ValueError: naming the pair, where `load_state_dict(assign=True)`, `fully_shard`, peft or the like has put
                another weight in place of one, or frozen all of the student's.
        """
        for name, *weights in self:
            owners = self.owners.get(name, (None, None))
            for role, weight, owner in zip(("student", "teacher"), weights, owners, strict=True):
                now = weight if owner is None else getattr(owner.module, owner.parameter, None)
                if now is not weight:
                    raise ValueError(f"pair {name}: the {role}'s layer {_changed(now)}")
        if self.owners and not any(student.requires_grad for _, student, _ in self):
            raise ValueError(
                f"pair {self[0][0]}: the student's weight is frozen by now, as all paired ones are (peft freezes base "
                "weights); merge the adapter, or train the base weights"
            )

    def __str__(self) -> str:
        rows = [(name, self.teacher_names.get(name, ""), _shapes(ours, theirs)) for name, ours, theirs in self]
        lines = [f"{len(self)} pairs of layers{self.how and ' '}{self.how}"]
        lines += table([("student", "teacher", "weight"), *rows])
        return "\n".join([*lines, *(["left out"] if self.left_out else []), *reasons(self.left_out)])

    __repr__ = __str__


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([cell.ljust(size) for cell, size in zip(row, widths, strict=True)]).rstrip() for row in rows]


def reasons(left_out: Sequence[LeftOut], named: int = 3) -> list[str]:
    """A line for every reason: "reason: some layers and n more"."""
    layers: dict[str, list[str]] = {}
    for each in left_out:
        beside = f" beside {each.teacher}" if each.teacher not in ("", each.student) else ""
        layers.setdefault(each.reason, []).append(each.student + beside)
    return [f"{reason}: {_some(names, named)}" for reason, names in layers.items()]


def _some(names: Sequence[str], named: int) -> str:
    more = f" and {len(names) - named} more" if len(names) > named else ""
    return ", ".join(names[:named]) + more


def _shapes(student: Tensor, teacher: Tensor) -> str:
    shapes = dict.fromkeys(str(shape_of(weight)) for weight in (student, teacher))
    return " beside ".join(shapes)


def _changed(weight: object) -> str:
    if type(weight).__name__ == "DTensor":
        return "is sharded over processes by now; pair the layers and make the loss after fully_shard"
    return (
        "has another weight than when it was paired; pair the layers and make the loss after what replaces weights "
        "(load_state_dict(assign=True), peft, a parametrization)"
    )
