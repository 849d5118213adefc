"""Controls for experiments: what the method is compared with, to see which part of it does the work. Not the method.

A control takes the place of a reading, around another one (`Plain(Own())`), or changes the pairs (`shuffled(pairs, 1)`)
or the score (`Own(score=Dealt(sensitivity, 1))`). What is drawn at random follows a seed and the numbers at hand, so
that processes agree and resumed runs repeat, with nothing to save.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import Pairs
from .matrices import as_matrix, columns, unit_scale, with_norm_of
from .readings import Curvature, Own, Reading, State
from .readings.own import low_rank_part
from .sensitivity import Score, selected_count


@dataclass(frozen=True, repr=False)
class Control(Reading):
    """A reading around another one, which it leaves as it is but for what a subclass changes."""

    reading: Reading

    @property
    def span(self) -> str:  # type: ignore[override]
        return self.reading.span

    @property
    def any_shape(self) -> bool:  # type: ignore[override]
        return self.reading.any_shape

    @property
    def gradual(self) -> bool:  # type: ignore[override]
        return self.reading.gradual

    @property
    def lasting(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.reading.lasting

    def start(self, student_mn: Tensor) -> State:
        return self.reading.start(student_mn)

    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        return self.reading.choose(update_mn, gradient_mn, progress, chosen)

    def target(self, teacher_mn: Tensor, chosen: State, former: State) -> State:
        return {**self.reading.target(teacher_mn, chosen, former), "teacher": teacher_mn}

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        return self.reading.value_and_gradient(student_mn, target, chosen)

    def weights(self, chosen: State) -> Tensor:
        return self.reading.weights(chosen)


class Plain(Control):
    """The gradient along W_s - W_t with the norm of the reading's: L2-SP (Li et al., ICML 2018) on paired weights."""

    @property
    def any_shape(self) -> bool:  # type: ignore[override]  # a difference asks for equal shapes
        return False

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        value, gradient_mn = self.reading.value_and_gradient(student_mn, target, chosen)
        return value, with_norm_of(gradient_mn, student_mn - target["teacher"])


@dataclass(frozen=True, repr=False)
class RandomDirection(Control):
    """A gradient in a random direction, drawn at every computation, with the norm of the reading's."""

    seed: int = 0

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        value, gradient_mn = self.reading.value_and_gradient(student_mn, target, chosen)
        drawn = [torch.randn(D.shape, generator=_generator(self.seed, D), dtype=D.dtype) for D in gradient_mn]
        other = torch.stack(drawn).to(gradient_mn.device) if drawn else gradient_mn
        return value, with_norm_of(gradient_mn, other)


@dataclass(frozen=True, repr=False)
class ReleasedGradient(Control):
    """Around `Own`: the gradient of the authors' release, with its own norm. It is not the gradient of the loss.

    It goes back through the right singular vectors of the student alone; U and sigma count as constants. What is not
    finite, which repeated and vanishing singular values bring about, becomes 0. Unlike the method itself it is not
    symmetric under transposition: a matrix counts as the network has it, (out, in).
    """

    reading: Own

    def __post_init__(self) -> None:
        if not isinstance(self.reading, Own):
            raise ValueError(f"the released gradient is one of Own, not of {self.reading!r}")

    def target(self, teacher_mn: Tensor, chosen: State, former: State) -> State:
        rank, r = self.reading.rank, min(teacher_mn.shape[-2:])
        released = low_rank_part(teacher_mn, chosen["weights"], selected_count(rank, r), self.reading.driver)
        return {**super().target(teacher_mn, chosen, former), "released": released}

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        value, gradient_mn = self.reading.value_and_gradient(student_mn, target, chosen)
        rows = zip(student_mn, target["released"], chosen["weights"], strict=True)
        released = [released_gradient(*row) for row in rows]
        return value, torch.stack(released) if released else gradient_mn


def released_gradient(student: Tensor, teacher_low_rank: Tensor, weights: Tensor) -> Tensor:
    """Back-propagation of || W~_s - W~_t ||_F^2 through the right singular vectors of the student alone.

    Args:
        student: (m, n).
        teacher_low_rank: (m, n), W~_t.
        weights: (r,) of the directions, r = min(m, n).

    Returns:
        (m, n).
    """
    student = student.detach().requires_grad_()
    with torch.enable_grad():
        U_mr, sigma_r, Vh_rn = torch.linalg.svd(student, full_matrices=False)
        aligned = (U_mr.detach() * (weights.sqrt() * sigma_r.detach())) @ Vh_rn
        (gradient,) = torch.autograd.grad((aligned - teacher_low_rank).square().sum(), student)
    return torch.where(gradient.isfinite(), gradient, 0.0)


