"""The last metric of some cells against a setting of theirs, or against what they cost."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from common.run.figures import drawn, plain
from scripts.lib.tables.plot import entitle, metric_name
from scripts.lib.tables.table import Curve, Table


def relative_costs(rows: pd.DataFrame, control: str) -> pd.Series:
    """Time per example in units of the control's, by cell: the median over the seeds that both have.

    Args:
        rows: rows of `runs.csv` of one task; their `throughput` counts examples per second.
        control: the cell that costs 1.
    """
    if "throughput" not in rows or control not in set(rows["cell"]):
        return pd.Series(dtype=float)
    speeds = rows.pivot(index="seed", columns="cell", values="throughput").astype(float)
    return speeds.rdiv(speeds[control], axis=0).median()


class _Panel(NamedTuple):
    """A curve in one task.

    points: a line per cell from left to right, with columns cell, label, x, last_mean and last_std.
    control: the control's mean; NaN without rows of it.
    metric: its name.
    seeds: those that the means are over.
    """

    points: pd.DataFrame
    control: float
    metric: str
    seeds: list[int]


def draw_curves(table: Table, rows: pd.DataFrame, folder: Path) -> list[str]:
    """Write `curve_NAME.png` and `.svg`: a panel per task, mean ± std per cell, the control's mean as a dotted line.

    All of a panel are means over the same seeds, those that its cells and the control have: other seeds, other luck.

    Returns:
        The names of the curves that were drawn; one with fewer than two points is not.
    """
    found = []
    for name, curve in table.curves.items():
        panels = {task: _panel(table, curve, rows[rows["task"] == task]) for task in table.tasks}
        panels = {task: panel for task, panel in panels.items() if len(panel.points) > 1}
        if panels:
            _draw(table, name, panels, folder)
            found.append(name)
    return found


def _panel(table: Table, curve: Curve, rows: pd.DataFrame) -> _Panel:
    """What is drawn of the rows of one task."""
    cells = list(curve.cells)
    rows = rows[rows["cell"].isin([*cells, table.control])]
    last = rows.pivot(index="seed", columns="cell", values="last").astype(float).dropna() * table.scale
    places = relative_costs(rows, table.control) if curve.by_cost else pd.Series(curve.cells)
    columns = {"x": places, "last_mean": last.mean(), "last_std": last.std()}
    points = pd.DataFrame(columns, dtype=float).reindex(cells)
    points = points.assign(cell=cells, label=[plain(table.cells[name].label) for name in cells])
    points = points[np.isfinite(points["x"]) & np.isfinite(points["last_mean"])]
    return _Panel(
        points=points.sort_values("x", kind="stable"),
        control=last.mean().get(table.control, np.nan),
        metric=", ".join(map(str, rows["metric"].dropna().unique())) if "metric" in rows else "",
        seeds=last.index.tolist(),
    )


def _draw(table: Table, name: str, panels: dict[str, _Panel], folder: Path) -> None:
    curve = table.curves[name]
    size = (1.5 + 4.5 * len(panels) + 2 * curve.by_cost, max(4, 1.5 + 0.2 * len(curve.cells)))
    with drawn(folder, f"curve_{name}", size) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (task, panel) in zip(axes, panels.items(), strict=True):
            places = panel.points["x"]
            if 0 < 10 * places.min() < places.max():
                axis.set_xscale("log")
            if curve.by_cost:
                _scatter(axis, curve, panel.points)
            else:
                _line(axis, panel.points)
            axis.axhline(panel.control, color="tab:gray", linestyle=":", zorder=1)
            metric = metric_name(panel.metric, table.scale)
            axis.set(title=task, xlabel=plain(curve.label), ylabel=f"{metric}, mean of {spans(panel.seeds)}")
            axis.grid(alpha=0.3)
        if curve.by_cost:
            legends = [axis.get_legend_handles_labels() for axis in axes]
            entries = {label: entry for legend in legends for entry, label in zip(*legend, strict=True)}
            figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=8)
        what = f"at the end of training, mean ± standard deviation; dotted: {table.cells[table.control].label}"
        what += "; time: the median over seeds" * curve.by_cost
        entitle(figure, table.title, what)


def spans(seeds: list[int]) -> str:
    """`seed 1` or `seeds 1-3, 5`, of rising numbers."""
    unbroken = itertools.groupby(enumerate(seeds), lambda pair: pair[1] - pair[0])
    rows = [[seed for _, seed in row] for _, row in unbroken]
    words = [f"{row[0]}-{row[-1]}" if len(row) > 1 else str(row[0]) for row in rows]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(words)}"


def _line(axis, points: pd.DataFrame) -> None:
    """Values of one setting in a row; where a point stands says which cell it is."""
    spread = points["last_std"].fillna(0)
    axis.errorbar(points["x"], points["last_mean"], yerr=spread, fmt="d-", capsize=3, linewidth=1)
    axis.set_xticks(points["x"], [f"{x:g}" for x in points["x"]])
    axis.minorticks_off()
    axis.margins(x=0.15, y=0.12)


def _scatter(axis, curve: Curve, points: pd.DataFrame) -> None:
    """A colour per cell: many cost about the same, so that there is no room for their names beside them."""
    for point in points.itertuples():
        place = list(curve.cells).index(point.cell)
        spread = 0 if np.isnan(point.last_std) else point.last_std
        style = {"color": f"C{place}", "marker": "dos^v"[place // 10 % 5], "label": point.label}
        axis.errorbar(point.x, point.last_mean, yerr=spread, linestyle="", capsize=3, linewidth=1, **style)
