"""How many operations a step takes: what a GPU launches one by one must not become more unnoticed.

The numbers of tests/golden/kernels.json are those of the pinned torch. After a change that is meant, write them anew
with `PYTHONPATH=. python tests/dskd/test_kernels.py`, and say why in the commit.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dskd import Curvature, DirectionSensitivityLoss, Own, Spectrum, Update

GOLDEN = Path(__file__).parents[1] / "golden" / "kernels.json"
SHAPES = [(16, 144)] * 3 + [(32, 288)] * 3 + [(64, 64)] * 3
READINGS = {
    "own": Own(0),
    "own, rank 4": Own(4),
    "update": Update(4),
    "spectrum": Spectrum(),
    "curvature": Curvature(),
    "curvature, diagonal": Curvature(factors="diagonal"),
}


class Counted(TorchDispatchMode):
    """Counts the operations that are no views and no bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(alias.alias_info is not None and not alias.alias_info.is_write for alias in function._schema.returns)
        self.count += not view and "empty" not in function.name()
        return function(*args, **(kwargs or {}))


def counts(reading) -> dict[str, int]:
    """Of a held step's loss with its backward pass, of an exact gradient, of an optimizer step that chooses."""
    torch.manual_seed(1)
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    pairs = [(str(i), W, torch.randn(W.shape)) for i, W in enumerate(weights)]
    dskd = DirectionSensitivityLoss(pairs, reading, svd_steps=1, grad_steps=2)
    for W in weights:
        W.grad = torch.randn_like(W)

    def choose() -> None:
        with dskd.observe(0.5), torch.no_grad():
            torch._foreach_add_(weights, [0.01 * W.grad for W in weights])

    def expand() -> None:
        dskd.held = None
        dskd.gradients()

    works = {"held": lambda: dskd().backward(), "exact gradient": expand, "choice": choose}
    choose()
    expand()
    found = {}
    for name, work in works.items():
        with Counted() as counted:
            work()
        found[name] = counted.count
    return found


@pytest.mark.parametrize("name", READINGS)
def test_a_step_takes_no_more_operations_than_before(name):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if golden["torch"] != torch.__version__.split("+")[0]:
        pytest.skip(f"counted with torch {golden['torch']}")
    assert counts(READINGS[name]) == golden["operations"][name]


if __name__ == "__main__":
    found = {name: counts(reading) for name, reading in READINGS.items()}
    text = json.dumps({"torch": torch.__version__.split("+")[0], "operations": found}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
