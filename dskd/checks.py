"""Pairs that cannot be aligned, refused by name: when the loss is made, and when a matrix cannot be decomposed."""

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .groups import Pairs
from .matrices import shape_of
from .pairing.pairs import LayerPairs
from .sharding import check_sharding, local


class _HasPairs(Protocol):
    pairs: LayerPairs


_Loss = TypeVar("_Loss", bound=_HasPairs)
_R = TypeVar("_R")
_CannotDecompose: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


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
