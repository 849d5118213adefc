"""Differences of many tables in one figure and in the pages that show it, all from the rows in results/*/runs.csv."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import ROOT
from common.run.errors import UserError
from common.run.figures import drawn, plain
from common.run.files import write_text
from common.run.yaml_files import UniqueKeyLoader
from scripts.lib.tables.collect import read_rows
from scripts.lib.tables.render import interval_text, markdown_table
from scripts.lib.tables.summary import holm, paired_difference, summarize
from scripts.lib.tables.table import Table, find_table, load_table

RESULTS = ROOT / "results"
TABLES_PAGE = ROOT / "docs" / "tables.md"
LIMIT = 2.9  # points at which the axis ends; what lies beyond is an arrow
STYLES = (("C0", "o"), ("C9", "s"), ("C1", "D"), ("C3", "^"), ("0.4", "v"))  # of the groups, in turn


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Part):
    """One difference: of a cell to another one, which may stand in another table as `table/cell`."""

    label: str
    setting: str = ""  # of the front table, whose rows are those that have one
    table: str
    task: str = ""
    cell: str
    versus: str


class Group(_Part):
    """Rows under one heading; with `family` their p values are also corrected for their number."""

    title: str
    family: bool = False
    rows: Annotated[list[Row], Field(min_length=1)]


class Front(_Part):
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
    steps: str
    holm: float = float("nan")


def read_front() -> Front:
    """The file results/front.yaml.

    Raises:
        UserError: what is wrong in it.
    """
    path = RESULTS / "front.yaml"
    try:
        return Front.model_validate(yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def front_lines(front: Front) -> list[Line]:
    """All differences of the figure, group by group."""
    lines = []
    for group in front.groups:
        found = [compare(row, group.title) for row in group.rows]
        corrected = holm(pd.Series([line.p for line in found])) if group.family else [np.nan] * len(found)
        lines += [line._replace(holm=p) for line, p in zip(found, corrected, strict=True)]
    return lines


def compare(row: Row, group: str = "") -> Line:
    """The difference of a row, seed by seed.

    Raises:
        UserError: a table or a cell that has no rows.
    """
    other_table, _, other_cell = row.versus.rpartition("/")
    ours, our_steps = _last(row.table, row.task, row.cell)
    theirs, their_steps = _last(other_table or row.table, row.task, other_cell)
    found = paired_difference(ours, theirs)
    steps = f"{our_steps}" if our_steps == their_steps else f"{our_steps} / {their_steps}"
    return Line(group, row.label, row.setting, row.table, steps=steps, **found)


def lines_of(names: Sequence[str]) -> list[Line]:
    """All differences that some tables show, with an interval or without."""
    lines = []
    for name in names:
        table, rows = _table(name)
        for line in summarize(table, rows).dropna(subset="difference").itertuples():
            other = table.cells[line.versus].label
            first, second = (other, line.label) if line.turned else (line.label, other)
            label = f"{line.task}: " * bool(line.task) + f"{first} minus {second}"
            figures = (line.pairs, line.difference, line.low, line.high, line.p)
            lines.append(Line(table.title, label, "", name, *figures, "", line.holm))
    return lines


@cache
def _table(name: str) -> tuple[Table, pd.DataFrame]:
    table = load_table(find_table(name))
    rows = read_rows(RESULTS / table.name / "runs.csv")
    if rows.empty:
        raise UserError(f"results/{table.name} has no rows: nothing of this table has been run")
    return table, rows


def _last(name: str, task: str, cell: str) -> tuple[pd.Series, int]:
    """The last metric of a cell by seed, in the table's display units, and its optimizer steps."""
    table, rows = _table(name)
    mine = rows[(rows["task"] == task) & (rows["cell"] == cell)].set_index("seed")
    if mine.empty:
        raise UserError(f"results/{name} has no rows of {f'{task} ' * bool(task)}{cell}")
    return mine["last"].astype(float) * table.scale, int(float(mine["steps"].iloc[0]))


def write_forest(names: Sequence[str], folder: Path | None) -> list[Path]:
    """The figure of some tables; without names, that of results/front.yaml with the pages that show it.

    Returns:
        The files that were written.
    """
    if names:
        folder = folder or ROOT / "outputs" / "forest"
        draw(lines_of(names), folder)
        return [folder / "forest.png", folder / "forest.svg"]
    front, folder = read_front(), folder or RESULTS
    lines = front_lines(front)
    draw(lines, folder)
    changed = pages(front, lines) if folder == RESULTS else {}
    for path, text in changed.items():
        write_text(path, text)
    return [folder / "forest.png", folder / "forest.svg", *changed]


