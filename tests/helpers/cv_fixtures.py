"""Short runs of the vision pipeline on 128 digits, teachers with random weights, and what a run left behind."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import ROOT
from cv.config import load_config
from cv.export import save_model
from cv.models import build_model
from cv.trainer import CHECKPOINT, train

# 4 steps an epoch
SHORT_RUN = """DISTILLER.TYPE kd DISTILLER.STUDENT resnet8 DISTILLER.TEACHER resnet14 DATASET.SUBSET 128
    SOLVER.BATCH_SIZE 32 SOLVER.EPOCHS 1 SOLVER.LR_DECAY_STAGES [] LOG.INTERVAL 1 LOG.TRACKERS [] LOG.PROGRESS false"""


def save_teacher(folder: Path, name: str = "resnet14", num_classes: int = 10, seed: int = 7) -> Path:
    """A checkpoint of a network with random weights."""
    torch.manual_seed(seed)
    save_model(build_model(name, num_classes), name, folder, accuracy=10.0)
    return folder


def short_config(folder: Path, teacher: Path | None = None, overrides: str = ""):
    """The configuration of a run on digits that writes to `folder`; overrides: `KEY VALUE` pairs as in a shell."""
    words = shlex.split(f"{SHORT_RUN} {overrides}")
    places = ["OUTPUT_DIR", str(folder)] + (["DISTILLER.TEACHER_CKPT", str(teacher)] if teacher else [])
    return load_config(str(ROOT / "configs/demo/base.yaml"), places + words)


def short_run(folder: Path, teacher: Path | None = None, overrides: str = "", **how) -> SimpleNamespace:
    """Train, and read what is in the folder then."""
    train(short_config(folder, teacher, overrides), **how)
    return read_run(folder)


def read_run(folder: Path) -> SimpleNamespace:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        folder=folder,
        result=json.loads((folder / "result.json").read_text()),
        config=json.loads((folder / "config.json").read_text()),
        steps=[line for line in lines if "loss" in line],
        epochs=[line for line in lines if "epoch" in line],
        weights=load_file(folder / "student" / "model.safetensors"),
        checkpoint=torch.load(folder / CHECKPOINT, weights_only=True),
    )


def column(run: SimpleNamespace, name: str) -> list[float]:
    """One quantity in every step."""
    return [line[name] for line in run.steps]


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
