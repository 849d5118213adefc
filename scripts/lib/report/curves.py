"""The curves of one run, or of several in common plots."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.lib.report.load import Run, metric_name
from scripts.lib.report.plots import DISTANCE_SPAN, Series, curves

_JUMPING = {"dskd_loss": "DSKD loss", "effective_directions": "Effective number of directions"}  # at new directions
_NAMES = _JUMPING | {
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "examples_per_second": "Examples per second",
    "replacing_probability": "Replacing probability",
}


def of_one(run: Run) -> list[dict[str, Any]]:
    """Loss parts, metrics, and whatever else the run has logged."""
    parts = [key for key in ("task_loss", *run.keys("loss_")) if len(run.series(key)[0])] or ["loss"]
    scores = {metric_name(key): run.series(key) for key in run.metric_keys}
    how = _metric(run, "metric" if len(scores) > 1 else "".join(scores)) | {"steps_per_epoch": run.steps_per_epoch}
    dotted = {"choices": [choice.step for choice in run.choices]}
    return _drawn(
        ("loss", "Task loss", {key.removeprefix("loss_"): run.series(key) for key in parts}, {}),
        ("metric", "Evaluation metric", scores, how),
        *((key, name, {name: run.series(key)}, dotted if key in _JUMPING else {}) for key, name in _NAMES.items()),
    )


def of_several(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each run in every plot, of one colour throughout; runs of other tasks have other metrics."""
    named = list(zip(names, runs, strict=True))
    metrics = []
    for task, key in dict.fromkeys((run.task, key) for run in runs for key in run.metric_keys):
        alike = {name: run for name, run in named if run.task == task}
        how = _metric(next(iter(alike.values())), metric_name(key))
        series = {name: run.series(key) for name, run in alike.items()}
        metrics.append(("metric", f"{metric_name(key)} on {task}", series, how))
    return _drawn(
        *metrics,
        *((key, word, {name: run.series(key) for name, run in named}, {}) for key, word in _NAMES.items()),
        ("distance", "Relative distance", {name: _mean_distance(run) for name, run in named}, {"span": DISTANCE_SPAN}),
        legend=names,
    )


def _drawn(*plots: tuple[str, str, Series, dict], legend: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Of (key of the caption, name, lines, how to draw them) those with a point; "lonely": with a line of only one."""
    drawn = []
    for key, name, series, how in plots:
        series = {label: points for label, points in series.items() if len(points[0])}
        lonely = any(len(steps) == 1 for steps, _ in series.values())
        if series:
            svg = curves(series, **{"ylabel": name, "legend": legend, **how})
            drawn.append({"svg": svg, "name": name, "key": key, "lonely": lonely})
    return drawn


def _metric(run: Run, name: str) -> dict:
    return {"ylabel": f"{name} ({run.metric_unit})", "best": True, "span": 1 if run.vision else 0.01}


def _mean_distance(run: Run) -> tuple[np.ndarray, np.ndarray]:
    steps = [choice.step for choice in run.choices]
    return np.array(steps), np.array([np.mean(list(choice.distance.values())) for choice in run.choices])
