"""What a run tells in words: warnings before it, and the table and the next steps at its end."""

import shlex
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from cv.data import DataSets
from cv.models import is_library

_LARGEST_SIDE = 64  # pixels, of the networks of cv/models
_CIFAR_STEPS = 187_680  # of 240 epochs of CIFAR-100, 64 images a step
_FEW_STEPS = 2_000
_TIMED = 7


def warnings_before(cfg: CfgNode, data: DataSets) -> list[str]:
    """Settings that can run and hardly are what was meant, a line each."""
    solver, side = cfg.SOLVER, max(data.train.images.shape[2:])
    said = []
    if solver.SCHEDULE == "steps" and (late := [stage for stage in solver.LR_DECAY_STAGES if stage >= solver.EPOCHS]):
        said.append(f"LR_DECAY_STAGES {late} lie behind the last epoch, {solver.EPOCHS}")
    names = (cfg.DISTILLER.STUDENT, cfg.DISTILLER.TEACHER, *cfg.DISTILLER.TEACHERS)
    small = [name for name in names if name and not is_library(name)]
    if side > _LARGEST_SIDE and small:
        said.append(
            f"{small[0]} is made for 32x32 pixels and takes 8 to {_LARGEST_SIDE}; images of {side} cost "
            f"{side**2 // 32**2} times the time, and it sees little of them at once; set DATASET.IMAGE_SIZE 32"
        )
    steps = -(-len(data.train) // solver.BATCH_SIZE)
    if cfg.DATASET.NAME == "folder" and not _FEW_STEPS <= steps * solver.EPOCHS <= _CIFAR_STEPS:
        few = steps * solver.EPOCHS < _FEW_STEPS
        goal, of = (_FEW_STEPS, "") if few else (_CIFAR_STEPS, ", as many as in the recipe of CIFAR-100")
        epochs = max(-(-goal // steps) if few else goal // steps, 1)
        stages = sorted({max(epochs * part // 8, 1) for part in (5, 6, 7)})
        said.append(
            f"{solver.EPOCHS} epochs of {len(data.train)} images are {solver.EPOCHS * steps} steps; SOLVER.EPOCHS "
            f"{epochs} SOLVER.LR_DECAY_STAGES {str(stages).replace(' ', '')} would be {epochs * steps}{of}"
        )
    return said


def baseline(data: DataSets) -> tuple[str, float]:
    """Name and top-1 of the guess that needs no image: chance, or the most frequent training class."""
    counts = torch.bincount(data.train.labels, minlength=data.train.num_classes)
    if counts.min() == counts.max() or data.train.num_classes < 2:
        return "chance", 100 / data.train.num_classes
    return "majority", 100 * (data.test.labels == counts.argmax()).double().mean().item()


@torch.inference_mode()
def cost(network: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, float, float]:
    """(parameters, size of the weights in MB, median milliseconds for an image on the device that it is on)."""
    network.eval()
    weight = next(network.parameters())
    image, seconds = torch.zeros(1, *image_shape, device=weight.device), []
    for _ in range(_TIMED):
        start = time.perf_counter()
        network(image).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    size = sum(value.nbytes for value in network.state_dict().values()) / 1e6
    return sum(p.numel() for p in network.parameters()), size, 1000 * statistics.median(seconds[1:])


def summary(rows: list[tuple]) -> str:
    """The table at the end of a run; rows: (what, top-1 or None, cost of the network or None)."""
    lines = [f"{'':<16}{'top-1, %':>10}{'parameters':>14}{'size':>12}{'ms/image':>12}"]
    for what, accuracy, of_network in rows:
        line = f"{what:<16}{'' if accuracy is None else f'{accuracy:.2f}':>10}"
        if of_network is not None:
            parameters, size, milliseconds = of_network
            line += f"{parameters / 1e6:.2f} M".rjust(14) + f"{size:.2f} MB".rjust(12) + f"{milliseconds:.1f}".rjust(12)
        lines.append(line.rstrip())
    return "\n".join(lines)


def next_steps(folder: Path) -> str:
    """What can be done with a finished run."""
    student, quoted = folder / "student", shlex.quote(str(folder))
    return "\n".join(
        [
            f"report:  python scripts/report.py {quoted}",
            f"load:    cv.export.load_model({str(student)!r})",
            f"predict: python cv/predict.py {shlex.quote(str(student))} IMAGE ...",
        ]
    )