@dataclass(frozen=True, repr=False)
class ConstantProgress(Control):
    """Directions are chosen as at one and the same progress, alpha: 0 by the gradient alone, 1 by the curvature."""

    alpha: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")

    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        return self.reading.choose(update_mn, gradient_mn, self.alpha, chosen)


@dataclass(frozen=True, repr=False)
class ShuffledFactors(Control):
    """Around `Curvature`: the rows and columns of each factor in a random order, the same at every call."""

    reading: Curvature
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.reading, Curvature) or isinstance(self.reading, DiagonalFisher):
            raise ValueError(f"shuffled factors are those of Curvature, not of {self.reading!r}")

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        factors = {side: self._reordered(chosen[side], target["teacher"], side) for side in ("left", "right")}
        return self.reading.value_and_gradient(student_mn, target, {**chosen, **factors})

    def _reordered(self, factors: Tensor, teachers: Tensor, side: str) -> Tensor:
        if not len(factors):
            return factors
        generators = [_generator(self.seed + (side == "right"), teacher) for teacher in teachers]
        order = torch.stack([torch.randperm(factors.shape[-1], generator=g) for g in generators]).to(factors.device)
        if factors.ndim == 2:  # diagonals
            return factors.gather(-1, order)
        return columns(columns(factors, order).mT, order)


@dataclass(frozen=True, repr=False)
class DiagonalFisher(Curvature):
    """EWC (Kirkpatrick et al., PNAS 2017) on paired weights: L = (s / r) sum F D^2, D = W_s - W_t, r = min(m, n).

    F is a running mean of the squared gradients of single entries, as `Curvature` keeps one of the gradients' products;
    the factor s = ||D|| / ||F D|| is a constant and gives the gradient the norm of that of ||D||^2 / r, as there. The
    Fisher matrix is the empirical one of whole batches (Ritter, Botev & Barber, NeurIPS 2018, compare the two forms).

    Args:
        memory: as of `Curvature`.

    Raises:
        ValueError: memory outside [0, 1), factors.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors != "full":
            raise ValueError("DiagonalFisher has a mean for every entry and no factors; leave factors as it is")

    def start(self, student_mn: Tensor) -> State:
        return {"fisher": torch.ones_like(student_mn)}

    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        """The running mean `fisher` (rows, m, n), of a mean entry of 1, with one gradient more in it."""
        squares = unit_scale(gradient_mn)[0].square()
        total = squares.mean((-2, -1), keepdim=True)
        return {"fisher": torch.lerp(squares / torch.where(total > 0, total, 1.0), chosen["fisher"], self.memory)}

    def weighed(self, gap_mn: Tensor, chosen: State) -> Tensor:
        """F D."""
        return chosen["fisher"] * gap_mn

    def weights(self, chosen: State) -> Tensor:
        """The sums (rows, r) of F along its longer side, falling, by their sum."""
        m, n = chosen["fisher"].shape[-2:]
        sums = chosen["fisher"].sum(-1 if m < n else -2)
        return sums.sort(-1, descending=True).values / (m * n)


@dataclass(frozen=True)
class Dealt:
    """A score that deals another one's values out to the directions at random: as uneven, on other directions."""

    score: Score
    seed: int = 0

    def __call__(
        self, update_mn: Tensor, gradient_mn: Tensor, sigma_q: Tensor, V_nq: Tensor, progress: float
    ) -> Tensor:
        scores = self.score(update_mn, gradient_mn, sigma_q, V_nq, progress)
        orders = [torch.randperm(len(row), generator=_generator(self.seed, row)) for row in scores]
        return scores.gather(-1, torch.stack(orders).to(scores.device)) if orders else scores

    @property
    def __name__(self) -> str:
        return f"Dealt({self.score.__name__}, seed={self.seed})"


def shuffled(pairs: Pairs, seed: int) -> list[tuple[str, Tensor, Tensor]]:
    """The pairs with the teacher's rows and columns in a random order, which keeps entries and singular values."""

    def reordered(place: int, weight: Tensor) -> Tensor:
        generator, matrix = torch.Generator().manual_seed(hash((seed, place)) % 2**63), as_matrix(weight.detach())
        for dim, size in enumerate(matrix.shape):
            order = torch.randperm(size, generator=generator).to(matrix.device)
            matrix = matrix.index_select(dim, order)
        return matrix.reshape(weight.shape)

    return [(name, student, reordered(place, teacher)) for place, (name, student, teacher) in enumerate(pairs)]


def shrunk(pairs: Pairs) -> list[tuple[str, Tensor, Tensor]]:
    """The pairs with zeros for a teacher: a weight decay along the directions."""
    return [(name, student, torch.zeros_like(teacher)) for name, student, teacher in pairs]


def _generator(seed: int, numbers: Tensor) -> torch.Generator:
    """A function of a seed and of some numbers."""
    key = numbers.flatten()[:4].tolist()
    return torch.Generator().manual_seed(hash((seed, *key)) % 2**63)
