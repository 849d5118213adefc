"""The report of several runs, their curves in common plots."""

from collections.abc import Sequence

import numpy as np

from scripts.lib.report import plots
from scripts.lib.report.facts import RESULT_HEADER, headline, result_row
from scripts.lib.report.load import Run, labels, metric_name
from scripts.lib.report.page import details, grid, note, page, picture, section, table


def report(runs: Sequence[Run]) -> str:
    """The HTML page."""
    names = labels(runs)
    rows = [result_row(run, name) for run, name in zip(runs, names, strict=True)]
    settings = [
        details(name, table(headline(run)) + table(list(run.settings.items()), ("setting", "value")))
        for run, name in zip(runs, names, strict=True)
    ]
    return page(
        f"{len(runs)} runs on {', '.join(dict.fromkeys(run.task for run in runs))}",
        [
            section("Results", table(rows, RESULT_HEADER, "Figures of the runs")),
            section("Curves", grid(_curves(runs, names)) or note("There is no log line with numbers yet.")),
            section("Runs and their settings", *settings),
        ],
    )


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    named = list(zip(runs, names, strict=True))
    drawn = []

    def add(series: plots.Series, ylabel: str, alt: str, caption: str, **how) -> None:
        series = {name: points for name, points in series.items() if len(points[0])}
        if series:
            drawn.append(
                picture(plots.curves(series, ylabel, legend=names, **how), f"{alt}, a line for each run", caption)
            )

    metrics = dict.fromkeys((run.task, key, run.metric_unit) for run in runs for key in run.metric_keys)
    for task, key, unit in metrics:
        label = metric_name(key)
        add(
            {name: run.series(key) for run, name in named if run.task == task},
            f"{label} ({unit})",
            f"{label} on {task} over the optimizer steps",
            f"{label} on {task}, data that the students are not trained on ({unit}), higher is better; circles are "
            "the best values.",
            best=True,
        )
    add(
        {name: run.series("dskd_loss") for run, name in named},
        "DSKD loss",
        "DSKD loss over the optimizer steps",
        "DSKD loss, the mean over the layer pairs before lambda multiplies it (squared weight units); it jumps where "
        "new directions are chosen, and runs that select differently measure different things.",
        zero=True,
    )
    add(
        {name: run.series("effective_directions") for run, name in named},
        "effective directions",
        "Effective number of directions over the optimizer steps",
        "How many directions the weights amount to, 1 / sum of squared weights, mean over the layer pairs.",
        zero=True,
    )
    add(
        {name: _mean_distance(run) for run, name in named if run.choices},
        "relative distance",
        "Distance of the student's weights to the teacher's over the steps",
        "Distance of whole weights, ||W_s - W_t|| / ||W_t|| (no unit), mean over the layer pairs: 0 is the teacher's; "
        "the axis does not start there.",
    )
    return drawn


def _mean_distance(run: Run) -> tuple[np.ndarray, np.ndarray]:
    steps = [choice.step for choice in run.choices]
    return np.array(steps), np.array([np.mean(list(choice.distance.values())) for choice in run.choices])
