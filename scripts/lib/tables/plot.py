"""The last metric of every cell, seed by seed."""

import math
import textwrap
from pathlib import Path

import pandas as pd

from common.run.figures import drawn, plain
from scripts.lib.tables.render import spread_text
from scripts.lib.tables.table import Table


def plot(table: Table, summary: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> None:
    """Write `table.png` and `table.svg`: a panel per task, a line per cell, each seed a dot, mean ± std beside them.

    Mean ± std also stand as numbers at the right. Where some cells are far from all others, the axis shows the others,
    and an arrow at its end stands for each that lies beyond.
    """
    summary = summary[summary["n"] > 0]
    tasks = list(summary["task"].unique())
    cells = [name for name in table.cells if name in set(summary["cell"])]
    with drawn(folder, "table", (3 + 4 * len(tasks), 1.2 + 0.42 * len(cells))) as figure:
        panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for panel, task in zip(panels, tasks, strict=True):
            _panel(panel, table, cells, summary[summary["task"] == task], rows[rows["task"] == task])
            panel.set_title(task)
        panels[0].set_yticks(range(len(cells)), [plain(table.cells[name].label) for name in cells])
        panels[0].set_ylim(len(cells) - 0.4, -0.6)
        title = textwrap.wrap(plain(table.title), int(13 * figure.get_figwidth()))  # characters of 9 points
        what = "at the end of training; dots: seeds, diamonds: mean ± standard deviation"
        figure.suptitle("\n".join([*title, what]), fontsize=9)


def metric_name(metric: str, scale: float) -> str:
    """What stands at an axis of a metric, with its unit or what it was multiplied by."""
    return {"top1": "top-1 (%)"}.get(metric, metric) + (f" x {scale:g}" if scale != 1 else "")


def _panel(panel, table: Table, cells: list[str], summary: pd.DataFrame, rows: pd.DataFrame) -> None:
    figures = [""] * len(cells)
    low, high = _shown(summary)
    for line in summary.itertuples():
        position = cells.index(line.cell)
        values = rows.loc[rows["cell"] == line.cell, "last"].astype(float) * table.scale
        color = "tab:gray" if line.cell == table.control else "tab:blue"
        panel.plot(values, [position] * len(values), "o", color=color, alpha=0.6, markersize=4, markeredgewidth=0)
        spread = None if pd.isna(line.last_std) else line.last_std
        figures[position] = spread_text(line.last_mean, line.last_std)
        panel.errorbar(line.last_mean, position + 0.22, xerr=spread, fmt="d", color=color, markersize=5, capsize=3)
        if line.cell == table.control:
            panel.axvline(line.last_mean, color=color, linestyle=":", linewidth=1)
        for beyond, end, arrow in ((line.last_mean < low, low, "<"), (line.last_mean > high, high, ">")):
            if beyond:
                panel.plot(end, position, arrow, color=color, markersize=6, clip_on=False)
    if low > -math.inf:
        panel.set_xlim(low, high)
    panel.set_xlabel(metric_name(summary["metric"].iloc[0], table.scale))
    panel.grid(axis="x", alpha=0.3)
    right = panel.secondary_yaxis("right")
    right.set_yticks(range(len(cells)), figures, fontsize=8)
    right.tick_params(length=0)


def _shown(summary: pd.DataFrame) -> tuple[float, float]:
    """Ends of the axis; infinite unless some means are so far from the middle half that the rest would look alike."""
    means = summary["last_mean"]
    first, third = means.quantile([0.25, 0.75])
    reach = 3 * max(third - first, summary["last_std"].max(skipna=True) or 0)
    near = means[(means >= first - reach) & (means <= third + reach)]
    if len(near) == len(means) or not reach > 0:
        return -math.inf, math.inf
    margin = 0.1 * (near.max() - near.min()) + 2.5 * summary.loc[near.index, "last_std"].fillna(0).max() + 1e-9
    return near.min() - margin, near.max() + margin
