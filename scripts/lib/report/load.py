"""What a run left in its output folder, checked and in one form for both pipelines."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.run.errors import UserError

_TIMINGS = ("_runtime", "_per_second", "_time", "_loss")  # of an evaluation; all else in it is a metric
# settings that say where things are, not what was run
_PLACES = ("OUTPUT_DIR", "DISTILLER.TEACHER_CKPT", "DATASET.ROOT", "output_dir", "data_dir", "overwrite_output_dir")
# settings that runs of different methods may differ in as well, and how labels call them
_TOLD = {
    "DISTILLER.STUDENT": "student",
    "DATASET.SUBSET": "subset",
    "DATASET.HELD_OUT": "held out",
    "SOLVER.EPOCHS": "epochs",
    "SOLVER.BATCH_SIZE": "batch size",
    "SOLVER.LR": "learning rate",
    "num_successor_layers": "layers",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_gpu_train_batch_size": "batch size",
    "learning_rate": "learning rate",
}
_TOLD_OF_DSKD = {
    "DSKD.LAMBDA": "lambda",
    "DSKD.RANK": "rank",
    "DSKD.SVD_STEPS": "SVD steps",
    "lambda_size": "lambda",
    "rank_size": "rank",
    "svd_steps": "SVD steps",
}


class Selected(NamedTuple):
    """Directions of a pair with their weights, which are above 0.

    index: 0 is the largest singular value of the update.
    sigma: the singular values in units of the largest; 0 if unknown.
    """

    index: np.ndarray
    weight: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True)
class Choice:
    """The directions in force after a step, and ||W_s - W_t||_F / ||W_t||_F of every pair."""

    step: int
    weights: dict[str, Selected]
    distance: dict[str, float]

    def effective(self, pair: str) -> float:
        """1 / sum(w^2)."""
        weight = self.weights[pair].weight
        return float(weight.sum() ** 2 / np.square(weight).sum())


@dataclass(frozen=True)
class Run:
    """A run that has finished (`result` is there) or not."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    choices: list[Choice] = field(default_factory=list)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted keys."""
        return dict(_leaves(self.config))

    @property
    def vision(self) -> bool:
        return "DATASET" in self.config

    def setting(self, vision: str, text: str, default: Any = None) -> Any:
        """A setting by its names in the two pipelines."""
        return self.settings.get(vision if self.vision else text, default)

    @property
    def task(self) -> str:
        return str(self.setting("DATASET.NAME", "task_name", "unknown data"))

    @property
    def has_dskd(self) -> bool:
        return bool(self.setting("DSKD.ENABLED", "if_svd"))

    @property
    def method(self) -> str:
        """In words, with the reading and the control arm of DSKD and where the student starts."""
        words = str(self.setting("DISTILLER.TYPE", "method", "unknown method"))
        if self.has_dskd:
            arm = self.setting("DSKD.DIRECTION", "direction", "sensitive")
            kind = [str(self.setting("DSKD.BASIS", "basis", "own")), *([] if arm == "sensitive" else [str(arm)])]
            words += f" + DSKD ({', '.join(kind)})"
        return words + (", from the teacher" if self.settings.get("DISTILLER.START") == "teacher" else "")

    @property
    def seed(self) -> str:
        return str(self.setting("SOLVER.SEED", "seed", "unknown"))

    @property
    def metric_keys(self) -> list[str]:
        """Names in `metrics` of what is evaluated, the one that matters first."""
        if self.vision:
            return ["test_top1"]
        names = dict.fromkeys(key for line in self.metrics for key in line if key.startswith("eval_"))
        names = [name for name in names if not name.endswith(_TIMINGS)]
        primary = str((self.result or {}).get("metric", ""))
        return sorted(names, key=lambda name: not (primary and name.endswith(f"_{primary}")))

    @property
    def metric_unit(self) -> str:
        return "%" if self.vision else "1 is perfect"

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def steps_per_epoch(self) -> float | None:
        ratios = [line["step"] / line["epoch"] for line in self.metrics if _number(line.get("epoch")) and line["epoch"]]
        return ratios[-1] if ratios else None

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the log lines that have a number under a key."""
        found = [(line["step"], line[key]) for line in self.metrics if _number(line.get(key))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)

    def keys(self, prefix: str) -> list[str]:
        """Keys of log lines that start like this, in the order of their first appearance."""
        return list(dict.fromkeys(key for line in self.metrics for key in line if key.startswith(prefix)))


def metric_name(key: str) -> str:
    """A metric's key in log lines without the pipeline's prefix."""
    return key.removeprefix("test_").removeprefix("eval_")


def load_run(folder: Path) -> Run:
    """Read an output folder.

    Raises:
        UserError: no such folder, not a run's, or a file in it that is broken.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}; the output folder of a run of cv/train_svd.py or run_glue_SVD_losslayer.py "
                "has one as soon as training has started"
            )
    result = _object(folder / "result.json") if (folder / "result.json").exists() else None
    directions = folder / "directions.jsonl"
    lines = _lines(directions, running=result is None) if directions.exists() else []
    return Run(
        folder=folder,
        config=_object(folder / "config.json"),
        result=result,
        metrics=[line for _, line in _lines(folder / "metrics.jsonl", running=result is None)],
        choices=[_choice(line, f"{directions}, line {number}") for number, line in lines],
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each of several runs: method, seed, and what else is different in training.

    Where these agree, all settings that differ.
    """
    names = [f"{run.method}, seed {run.seed}" for run in runs]
    if len({run.task for run in runs}) > 1:
        names = [f"{run.task}: {name}" for run, name in zip(runs, names, strict=True)]
    for key, word in (_TOLD | _TOLD_OF_DSKD).items():
        told = [i for i, run in enumerate(runs) if run.has_dskd or key in _TOLD]
        for task in {run.task for run in runs}:
            values = {i: runs[i].settings.get(key) for i in told if runs[i].task == task}
            if len(set(map(repr, values.values()))) > 1:
                for i, value in values.items():
                    names[i] += "" if value is None else f", {word} {value}"
    same = Counter(names)
    for name in [name for name, count in same.items() if count > 1]:
        alike = [i for i, other in enumerate(names) if other == name]
        differing = [
            key
            for key in dict.fromkeys(key for i in alike for key in runs[i].settings)
            if key not in _PLACES and len({repr(runs[i].settings.get(key)) for i in alike}) > 1
        ]
        for i in alike:
            names[i] += "".join(f", {key} {runs[i].settings.get(key)}" for key in differing)
    same = Counter(names)
    return [f"{name} [{run.folder}]" if same[name] > 1 else name for run, name in zip(runs, names, strict=True)]


def _leaves(config: dict[str, Any], prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return value


def _lines(path: Path, running: bool) -> list[tuple[int, dict[str, Any]]]:
    """Numbered lines; the last one of a running job may be half-written, and is left out then."""
    lines = _text(path).split("\n")
    torn = lines.pop()
    if torn and not running:
        lines.append(torn)
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(value, dict) or not _number(value.get("step")):
            raise UserError(f'{path}, line {number}: a JSON object with a number "step" is expected')
        parsed.append((number, value))
    return parsed


def _choice(line: dict[str, Any], where: str) -> Choice:
    try:
        weights = {
            name: Selected(np.array(w["index"], int), np.array(w["weight"], float), np.array(w["sigma"], float))
            for name, w in line["weights"].items()
        }
        distance = {name: float(line["distance"][name]) for name in weights}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        weights = {}
    if not weights or not all(map(_makes_sense, weights.values())):
        raise UserError(
            f'{where}: "weights" with "index", "weight" and "sigma", and a "distance" of every pair are expected'
        )
    return Choice(line["step"], weights, distance)


def _makes_sense(pair: Selected) -> bool:
    index, weight, sigma = pair
    if index.ndim != 1 or not index.size or not index.shape == weight.shape == sigma.shape:
        return False
    return bool(index.min() >= 0 and weight.min() > 0 and sigma.min() >= 0 and sigma.max() <= 1)