def draw(lines: Sequence[Line], folder: Path) -> None:
    """`forest.png` and `.svg`: a difference a line, its 95% interval beside it, better to the right."""
    groups = list(dict.fromkeys(line.group for line in lines))
    places, headings, place = [], {}, 0.0
    for group in groups:
        headings[group] = place
        for _ in [line for line in lines if line.group == group]:
            place += 1
            places.append(place)
        place += 1.4
    with drawn(folder, "forest", (8.6, 0.6 + 0.2 * place)) as figure:
        axis = figure.subplots()
        for y, line in zip(places, lines, strict=True):
            _draw_line(axis, y, line, *STYLES[groups.index(line.group) % len(STYLES)])
        axis.axvline(0, color="0.3", linewidth=0.8, zorder=0)
        axis.set(xlim=(-LIMIT, LIMIT), ylim=(place - 0.6, -0.8))
        axis.set_xlabel("points, mean and 95% CI; better to the right; in brackets: seeds")
        axis.set_yticks(places, [f"{plain(line.label)} ({line.pairs})" for line in lines])
        for group, y in headings.items():
            axis.annotate(
                plain(group), (0, y), xycoords=("figure fraction", "data"), xytext=(6, 0), textcoords="offset points",
                va="center", weight="bold", bbox={"color": "white", "pad": 0.5},
            )  # fmt: skip
        right = axis.secondary_yaxis("right")
        right.set_yticks(places, [interval_text(line) for line in lines], fontsize=8)
        for each in (axis.yaxis, right.yaxis):
            each.set_tick_params(length=0)
        axis.spines[["left", "top", "right"]].set_visible(False)
        right.spines["right"].set_visible(False)
        axis.grid(axis="x", alpha=0.3)


def _draw_line(axis, y: float, line: Line, color: str, marker: str) -> None:
    low, high = (line.difference if np.isnan(end) else end for end in (line.low, line.high))
    axis.plot([max(low, -LIMIT), min(high, LIMIT)], [y, y], color=color, linewidth=1.3, solid_capstyle="butt")
    if abs(line.difference) <= LIMIT:
        axis.plot(line.difference, y, marker, color=color, markersize=4.5)
    for beyond, x, arrow in ((low < -LIMIT, -LIMIT, "<"), (high > LIMIT, LIMIT, ">")):
        if beyond:
            axis.plot(x, y, arrow, color=color, markersize=5, clip_on=False)


def pages(front: Front, lines: Sequence[Line]) -> dict[Path, str]:
    """The pages that show the rows, with their blocks made anew: path -> text."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    blocks = {
        "main": markdown_table(_columns([line for line in lines if line.setting], settings=True)),
        "all": "\n\n".join(f"**{group}**\n\n{markdown_table(_columns(mine))}" for group, mine in groups.items()),
        "tables": tables(front, ""),
    }
    return {
        RESULTS / "README.md": with_blocks(RESULTS / "README.md", blocks),
        TABLES_PAGE: with_blocks(TABLES_PAGE, {"tables": tables(front, "../results/", commands=True)}),
    }


def tables(front: Front, to_results: str, commands: bool = False) -> str:
    """The tables in their groups, each with the runs so far."""
    listed = {group: _listed(names, to_results, commands) for group, names in front.tables.items()}
    return "\n\n".join(f"**{group}**\n\n{text}" for group, text in listed.items())


def with_blocks(path: Path, blocks: Mapping[str, str]) -> str:
    """A page's text, with what stands between `<!-- name -->` and `<!-- /name -->` replaced by the block of that name.

    Raises:
        UserError: the page has no such place.
    """
    text = path.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- /{name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise UserError(f"{path} has no lines {begin.strip()} and {end.strip()}")
        text = f"{head}{begin}{block}{end}{tail}"
    return text


def _listed(names: dict[str, str], to_results: str, commands: bool) -> str:
    def lines() -> Iterator[dict[str, str]]:
        for name, status in names.items():
            table, path = load_table(find_table(name)), RESULTS / name
            runs = len(read_rows(path / "runs.csv"))
            data = {"data/cifar100": " --set data=data/cifar100", "data/glue": " --set data=data/glue"}
            link = f"[{name}]({to_results}{name}/table.md)" if runs else name
            line = {"table": link, "what it compares": table.title, "runs so far": str(runs), "status": status}
            if commands:
                line["command"] = f"`python scripts/reproduce.py {name}{data.get(table.placeholders.get('data'), '')}`"
            yield line

    return markdown_table(pd.DataFrame(list(lines())))


def _columns(lines: Sequence[Line], settings: bool = False) -> pd.DataFrame:
    columns = [
        {
            "comparison": line.setting if settings else line.label,
            "seeds": str(line.pairs),
            "difference [95% CI]": interval_text(line),
            "p (Holm)": "" if np.isnan(line.holm) else f"{line.holm:.3f}",
            "steps": line.steps,
            "table": f"[{line.table}]({line.table}/table.md)",
        }
        for line in lines
    ]
    found = pd.DataFrame(columns)
    return found.loc[:, found.ne("").any()]
