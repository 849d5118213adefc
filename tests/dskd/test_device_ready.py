"""What a GPU asks of the loss, shown on a CPU: no tensor of another device, and when the host waits for a value.

On the meta device tensors have no values: an operation that mixes devices fails there as it does on a GPU, and so does
every read of a value.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd import Curvature, DirectionSensitivityLoss, Own, Update
from dskd import loss as loss_file
from dskd.controls import ConstantProgress, Plain, shrunk, shuffled
from dskd.sensitivity import magnitude, tempered

SHAPES = ((6, 6), (4, 90), (90, 4), (4, 2, 3, 3))
READINGS = [
    *(Own(rank, driver=driver) for rank in (0, 3) for driver in ("gram", "svd", "randomized")),
    *(Own(2, smoothing=0.1), Own(2, score=tempered), Own(2, score=magnitude), Own(0, span="interval")),
    *(Update(rank, driver=driver) for rank in (0, 3) for driver in ("gram", "svd", "randomized")),
    *(Curvature(), Plain(Own(2)), Plain(Curvature()), ConstantProgress(Own(2), 0.5)),
]
every_reading = pytest.mark.parametrize("reading", READINGS, ids=repr)


def make(reading, device: str, transform=lambda pairs: pairs, **settings) -> DirectionSensitivityLoss:
    weights = [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
    pairs = transform([(str(i), W, torch.randn(W.shape, device=device)) for i, W in enumerate(weights)])
    return DirectionSensitivityLoss(pairs, reading, **settings)


def step(loss: DirectionSensitivityLoss, optimizer: torch.optim.Optimizer) -> None:
    loss().backward()
    with loss.observe(progress=0.5):
        optimizer.step()


@pytest.fixture
def meta(monkeypatch):
    """Lets a choice of directions go on without its one read, and autocast leave the meta device alone."""
    monkeypatch.setattr(loss_file, "largest_entries", lambda *lists: [[1.0] * len(tensors) for tensors in lists])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@every_reading
@pytest.mark.usefixtures("meta")
def test_no_step_mixes_devices_or_reads_a_value(reading):
    loss = make(reading, "meta", svd_steps=2, grad_steps=2)
    optimizer = torch.optim.SGD(loss.students, lr=0.1)
    for _ in range(5):
        step(loss, optimizer)
    assert (loss.choices, loss.expansions) == (2, 3)


@pytest.mark.parametrize("transform", [lambda pairs: shuffled(pairs, 1), shrunk], ids=["shuffled", "shrunk"])
@pytest.mark.usefixtures("meta")
def test_no_step_mixes_devices_with_other_teachers(transform):
    loss = make(Own(2), "meta", transform, svd_steps=2)
    optimizer = torch.optim.SGD(loss.students, lr=0.1)
    for _ in range(3):
        step(loss, optimizer)
    assert loss.choices == 1


@pytest.fixture
def reads(monkeypatch):
    """Counts what makes the host wait: values that Python reads of tensors."""
    counts = {"reads": 0}

    def counting(original):
        def counted(self, *args, **kwargs):
            counts["reads"] += 1
            return original(self, *args, **kwargs)

        return counted

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    return counts


def reads_per_step(reads: dict[str, int], reading, **settings) -> list[int]:
    loss = make(reading, "cpu", **settings)
    optimizer = torch.optim.SGD(loss.students, lr=0.01, foreach=True)
    counts = []
    for _ in range(8):
        before = reads["reads"]
        step(loss, optimizer)
        counts.append(reads["reads"] - before)
    return counts


@every_reading
def test_the_host_reads_once_a_choice_and_never_else(reading, reads):
    assert reads_per_step(reads, reading, svd_steps=4, grad_steps=2) == [0, 0, 0, 1, 0, 0, 0, 1]


def test_with_drift_the_host_reads_once_where_a_gradient_may_be_let_go(reads):
    assert reads_per_step(reads, Own(2), svd_steps=4, grad_steps=2, drift=1e-9) == [0, 1, 0, 1, 0, 1, 0, 1]


class WithoutFloat64(TorchDispatchMode):
    """Fails where a tensor of float64 comes about, as on Apple's GPUs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), function
        return output


@every_reading
@pytest.mark.parametrize("drift", [0.0, 1e-9, 10.0])
def test_float32_weights_need_no_float64(reading, drift):
    with WithoutFloat64():
        loss = make(reading, "cpu", svd_steps=3, grad_steps=2, drift=drift)
        optimizer = torch.optim.SGD(loss.students, lr=0.1)
        for _ in range(5):
            step(loss, optimizer)
    assert loss.choices


def test_the_mode_notices_float64():
    with pytest.raises(AssertionError, match="_to_copy"), WithoutFloat64():
        torch.ones(2).double()
