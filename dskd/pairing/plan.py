"""Which layers are to stand beside each other, by name: from a rule, or from patterns."""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from .layers import Layer
from .names import expand_names
from .pairs import LeftOut
from .rules import last_of_group, spread_evenly
from .stacks import Stack, matched_stacks

Rule = Callable[[int, int], Sequence[int]]  # blocks of the teacher, of the student -> a teacher's for each student's
_RULES: dict[str, Rule] = {"last_of_group": last_of_group, "spread_evenly": spread_evenly}
HINT = 'name the layers: pair_layers(student, teacher, [("student.layers.*.fc", "teacher.layers.*.fc")])'


class Plan(NamedTuple):
    """What `by_rule` and `by_patterns` give.

    Attributes:
        names: (student layer, teacher layer), which need not be there or fit.
        how: by what they were found, in words.
        outside: layers of the student that are not considered.
        required: those of `names` that must pair.
    """

    names: list[tuple[str, str]]
    how: str
    outside: Sequence[LeftOut] = ()
    required: frozenset[tuple[str, str]] = frozenset()


def by_rule(by: str | Rule | None, layers: dict[str, Layer], ours: list[Stack], theirs: list[Stack]) -> Plan:
    """Layers of the student beside those of the teacher in stacks that match, or of the same name."""
    if isinstance(by, str) and by not in ("names", *_RULES):
        raise ValueError(f"pair_layers knows the rules names, {', '.join(_RULES)}, got {by!r}")
    common = [name for name, layer in layers.items() if layer.common]
    stacks = [] if by == "names" else matched_stacks(ours, theirs)
    if not stacks and (by is None or by == "names"):
        return Plan([(name, name) for name in common], "by name")
    if not stacks:
        raise ValueError(f"no stacks of blocks match, student {_listed(ours)}, teacher {_listed(theirs)}; {HINT}")
    rules = [(_RULES[by] if isinstance(by, str) else by) or _fitting(*each) for each in stacks]
    names = [pair for rule, each in zip(rules, stacks, strict=True) for pair in _beside(rule, *each)]
    seen = {name for name, _ in names}
    outside = [LeftOut(name, "", "outside of the blocks") for name in common if name not in seen]
    where = ", ".join(student.beside(teacher) for student, teacher in stacks)
    return Plan(names, f"by {', '.join(dict.fromkeys(map(_named, rules)))}: {where}", outside)


def by_patterns(patterns: Sequence[tuple[str, str]], layers: dict[str, Layer]) -> Plan:
    """Layers of the student that match; what a pattern without "*" names must pair."""
    if not isinstance(patterns, Iterable):
        raise TypeError(f"pair_layers takes a rule or a list of patterns, got {patterns!r}")
    patterns = list(patterns)
    for each in patterns:
        if not isinstance(each, tuple | list) or len(each) != 2 or not all(isinstance(part, str) for part in each):
            raise TypeError(f"a pattern is (student layer, teacher layer), got {each!r}")
    names = expand_names(layers, patterns)
    for name, times in Counter(name for name, _ in names).items():
        if times > 1:
            raise ValueError(f"the patterns name the student's layer {name} {times} times; one teacher layer each")
    return Plan(names, "by patterns", required=frozenset((ours, theirs) for ours, theirs in patterns))


def _beside(rule: Rule, student: Stack, teacher: Stack) -> Iterator[tuple[str, str]]:
    """Names of the layers beside each other in two stacks."""
    try:
        chosen = [operator.index(k) for k in rule(len(teacher), len(student))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"student {student} and teacher {teacher} do not pair by {_named(rule)}: {error}") from None
    if len(chosen) != len(student) or not all(0 <= k < len(teacher) for k in chosen):
        raise ValueError(
            f"student {student} and teacher {teacher} do not pair: {_named(rule)} must give {len(student)} numbers "
            f"from 0 to {len(teacher) - 1}, got {chosen}"
        )
    for block, k in zip(student.blocks, chosen, strict=True):
        for name in student.layers[block]:
            yield f"{block}.{name}", f"{teacher.blocks[k]}.{name}"


def _fitting(student: Stack, teacher: Stack) -> Rule:
    divides = not student.convolutional and len(teacher) % len(student) == 0
    return last_of_group if divides else spread_evenly


def _named(rule: Rule) -> str:
    return getattr(rule, "__name__", None) or repr(rule)


def _listed(stacks: Sequence[Stack]) -> str:
    return ", ".join(map(str, stacks)) or "none"
