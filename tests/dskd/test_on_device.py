"""The loss on the GPU where there is one, otherwise on the CPU: float32 there beside float64 on the CPU.

`pytest -m gpu` is this file, and those tests of the programs that a GPU may change; scripts/gpu_check.sh runs it.
"""

import pytest
import torch
from drawn import random
from torch import nn
from torch.testing import assert_close

from dskd import Curvature, DirectionSensitivityLoss, Own, Update
from dskd.matrices import eigh

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((6, 6), (4, 9), (9, 4), (4, 2, 3, 3))
READINGS = [
    *(Own(rank, driver=driver) for rank in (0, 3) for driver in ("gram", "svd", "randomized")),
    *(Own(3, smoothing=0.1), Update(3), Curvature()),
]


def made(device: str, dtype: torch.dtype, reading, **settings) -> DirectionSensitivityLoss:
    def drawn(i: int, shape: tuple[int, ...]) -> torch.Tensor:
        return random(*shape, seed=i).to(device, dtype)

    pairs = [(str(i), nn.Parameter(drawn(i, shape)), drawn(i + 10, shape)) for i, shape in enumerate(SHAPES)]
    return DirectionSensitivityLoss(pairs, reading, **settings)


def trained(loss: DirectionSensitivityLoss, steps: int) -> list[float]:
    """The losses of some steps; the task pulls every weight its own way."""
    optimizer = torch.optim.SGD(loss.students, lr=0.02, momentum=0.9)
    loss.attach(optimizer, total_steps=20)
    values = []
    for step in range(steps):
        noise = [random(*W.shape, seed=100 + step).to(W) for W in loss.students]
        value = loss()
        (0.1 * value + sum((W * each).square().sum() for W, each in zip(loss.students, noise, strict=True))).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.detach())
    return torch.stack(values).tolist()


@pytest.mark.parametrize("reading", READINGS, ids=repr)
def test_a_training_there_is_that_in_float64_on_the_cpu(reading):
    there = trained(made(DEVICE, torch.float32, reading, svd_steps=3), 7)
    assert there == pytest.approx(trained(made("cpu", torch.float64, reading, svd_steps=3), 7), rel=1e-3)


@pytest.mark.parametrize("n", [33, 64, 512])
def test_matrices_of_low_rank_are_decomposed(n):
    factor = random(4, n, n // 4, seed=n).float().to(DEVICE)
    gram = factor @ factor.mT
    lambda_n, V_nn = eigh(gram)
    assert_close((V_nn * lambda_n.unsqueeze(-2)) @ V_nn.mT, gram, rtol=0, atol=1e-4 * gram.abs().max().item())


def test_a_held_step_does_not_wait_for_the_device():
    loss = made(DEVICE, torch.float32, Own(3), svd_steps=100, grad_steps=100)
    optimizer = torch.optim.SGD(loss.students, lr=0.02)
    loss.attach(optimizer, total_steps=100)
    loss()
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            (0.1 * loss()).backward()
            optimizer.step()
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert (loss.steps, loss.expansions) == (3, 1)
