"""`runs.csv`: one row per finished run, from its `result.json`; no path of this machine in it."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from common.run.errors import UserError
from common.run.files import write_text
from common.run.reading import read_json, reading
from scripts.lib.tables.plan import Run, pairs, portable
from scripts.lib.tables.sources import sources

KEY = ["task", "cell", "seed", "command", "placeholders"]


def read_rows(path: Path) -> pd.DataFrame:
    """Rows written earlier; empty if there is no such file.

    Raises:
        UserError: the file is no `runs.csv`.
    """
    if not path.exists():
        return pd.DataFrame(columns=KEY)
    with reading(path, "a table of runs"):
        # texts, so that they are written again as they were; None and NA are names of cells like any other
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    missing = [column for column in (*KEY, "last", "best") if column not in rows.columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}")
    valid = {name: rows[name].isna() | pd.to_numeric(rows[name], errors="coerce").notna() for name in ("last", "best")}
    valid["seed"] = rows["seed"].str.fullmatch(r"\d{1,18}", na=False)
    for name, good in valid.items():
        if not good.all():
            line, kind = good.argmin(), "whole number" if name == "seed" else "number"
            raise UserError(f"{path}, line {line + 2}: {name} is {rows[name][line]!r}; give a {kind}")
    return rows.fillna({"task": "", "placeholders": ""}).astype({"seed": int})


def keys(rows: pd.DataFrame) -> set[tuple]:
    """The identities of rows."""
    return set(rows[KEY].itertuples(index=False, name=None))


def recognised(runs: Iterable[Run], rows: pd.DataFrame, revision: str | None = None) -> dict[Run, dict[str, Any]]:
    """The rows that were made by the same commands with the same values of placeholders, by run.

    That holds for what a run needs, too: its own command has no more than the names of these cells in it.

    revision: only rows that were made by the files of this one.
    """
    written = {_by_name(tuple(row[name] for name in KEY)): row for row in rows.to_dict("records")}
    found: dict[Run, dict[str, Any]] = {}
    for run in runs:  # what a run needs stands before it
        if (key := _by_name(_key(run))) in written and all(need in found for need in run.needs):
            row = written[key]
            if pd.isna(row.get("sources", math.nan)):
                row["sources"] = sources(run.script.path, str(row.get("git_revision")))
            if revision is None or row["sources"] == sources(run.script.path, revision) != "":
                found[run] = row
    return found


def _by_name(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """With the last part of every path among the placeholders: data/cifar100 and /data/cifar100 are one data set."""
    *others, values = key
    return *others, re.sub(r"=\S*/", "=", values)


def collect(runs: Iterable[Run], kept: Mapping[Run, dict[str, Any]]) -> tuple[pd.DataFrame, dict[Run, str]]:
    """Rows of all finished runs, and of the runs that are not finished here but have a row in `kept`; in plan order.

    Returns:
        The rows, and the runs whose `result.json` is of no use, with the reason: one of them spoils no table.
    """
    rows, unusable = [], {}
    for run in runs:
        try:
            rows.append(_row(run) if run.finished else kept.get(run))
        except UserError as error:
            unusable[run] = str(error)
    # objects: empty fields would turn whole numbers into floats
    table = pd.DataFrame([row for row in rows if row], columns=None if any(rows) else KEY, dtype=object)
    last = ["command", "placeholders"]
    return table[[*table.columns.drop(last), *last]], unusable


def write_rows(rows: pd.DataFrame, path: Path) -> None:
    write_text(path, rows.to_csv(index=False, lineterminator="\n"))


def _key(run: Run) -> tuple[str, str, int, str, str]:
    return run.task, run.cell, run.seed, run.portable, run.placeholders


def _row(run: Run) -> dict[str, Any]:
    path = run.folder / "result.json"
    result = read_json(path, finite=False)
    missing = [name for name in ("metric", "last", "best") if name not in result]
    if missing:
        raise UserError(f"{path} has no {missing[0]!r}, which tables are made of")
    for name in ("last", "best"):
        if result.get(name) is not None and not isinstance(result[name], int | float):
            raise UserError(f"{path}: {name} is {result[name]!r}; a number, or null for none, is needed")
    row: dict[str, Any] = {"task": run.task, "cell": run.cell, "seed": run.seed}
    fields = {name: value for name, value in result.items() if name not in (*KEY, "versions")}
    for name, value in {**fields, "dataset": result.get("task")}.items():
        items = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        row |= {key: portable(item) if isinstance(item, str) else item for key, item in items.items() if _single(item)}
    row |= {name: None for name in ("last", "best") if name not in row}  # the columns of runs.csv
    versions = result.get("versions")
    row["versions"] = pairs(versions if isinstance(versions, dict) else {})
    row["sources"] = sources(run.script.path, str(result.get("git_revision")))
    return row | {"command": run.portable, "placeholders": run.placeholders}


def _single(value: Any) -> bool:
    return isinstance(value, str | int | float)
