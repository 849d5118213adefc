"""The last metric of some cells against a setting of theirs, or against what they cost."""

from pathlib import Path

import numpy as np
import pandas as pd

from common.figures import drawn
from scripts.reproduce_lib.plot import entitle
from scripts.reproduce_lib.table import Curve, Table

_FEW = 8  # points on a line that get their names beside them; the names of more would cover each other


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


def draw_curves(table: Table, summary: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> list[Curve]:
    """Write `curve_NAME.png` and `.svg`: a panel per task, mean ± std per cell, the control's mean as a dotted line.

    Returns:
        The curves that were drawn; one with fewer than two points is not.
    """
    summary = summary[summary["n"] > 0]
    found = []
    for curve in table.curves:
        panels = {task.name: _points(table, curve, summary, rows, task.name) for task in table.tasks}
        panels = {task: points for task, points in panels.items() if len(points) > 1}
        if panels:
            _draw(table, curve, panels, summary, folder)
            found.append(curve)
    return found


def _points(table: Table, curve: Curve, summary: pd.DataFrame, rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """The summary's lines of the curve's cells, from left to right, with their place on the x axis in column x."""
    lines = summary[(summary["task"] == task) & summary["cell"].isin(curve.points)]
    places = relative_costs(rows[rows["task"] == task], table.control) if curve.by_cost else curve.points
    lines = lines.assign(x=lines["cell"].map(places).astype(float))
    return lines[np.isfinite(lines["x"])].sort_values("x", kind="stable")


def _draw(table: Table, curve: Curve, panels: dict[str, pd.DataFrame], summary: pd.DataFrame, folder: Path) -> None:
    size = (1.5 + 4.5 * len(panels) + 2 * curve.by_cost, max(4, 1.5 + 0.2 * len(curve.points)))
    with drawn(folder, f"curve_{curve.name}", size) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (task, points) in zip(axes, panels.items(), strict=True):
            if 0 < 10 * points["x"].min() < points["x"].max():
                axis.set_xscale("log")
            (_scatter if curve.by_cost else _line)(axis, curve, points)
            for mean in summary.loc[(summary["task"] == task) & (summary["cell"] == table.control), "last_mean"]:
                axis.axhline(mean, color="tab:gray", linestyle=":", zorder=1)
            axis.set(title=task, xlabel=curve.label, ylabel=points["metric"].iloc[0])
            axis.grid(alpha=0.3)
        if curve.by_cost:
            legends = [axis.get_legend_handles_labels() for axis in axes]
            entries = {name: entry for legend in legends for entry, name in zip(*legend, strict=True)}
            figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=8)
        what = f"at the end of training, mean ± standard deviation; dotted: {table.cell(table.control).label}"
        entitle(figure, table.title, what)


def _line(axis, curve: Curve, points: pd.DataFrame) -> None:
    """Values of one setting in a row."""
    spread = points["last_std"].fillna(0)
    axis.errorbar(points["x"], points["last_mean"], yerr=spread, fmt="d-", capsize=3, linewidth=1)
    axis.set_xticks(points["x"], [f"{x:g}" for x in points["x"]])
    axis.minorticks_off()
    axis.margins(x=0.15, y=0.12)
    if len(points) <= _FEW:
        for point, top in zip(points.itertuples(), points["last_mean"] + spread, strict=True):
            axis.annotate(point.label, (point.x, top), (0, 5), textcoords="offset points", ha="center", fontsize=7)


def _scatter(axis, curve: Curve, points: pd.DataFrame) -> None:
    """A colour per cell: many cost about the same, so that there is no room for their names beside them."""
    for point in points.itertuples():
        place = list(curve.points).index(point.cell)
        spread = 0 if np.isnan(point.last_std) else point.last_std
        style = {"color": f"C{place}", "marker": "dos^v"[place // 10 % 5], "label": point.label}
        axis.errorbar(point.x, point.last_mean, yerr=spread, linestyle="", capsize=3, linewidth=1, **style)
