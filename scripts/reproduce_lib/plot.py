"""The last metric of every cell, seed by seed."""

import textwrap
from pathlib import Path

import pandas as pd

from common.figures import drawn
from scripts.reproduce_lib.table import Cell, Table


def plot(table: Table, summary: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> None:
    """Write `table.png` and `table.svg`: a panel per task, a line per cell, each seed a dot, mean ± std beside them."""
    summary = summary[summary["n"] > 0]
    tasks = list(summary["task"].unique())
    cells = [cell for cell in table.cells if cell.name in set(summary["cell"])]
    with drawn(folder, "table", (3 + 3 * len(tasks), 1.2 + 0.42 * len(cells))) as figure:
        panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for panel, task in zip(panels, tasks, strict=True):
            _panel(panel, table, cells, summary[summary["task"] == task], rows[rows["task"] == task])
            panel.set_title(task)
        panels[0].set_yticks(range(len(cells)), [cell.label for cell in cells])
        panels[0].set_ylim(len(cells) - 0.4, -0.6)
        entitle(figure, table.title, "at the end of training; dots: seeds, diamonds: mean ± standard deviation")


def entitle(figure, title: str, what: str) -> None:
    """Write a table's title, in lines that fit the figure, and what is drawn."""
    characters = int(13 * figure.get_figwidth())  # of 9 points
    figure.suptitle("\n".join([*textwrap.wrap(title, characters), what]), fontsize=9)


def _panel(panel, table: Table, cells: list[Cell], summary: pd.DataFrame, rows: pd.DataFrame) -> None:
    for line in summary.itertuples():
        position = [cell.name for cell in cells].index(line.cell)
        values = rows.loc[rows["cell"] == line.cell, "last"].astype(float) * table.scale
        color = "tab:gray" if line.cell == table.control else "tab:blue"
        panel.plot(values, [position] * len(values), "o", color=color, alpha=0.6, markersize=4, markeredgewidth=0)
        spread = None if pd.isna(line.last_std) else line.last_std
        panel.errorbar(line.last_mean, position + 0.22, xerr=spread, fmt="d", color=color, markersize=5, capsize=3)
        if line.cell == table.control:
            panel.axvline(line.last_mean, color=color, linestyle=":", linewidth=1)
    panel.set_xlabel(summary["metric"].iloc[0])
    panel.grid(axis="x", alpha=0.3)
