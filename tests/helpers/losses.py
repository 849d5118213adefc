"""A loss by the settings of the two programs, with defaults that fit small tests."""

import torch
from drawn import random
from torch import nn

from common.svd_loss import build_reading
from dskd import DirectionSensitivityLoss
from dskd.controls import shrunk, shuffled


def make_loss(
    pairs,
    rank: int = 32,
    svd_steps: int = 100,
    *,
    basis: str = "own",
    grad_steps: int | None = None,
    drift: float = 0.0,
    direction: str = "sensitive",
    seed: int | None = None,
    **others,
) -> DirectionSensitivityLoss:
    """`grad_steps` is `svd_steps` by default, `seed` torch's initial one, `rank` has no effect with "curvature"."""
    defaults = {"smoothing": 0.0, "driver": "gram", "alpha": None, "score": "sensitivity", "span": "step"}
    defaults |= {"memory": 0.95, "factors": "full"}
    values = {"rank": rank, "basis": basis, "control": direction, **defaults, **others}
    seed = torch.initial_seed() if seed is None else seed
    pairs = {"shuffled": lambda: shuffled(pairs, seed), "shrink": lambda: shrunk(pairs)}.get(direction, lambda: pairs)()
    reading = build_reading(values, seed)
    return DirectionSensitivityLoss(pairs, reading, svd_steps, grad_steps=grad_steps or svd_steps, drift=drift)


def loss_of(shapes: list[tuple], **settings) -> tuple[DirectionSensitivityLoss, list[nn.Parameter]]:
    students = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    pairs = [(str(i), W, random(*W.shape, seed=100 + i)) for i, W in enumerate(students)]
    return make_loss(pairs, **{"rank": 3} | settings), students


def move(dskd: DirectionSensitivityLoss, students: list[nn.Parameter], share: float) -> None:
    """A step in which every matrix moves by a share of its norm, in a direction that changes with the step."""
    dskd().backward()
    with dskd.observe(progress=0.5), torch.no_grad():
        for i, W in enumerate(students):
            along = random(*W.shape, seed=1000 * dskd.steps + i)
            W += share * W.norm() * along / along.norm()
