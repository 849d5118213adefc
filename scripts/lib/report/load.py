"""What a run left in its output folder, checked and in one form for both pipelines."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.run.confusion import Confusion, read_confusion
from common.run.errors import UserError
from common.run.reading import parse_json, read_json, read_text, reading

_SECTIONS = ("DATASET", "DISTILLER", "SOLVER", "DSKD", "LOG")  # of the vision pipeline's configuration
_LARGEST = 1e30  # of a weight or a distance; squares of it are still finite
_TIMINGS = ("_runtime", "_per_second", "_time", "_loss")  # of an evaluation; all else in it is a metric


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
    confusion: Confusion | None = None

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
        names = [name for name in self.keys("eval_") if not name.endswith(_TIMINGS)]
        primary = str((self.result or {}).get("metric", ""))
        return sorted(names, key=lambda name: not (primary and name.endswith(f"_{primary}")))

    @property
    def metric_unit(self) -> str:
        return "%" if self.vision else "1 is perfect"

    @cached_property
    def pairs(self) -> list[str]:
        """Layer pairs that are in every choice."""
        first = self.choices[0].weights if self.choices else ()
        return [pair for pair in first if all(pair in choice.weights for choice in self.choices)]

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def steps_per_epoch(self) -> float | None:
        steps, epochs = self.series("epoch")
        return steps[-1] / epochs[-1] if len(epochs) and epochs[-1] else None

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the log lines that have a number under a key."""
        found = [(line["step"], line[key]) for line in self.metrics if is_number(line.get(key))]
        steps, values = np.array(found, dtype=float).reshape(-1, 2).T
        return steps, values

    def keys(self, prefix: str) -> list[str]:
        """Keys of log lines that start like this, in the order of their first appearance."""
        return list(dict.fromkeys(key for line in self.metrics for key in line if key.startswith(prefix)))


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
    result, directions = folder / "result.json", folder / "directions.jsonl"
    config = read_json(folder / "config.json")
    for name in _SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(
                f"{folder / 'config.json'}: {name} is {config[name]!r:.60}, a group of settings is expected"
            )
    ended = read_json(result) if result.exists() else None
    metrics = _lines(folder / "metrics.jsonl", running=ended is None)
    chosen = _lines(directions, running=ended is None) if directions.exists() else {}
    choices = [_choice(line, where) for where, line in chosen.items()]
    return Run(folder, config, ended, list(metrics.values()), choices, read_confusion(folder))


def metric_name(key: str) -> str:
    """A metric's key in log lines without the pipeline's prefix."""
    return key.removeprefix("test_").removeprefix("eval_")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(path: Path, running: bool) -> dict[str, dict[str, Any]]:
    """Where a line is -> what it says; the last one of a running job may be half-written, and is left out then."""
    *lines, torn = read_text(path).split("\n")
    parsed = {}
    for number, line in enumerate(lines + [torn] * bool(torn and not running), start=1):
        where = f"{path}, line {number}"
        parsed[where] = parse_json(line, where)
        if not is_number(parsed[where].get("step")):
            raise UserError(f'{where}: a JSON object with a number "step" is expected')
    return parsed


def _choice(line: dict[str, Any], where: str) -> Choice:
    with reading(where, '"weights" with "index", "weight" and "sigma", and a "distance" of every pair'):
        weights = {name: _selected(pair) for name, pair in line["weights"].items()}
        distance = {name: float(line["distance"][name]) for name in weights}
        if not (weights and all(0 <= value <= _LARGEST for value in distance.values())):
            raise ValueError("there is no pair, or no distance")
        return Choice(line["step"], weights, distance)


def _selected(pair: dict[str, Any]) -> Selected:
    index, weight, sigma = (np.array(pair[key], int if key == "index" else float) for key in Selected._fields)
    alike = index.ndim == 1 and index.size and index.shape == weight.shape == sigma.shape
    if not (
        alike
        and index.min() >= 0
        and 0 < weight.min() <= weight.max() <= _LARGEST
        and sigma.min() >= 0
        and sigma.max() <= 1
    ):
        raise ValueError("these are no directions")
    return Selected(index, weight, sigma)
