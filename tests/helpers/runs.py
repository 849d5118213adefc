"""A small training run with DSKD, and the same numbers by the float64 oracle."""

import io

import numpy as np
import oracle
import pytest
import torch
from losses import make_loss
from torch import Tensor, nn

SHAPES = {"square": (5, 5), "wide": (4, 7), "tall": (7, 4), "conv": (4, 2, 3, 3)}
TOTAL = 20  # planned steps
BASES = ("own", "update", "curvature")
every_basis = pytest.mark.parametrize("basis", BASES)
SINGULAR_BASES = ("own", "update")  # of singular directions
every_singular_basis = pytest.mark.parametrize("basis", SINGULAR_BASES)


def rank_of(basis: str | None) -> int:
    """3 of the directions, but "curvature" takes all."""
    return 0 if basis == "curvature" else 3


class Run:
    """A small model with one weight per shape, a quadratic task loss, and DSKD beside it."""

    def __init__(self, *, dtype=torch.float64, shapes=SHAPES, layout=torch.contiguous_format, lr=0.02, **settings):
        generator = torch.Generator().manual_seed(11)

        def draw(shape) -> Tensor:
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return value.to(memory_format=layout) if value.ndim == 4 else value

        self.students = {name: nn.Parameter(draw(shape)) for name, shape in shapes.items()}
        self.teachers = {name: draw(shape) for name, shape in shapes.items()}
        self.targets = {name: draw(shape) for name, shape in shapes.items()}
        self.noise = {name: draw((64, *shape)) for name, shape in shapes.items()}
        self.optimizer = torch.optim.SGD(self.students.values(), lr=lr, momentum=0.9)
        pairs = [(name, student, self.teachers[name]) for name, student in self.students.items()]
        self.dskd = make_loss(pairs, **settings)
        self.step = 0

    def task_loss(self) -> Tensor:
        return sum(
            (weight * self.noise[name][self.step] - self.targets[name]).square().sum()
            for name, weight in self.students.items()
        )

    def backward(self, lambda_size: float = 0.1) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.dskd()
        (self.task_loss() + lambda_size * loss).backward()
        return loss.detach()

    def update(self, skip=()) -> None:
        with self.dskd.observe(progress=self.step / TOTAL, skip=skip):
            self.optimizer.step()
        self.step += 1

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self.backward().item())
            self.update()
        return losses

    def gradients(self) -> dict[str, Tensor]:
        return dict(zip(self.students, torch.autograd.grad(self.dskd(), list(self.students.values())), strict=True))

    def copies(self) -> dict[str, np.ndarray]:
        return {name: flat(weight) for name, weight in self.students.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: row.clone() for name, row in self.dskd.direction_weights().items()}


def flat(weight) -> np.ndarray:
    return oracle.as_array(weight).reshape(len(weight), -1)


def oracle_loss(run: Run, w: dict, basis: str, directions: dict | None = None, weights: dict | None = None) -> float:
    """The mean over pairs at `weights` (default: the run's own)."""
    weights = weights or run.copies()
    parts = []
    for name, weight in weights.items():
        teacher = flat(run.teachers[name])
        if basis == "own":
            parts.append(oracle.own_loss(weight, teacher, w[name]))
        else:
            parts.append(oracle.update_loss(weight, teacher, directions[name], w[name]))
    return float(np.mean(parts))


def oracle_gradients(run: Run, w: dict, basis: str, directions: dict | None = None) -> dict[str, Tensor]:
    """Of every pair, divided by the number of pairs, in the shape of the weight."""
    result = {}
    for name, weight in run.copies().items():
        teacher = flat(run.teachers[name])
        if basis == "own":
            value = oracle.own_gradient(weight, teacher, w[name])
        else:
            value = oracle.update_gradient(weight, teacher, directions[name], w[name])
        result[name] = torch.from_numpy(value).view(run.students[name].shape) / len(run.students)
    return result


def first_weights(run: Run, rank: int) -> dict[str, np.ndarray]:
    return {name: oracle.first_weights(min(flat(weight).shape), rank) for name, weight in run.students.items()}


def update_with_oracle(run: Run, rank: int, skip=()) -> tuple[dict, dict]:
    """One optimizer step; the weights that the oracle gives for it, and dW, of all pairs but the skipped."""
    before, grads = run.copies(), {name: flat(weight.grad) for name, weight in run.students.items()}
    alpha = run.step / TOTAL
    run.update(skip)
    updates = {name: after - before[name] for name, after in run.copies().items() if name not in skip}
    return {
        name: oracle.weights(oracle.scores(dW, grads[name], alpha)[2], rank) for name, dW in updates.items()
    }, updates


def overflow(run: Run) -> None:
    """What a gradient scaler does: the gradient is infinite and the optimizer step is left out."""
    run.backward()
    run.students["tall"].grad[0, 0] = float("inf")
    with run.dskd.observe(progress=run.step / TOTAL):
        pass
    run.step += 1


def dumped(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
