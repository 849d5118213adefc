"""Every shipped YAML of the vision pipeline: its text, its networks, and one training step as it configures it."""

import math
import re
from pathlib import Path

import pytest
import torch
from cv_fixtures import read_run, save_teacher

import cv.trainer
from common import ROOT
from cv.config import defaults, leaves, load_config
from cv.data import DataSets, ImageSet
from cv.data.augment import Augment
from cv.export import load_model
from cv.methods import METHODS
from cv.models import build_model
from cv.trainer import output_folder

CONFIGS = ROOT / "configs"
# the tables' files belong to scripts/reproduce.py
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if "tables" not in path.relative_to(CONFIGS).parts)
RUNS = [path for path in FILES if path.name != "base.yaml"]


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)
every_run = pytest.mark.parametrize("path", RUNS, ids=name_of)


def head(path: Path) -> list[str]:
    """The comment lines at the top of a file."""
    lines = path.read_text().splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Gives the folder of a teacher with random weights; each is made once."""
    made = {}

    def folder(name: str, classes: int) -> Path:
        if (name, classes) not in made:
            made[name, classes] = save_teacher(tmp_path_factory.mktemp(name.replace("/", "_")), name, classes)
        return made[name, classes]

    return folder


def two_images(classes: int) -> DataSets:
    """A data set of two random 32x32 images to train on and two to test on."""
    generator = torch.Generator().manual_seed(3)

    def images() -> ImageSet:
        pixels = torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return ImageSet(pixels, torch.tensor([1, classes - 1]), classes)

    return DataSets(images(), images(), None, (0.5,) * 3, (0.25,) * 3, Augment(padding=4, flip=True))


@every_file
def test_one_training_step(path, teachers, tmp_path, monkeypatch):
    cfg = load_config(str(path))
    classes = 10 if cfg.DATASET.NAME == "digits" else 100
    overrides = ["OUTPUT_DIR", str(tmp_path), "SOLVER.EPOCHS", "1", "LOG.TRACKERS", "[]", "LOG.PROGRESS", "false"]
    overrides += ["DISTILLER.STUDENT_CKPT", ""]  # which would be downloaded
    if METHODS[cfg.DISTILLER.TYPE].needs_teacher or cfg.DSKD.ENABLED:
        overrides += ["DISTILLER.TEACHER_CKPT", str(teachers(cfg.DISTILLER.TEACHER, classes))]
    monkeypatch.setattr(cv.trainer, "load_dataset", lambda *_, **__: two_images(classes))
    cv.trainer.train(load_config(str(path), overrides))
    run = read_run(tmp_path)
    [step] = run.steps
    losses = {name: value for name, value in step.items() if "loss" in name}
    assert run.result["steps"] == 1
    assert all(math.isfinite(value) for value in losses.values())
    assert ("dskd_loss" in losses) == cfg.DSKD.ENABLED
    assert all(value.isfinite().all() for value in run.weights.values())
    torch.manual_seed(cfg.SOLVER.SEED)
    at_start = build_model(cfg.DISTILLER.STUDENT, classes).state_dict()
    moved = [
        name for name in at_start if name.endswith("weight") and not torch.equal(run.weights[name], at_start[name])
    ]
    own = load_model(tmp_path / "student")[0]
    assert any(name.removeprefix("net.").startswith("conv1.") for name in moved)  # net: of a library
    assert any(own.get_submodule(name.removesuffix(".weight")) is own.classifier for name in moved)
    assert load_model(tmp_path / "student")[1]["architecture"] == cfg.DISTILLER.STUDENT


@every_file
def test_every_key_has_a_comment_with_its_type(path):
    types = {key.split(".")[-1]: type(value).__name__ for key, value in leaves(defaults()).items()}
    keys = [line for line in path.read_text().splitlines() if re.match(r" *[A-Z]", line)]
    for line in keys:
        if line.startswith("BASE: ") or re.fullmatch(r"[A-Z]+:", line):  # a block's keys follow
            continue
        found = re.fullmatch(r" *([A-Z_0-9]+): .+  # \S.* \((\w+)[^()]*\)", line)
        assert found, line
        assert found[2] == types[found[1]], line


@every_run
def test_the_head_has_the_command_that_runs_the_file(path):
    command = f"python cv/train_svd.py --cfg {path.relative_to(ROOT)}"
    assert [line for line in head(path)[1:] if re.fullmatch(rf"# +{re.escape(command)}( +\(.*\))?", line)]


@every_run
def test_the_head_names_the_networks_that_the_file_trains(path):
    cfg = load_config(str(path))
    text = " ".join(head(path)).lower()
    assert re.search(rf"\b{cfg.DISTILLER.STUDENT}\b", text)
    if METHODS[cfg.DISTILLER.TYPE].needs_teacher:
        assert re.search(rf"\b{cfg.DISTILLER.TEACHER}\b", text)
    assert ("dskd" in text) == cfg.DSKD.ENABLED


def distils(path: Path) -> bool:
    return METHODS[load_config(str(path)).DISTILLER.TYPE].needs_teacher


@pytest.mark.parametrize("path", [path for path in RUNS if distils(path)], ids=name_of)
def test_the_teacher_that_comes_first_is_left_where_it_is_looked_for(path):
    cfg = load_config(str(path))
    [named] = re.findall(r"(configs/\S*teacher\S*\.yaml)", " ".join(head(path)))
    first = load_config(named)
    assert (first.DISTILLER.TYPE, first.DISTILLER.STUDENT) == ("vanilla", cfg.DISTILLER.TEACHER)
    fewer = {"SUBSET": None, "SUBSET_SEED": None}  # some students see fewer images
    assert {**first.DATASET, **fewer} == {**cfg.DATASET, **fewer}
    assert output_folder(first).resolve() == (
        ROOT / "outputs" / cfg.DATASET.NAME / f"teacher_{cfg.DISTILLER.TEACHER}" / f"seed{first.SOLVER.SEED}"
    )


@pytest.mark.parametrize("path", [p for p in RUNS if "cifar100" in p.parts], ids=name_of)
def test_the_recipe_of_the_literature(path):
    cfg = load_config(str(path))
    solver = cfg.SOLVER
    slow = cfg.DISTILLER.TYPE == "expkd" and cfg.DISTILLER.STUDENT != "resnet20"
    assert (240, 64, 0.01 if slow else 0.05) == (solver.EPOCHS, solver.BATCH_SIZE, solver.LR)
    assert (solver.LR_DECAY_STAGES, solver.LR_DECAY_RATE) == ([150, 180, 210], 0.1)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 5e-4)
    assert cfg.DATASET.AUGMENT


@pytest.mark.parametrize("pair", [path.stem for path in RUNS if "tuned" in path.parts])
def test_the_tuned_recipe_changes_the_start_and_the_basis_alone(pair):
    paper = leaves(load_config(f"configs/cifar100/svd/dkd/{pair}.yaml"))
    tuned = leaves(load_config(f"configs/cifar100/tuned/dkd/{pair}.yaml"))
    assert {key: value for key, value in tuned.items() if value != paper[key]} == {
        "DISTILLER.START": "teacher",
        "DSKD.BASIS": "update",
    }


@pytest.mark.parametrize(("method", "pair"), [path.with_suffix("").parts[-2:] for path in RUNS if "svd" in path.parts])
def test_dskd_joins_the_method_and_changes_nothing_else(method, pair):
    alone = leaves(load_config(f"configs/cifar100/{method}/{pair}.yaml"))
    joined = leaves(load_config(f"configs/cifar100/svd/{method}/{pair}.yaml"))
    assert {key for key in alone if alone[key] != joined[key]} == {"DSKD.ENABLED"}
    assert joined["DSKD.LAMBDA"] == 0.2
    assert (joined["DSKD.RANK"], joined["DSKD.SVD_STEPS"], joined["DSKD.BASIS"]) == (0, 100, "own")
    assert joined["DSKD.GRAD_STEPS"] <= 5
