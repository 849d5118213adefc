"""The curves of one run, or of several in common plots."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scripts.lib.report.load import Run, metric_name
from scripts.lib.report.plots import DISTANCE_SPAN, Series, curves

# key in log lines -> name; those with new directions in the middle get dotted lines there
_JUMPING = {"dskd_loss": "DSKD loss", "effective_directions": "Effective number of directions"}
_OTHERS = {
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "examples_per_second": "Examples per second",
    "replacing_probability": "Replacing probability",
}


class Plot(NamedTuple):
    """An SVG; `key` leads to its caption in the template, `lonely` tells of a line of one point."""

    svg: str
    name: str
    key: str
    lonely: bool


def of_one(run: Run) -> list[Plot]:
    """Loss parts, metrics, and whatever else the run has logged."""
    parts = [key for key in ("task_loss", *run.keys("loss_")) if len(run.series(key)[0])] or ["loss"]
    metric = metric_name(run.metric_keys[0]) if len(run.metric_keys) == 1 else "metric"
    scored = {"best": True, "span": _span(run), "steps_per_epoch": run.steps_per_epoch}
    steps = [choice.step for choice in run.choices]
    return _drawn(
        _plot("loss", "Task loss", {key.removeprefix("loss_"): run.series(key) for key in parts}),
        _plot(
            "metric",
            "Evaluation metric",
            {metric_name(key): run.series(key) for key in run.metric_keys},
            f"{metric} ({run.metric_unit})",
            **scored,
        ),
        *(_plot(key, name, {name: run.series(key)}, choices=steps) for key, name in _JUMPING.items()),
        *(_plot(key, name, {name: run.series(key)}) for key, name in _OTHERS.items()),
    )


def of_several(runs: Sequence[Run], names: Sequence[str]) -> list[Plot]:
    """A line for each run in every plot, of one colour throughout; runs of other tasks have other metrics."""
    named = dict(zip(names, runs, strict=True))
    scores = []
    for task, key in dict.fromkeys((run.task, key) for run in runs for key in run.metric_keys):
        alike = {name: run for name, run in named.items() if run.task == task}
        first, metric = next(iter(alike.values())), metric_name(key)
        series = {name: run.series(key) for name, run in alike.items()}
        how = {"legend": names, "best": True, "span": _span(first)}
        scores.append(_plot("metric", f"{metric} on {task}", series, f"{metric} ({first.metric_unit})", **how))
    distances = {name: _mean_distance(run) for name, run in named.items()}
    return _drawn(
        *scores,
        *(
            _plot(key, word, {name: run.series(key) for name, run in named.items()}, legend=names)
            for key, word in (_JUMPING | _OTHERS).items()
        ),
        _plot("distance", "Relative distance", distances, legend=names, span=DISTANCE_SPAN),
    )


def _plot(key: str, name: str, series: Series, ylabel: str = "", **how) -> Plot | None:
    series = {label: points for label, points in series.items() if len(points[0])}
    lonely = any(len(steps) == 1 for steps, _ in series.values())
    return Plot(curves(series, ylabel or name, **how), name, key, lonely) if series else None


def _drawn(*plots: Plot | None) -> list[Plot]:
    return [plot for plot in plots if plot]


def _span(run: Run) -> float:
    return 1 if run.vision else 0.01


def _mean_distance(run: Run) -> tuple[np.ndarray, np.ndarray]:
    steps = [choice.step for choice in run.choices]
    return np.array(steps), np.array([np.mean(list(choice.distance.values())) for choice in run.choices])
