"""Differences of one table or of many in a figure, and in the pages that show it, from the rows of runs.csv."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from common import ROOT
from common.run.errors import UserError
from common.run.figures import drawn, plain
from common.run.files import write_text
from common.run.reading import read_text, read_yaml
from scripts.lib.tables.collect import read_rows
from scripts.lib.tables.render import interval_text, markdown_table
from scripts.lib.tables.summary import holm, paired_difference, summarize
from scripts.lib.tables.table import Part, Table, checked, find_table, load_table

RESULTS = ROOT / "results"
TABLES_PAGE = ROOT / "docs" / "tables.md"
LIMIT = 5.7  # points
STYLES = (("C0", "o"), ("C9", "s"), ("C1", "D"), ("C3", "^"), ("0.4", "v"))  # of the groups, in turn


class Row(Part):
    """One difference: of a cell to another one, which may stand in another table as `table/cell`.

    With the task "*" the tasks are what is repeated, such as teachers: pairs are the means of each task over the seeds
    that both cells have there, so that the interval covers the choice of the task.
    """

    label: str
    setting: str = ""  # of the front table, whose rows are those that have one
    table: str
    task: str = ""
    cell: str
    versus: str


class Group(Part):
    """Rows under one heading; with `family` their p values are also corrected for their number."""

    title: str
    family: bool = False
    rows: Annotated[list[Row], Field(min_length=1)]


class Front(Part):
    """results/front.yaml: what the figure shows, other differences that pages name, the tables in their groups."""

    groups: list[Group]
    others: list[Row]
    tables: dict[str, dict[str, str]]


class Line(NamedTuple):
    """A row with its figures. `steps` are optimizer steps of the two cells."""

    group: str
    label: str
    setting: str
    table: str
    pairs: int
    difference: float
    low: float
    high: float
    p: float
    steps: str = ""
    holm: float = float("nan")


def read_front() -> Front:
    """The file results/front.yaml; a UserError says what is wrong in it."""
    return checked(Front, read_yaml(RESULTS / "front.yaml"), "front.yaml")


def front_lines(front: Front) -> list[Line]:
    """All differences of the figure, group by group."""
    lines = []
    for group in front.groups:
        found = [compare(row, group.title) for row in group.rows]
        corrected = holm(pd.Series([line.p for line in found])) if group.family else [np.nan] * len(found)
        lines += [line._replace(holm=p) for line, p in zip(found, corrected, strict=True)]
    return lines


def compare(row: Row, group: str = "") -> Line:
    """The difference of a row, seed by seed; a UserError where a table or a cell has no rows."""
    other_table, _, other_cell = row.versus.rpartition("/")
    ours, our_steps = _last(row.table, row.task, row.cell)
    theirs, their_steps = _last(other_table or row.table, row.task, other_cell)
    if row.task == "*":
        both = ours.index.intersection(theirs.index)
        ours, theirs = (each.loc[both].groupby("task").mean() for each in (ours, theirs))
    steps = f"{our_steps}" if our_steps == their_steps else f"{our_steps} / {their_steps}"
    return Line(group, row.label, row.setting, row.table, steps=steps, **paired_difference(ours, theirs))


def lines_of(name: str, table: Table, rows: pd.DataFrame) -> list[Line]:
    """All differences that a table shows, with an interval or without."""
    lines = []
    for line in summarize(table, rows).dropna(subset="difference").itertuples():
        both = [line.label, table.cells[line.versus].label]
        label = f"{line.task}: " * bool(line.task) + " minus ".join(both[::-1] if line.turned else both)
        figures = (line.pairs, line.difference, line.low, line.high, line.p)
        lines.append(Line(table.title, label, "", name, *figures, holm=line.holm))
    return lines


@cache
def _table(name: str) -> tuple[Table, pd.DataFrame]:
    table = load_table(find_table(name))
    return table, read_rows(RESULTS / table.name / "runs.csv")


def _last(name: str, task: str, cell: str) -> tuple[pd.Series, int]:
    """The last metric of a cell by seed, in the table's display units, and its optimizer steps.

    With the task "*" by task and seed.
    """
    table, rows = _table(name)
    mine = rows[rows["cell"] == cell]
    mine = mine.set_index(["task", "seed"]) if task == "*" else mine[mine["task"] == task].set_index("seed")
    if mine.empty:
        raise UserError(f"results/{name} has no rows of {f'{task} ' * bool(task)}{cell}")
    return mine["last"].astype(float) * table.scale, int(float(mine["steps"].iloc[0]))


def write_forest(names: Sequence[str], folder: Path | None) -> list[Path]:
    """The figure of some tables; without names, that of results/front.yaml with the pages that show it.

    Returns:
        The files that were written.
    """
    folder = folder or (ROOT / "outputs" / "forest" if names else RESULTS)
    changed = {}
    if names:
        for name in names:
            if _table(name)[1].empty:
                raise UserError(f"results/{name} has no rows: nothing of this table has been run")
        lines = [line for name in names for line in lines_of(name, *_table(name))]
    else:
        front = read_front()
        lines = front_lines(front)
        changed = pages(front, lines) if folder == RESULTS else {}
    draw(lines, folder)
    for path, text in changed.items():
        write_text(path, text)
    return [folder / "forest.png", folder / "forest.svg", *changed]


def draw(lines: Sequence[Line], folder: Path, name: str = "forest", unit: str = "points", limit: float = LIMIT) -> None:
    """`NAME.png` and `.svg`: a difference a line, its 95% interval beside it, better to the right.

    limit: where the axis ends; what lies beyond is an arrow.
    """
    places, headings, y = [], [], 0.0
    for group, mine in groupby(lines, lambda line: line.group):
        headings.append((y, group))
        places += [(y + 1 + i, STYLES[(len(headings) - 1) % len(STYLES)]) for i, _ in enumerate(mine)]
        y = places[-1][0] + 1.4
    longest = max((len(line.label) for line in lines), default=0)
    with drawn(folder, name, (max(8.6, 5.2 + longest / 16), 0.6 + 0.2 * y)) as figure:
        axis = figure.subplots()
        for (place, style), line in zip(places, lines, strict=True):
            _draw_line(axis, place, line, limit, *style)
        axis.axvline(0, color="0.3", linewidth=0.8, zorder=0)
        axis.set(xlim=(-limit, limit), ylim=(y - 0.6, -0.8))
        axis.set_xlabel(f"{unit}, mean and 95% CI; better to the right; in brackets: paired seeds, or teachers")
        axis.set_yticks([place for place, _ in places], [f"{plain(line.label)} ({line.pairs})" for line in lines])
        beside = {"xycoords": ("figure fraction", "data"), "xytext": (6, 0), "textcoords": "offset points"}
        for place, group in headings:
            looks = {"va": "center", "weight": "bold", "bbox": {"color": "white", "pad": 0.5}}
            axis.annotate(plain(group), (0, place), **beside, **looks)
        right = axis.secondary_yaxis("right")
        right.set_yticks([place for place, _ in places], [interval_text(line) for line in lines], fontsize=8)
        for each in (axis.yaxis, right.yaxis):
            each.set_tick_params(length=0)
        axis.spines[["left", "top", "right"]].set_visible(False)
        right.spines["right"].set_visible(False)
        axis.grid(axis="x", alpha=0.3)


def draw_table(table: Table, rows: pd.DataFrame, folder: Path) -> list[str]:
    """`table.png` and `.svg`, of the table's differences; the names of the files, none where there is no difference.

    The axis shows nine intervals in ten as a whole: some cells are far from all others.
    """
    lines = lines_of(table.name, table, rows)
    if not lines:
        return []
    ends = [np.abs(end) for line in lines for end in (line.difference, line.low, line.high) if not np.isnan(end)]
    draw(lines, folder, "table", "difference", 1.1 * np.quantile(ends, 0.9) or 1)
    return ["table.png", "table.svg"]


def _draw_line(axis, y: float, line: Line, limit: float, color: str, marker: str) -> None:
    low, high = (line.difference if np.isnan(end) else end for end in (line.low, line.high))
    axis.plot([max(low, -limit), min(high, limit)], [y, y], color=color, linewidth=1.3, solid_capstyle="butt")
    if abs(line.difference) <= limit:
        axis.plot(line.difference, y, marker, color=color, markersize=4.5)
    for beyond, x, arrow in ((low < -limit, -limit, "<"), (high > limit, limit, ">")):
        if beyond:
            axis.plot(x, y, arrow, color=color, markersize=5, clip_on=False)


def pages(front: Front, lines: Sequence[Line]) -> dict[Path, str]:
    """The pages that show the rows, with their blocks made anew: path -> text."""
    groups = {group: _columns(list(mine)) for group, mine in groupby(lines, lambda line: line.group)}
    main = [line._replace(label=line.setting) for line in lines if line.setting]
    blocks = {"main": markdown_table(_columns(main)), "all": _under_titles(groups), "tables": _listed(front, "")}
    return {
        RESULTS / "README.md": _with_blocks(RESULTS / "README.md", blocks),
        TABLES_PAGE: _with_blocks(TABLES_PAGE, {"tables": _listed(front, "../results/", commands=True)}),
    }


def _under_titles(tables: Mapping[str, pd.DataFrame]) -> str:
    return "\n\n".join(f"**{title}**\n\n{markdown_table(columns)}" for title, columns in tables.items())


def _with_blocks(path: Path, blocks: Mapping[str, str]) -> str:
    """A page's text, with what stands between `<!-- name -->` and `<!-- /name -->` replaced by the block of that name.

    Raises:
        UserError: the page has no such place.
    """
    text = read_text(path)
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text, found = re.subn(f"{begin}\n.*?\n{end}", lambda _: f"{begin}\n\n{block}\n\n{end}", text, flags=re.DOTALL)  # noqa: B023
        if not found:
            raise UserError(f"{path} has no lines {begin} and {end}")
    return text


def _listed(front: Front, to_results: str, commands: bool = False) -> str:
    """The tables in their groups, each with the runs so far."""
    groups = {}
    for group, names in front.tables.items():
        lines = []
        for name, status in names.items():
            table, rows = _table(name)
            link = f"[{name}]({to_results}{name}/table.md)" if len(rows) else name
            line = {"table": link, "what it compares": table.title, "runs so far": str(len(rows)), "status": status}
            folders = {key: value for key, value in table.placeholders.items() if str(value).startswith("data/")}
            words = [f"python scripts/reproduce.py {name}", *(f"--set {key}={value}" for key, value in folders.items())]
            command = f"`{' '.join(words)}`"
            lines.append({**line, "command": command} if commands else line)
        groups[group] = pd.DataFrame(lines)
    return _under_titles(groups)


def _columns(lines: Sequence[Line]) -> pd.DataFrame:
    columns = {
        "comparison": [line.label for line in lines],
        "seeds": [str(line.pairs) for line in lines],
        "difference [95% CI]": [interval_text(line) for line in lines],
        "p (Holm)": ["" if np.isnan(line.holm) else f"{line.holm:.3f}" for line in lines],
        "steps": [line.steps for line in lines],
        "table": [f"[{line.table}]({line.table}/table.md)" for line in lines],
    }
    found = pd.DataFrame(columns)
    return found.loc[:, found.ne("").any()]
