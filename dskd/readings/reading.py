"""What every reading of the method has in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

State = dict[str, Tensor]  # what was chosen for some pairs of one shape: stacks with a row a pair
SPANS = ("step", "interval")


@dataclass(frozen=True, repr=False)
class Reading(ABC):
    """How directions are chosen, and how far student and teacher are apart along them.

    A reading holds its settings and nothing else. What it chooses is a `State`, which the loss keeps, shares among
    processes and saves. All matrices come as stacks (rows, m, n) of one shape in the working precision, as the network
    has them, and a stack may have no rows. `W_s` is the student's weight, `W_t` the teacher's.

    Attributes:
        span: the update that `choose` gets: of the last "step", or of the whole "interval" since the last choice.
        gradual: whether a choice changes little, and `weights` takes a decomposition to see it.
        lasting: what of a target no choice changes, by its names.
        any_shape: whether the teacher's matrices may be of another shape than the student's.
    """

    span = "step"
    gradual = False
    lasting: ClassVar[tuple[str, ...]] = ()
    any_shape = False

    @abstractmethod
    def start(self, student_mn: Tensor) -> State:
        """The state before the first choice."""

    @abstractmethod
    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        """The state after a choice.

        Args:
            update_mn: (rows, m, n), weights after the optimizer step minus weights before it; finite and not zero.
            gradient_mn: (rows, m, n), the gradients that this step used; finite and not zero.
            progress: optimizer steps done / planned, in [0, 1].
            chosen: the state so far.
        """

    def target(self, teacher_mn: Tensor, chosen: State, former: State) -> State:
        """What `value_and_gradient` needs of the teacher, computed once a choice and never saved.

        Args:
            teacher_mn: (rows, m, n), constants.
            chosen: the present state.
            former: what is `lasting` of the target before the last choice; empty at first.
        """
        return {"teacher": teacher_mn}

    @abstractmethod
    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        """The alignment losses (rows,) and their gradients (rows, m, n) with respect to the student."""

    def weights(self, chosen: State) -> Tensor:
        """Weights (rows, r) of the directions, those of large singular values first; zero where not selected."""
        return chosen["weights"]

    def __repr__(self) -> str:
        settings = ", ".join(f"{field.name}={_named(getattr(self, field.name))}" for field in fields(self))
        return f"{type(self).__name__}({settings})"


def _named(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


def check_span(span: str) -> None:
    if span not in SPANS:
        raise ValueError(f"span must be one of {', '.join(SPANS)}, got {span!r}")
