"""`runs.csv`: one row per finished run, from its `result.json`; no path of this machine in it."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from common.errors import UserError
from common.files import write_text
from scripts.reproduce_lib.plan import Run, portable

KEY = ["task", "cell", "seed", "command"]


def highest_seed(output: Path) -> int:
    """The highest seed that any folder in `output` was started with; 0 if there is none."""
    seeds = [re.search(r"-seed(\d+)-[0-9a-f]+$", folder.parent.name) for folder in output.glob("*/result.json")]
    return max((int(match[1]) for match in seeds if match), default=0)


def read_rows(path: Path) -> pd.DataFrame:
    """Rows written earlier; empty if there is no such file.

    Raises:
        UserError: the file is no `runs.csv`.
    """
    if not path.exists():
        return pd.DataFrame(columns=KEY)
    try:
        rows = pd.read_csv(path, dtype=str)  # texts, so that they are written again as they were
    except ValueError as error:
        raise UserError(f"{path.name} cannot be read: {error}") from error
    missing = [column for column in (*KEY, "last", "best") if column not in rows.columns]
    if missing:
        raise UserError(f"{path.name} has no column {missing[0]!r}")
    return rows.assign(task=rows["task"].fillna(""), seed=rows["seed"].astype(int))


def key_of(run: Run) -> tuple[str, str, int, str]:
    return run.task, run.cell, run.seed, run.portable


def keys(rows: pd.DataFrame) -> set[tuple]:
    """The identities of rows, as `key_of` gives them for runs."""
    return set(rows[KEY].itertuples(index=False, name=None))


def collect(runs: Iterable[Run], values: Mapping[str, str], kept: pd.DataFrame) -> pd.DataFrame:
    """Rows of all finished runs, and of the runs that are not finished here but have a row in `kept`; in plan order."""
    runs = list(runs)
    fresh = {key_of(run): _row(run, values) for run in runs if run.finished}
    old = {tuple(row[name] for name in KEY): row for row in kept.to_dict("records")}
    rows = [fresh.get(key_of(run)) or old.get(key_of(run)) for run in runs]
    # objects: empty fields would turn whole numbers into floats
    table = pd.DataFrame([row for row in rows if row], columns=None if any(rows) else KEY, dtype=object)
    last = [name for name in ("command", "placeholders") if name in table.columns]
    return table[[name for name in table.columns if name not in last] + last]


def write_rows(rows: pd.DataFrame, path: Path) -> None:
    write_text(path, rows.to_csv(index=False, lineterminator="\n"))


def _row(run: Run, values: Mapping[str, str]) -> dict[str, Any]:
    path = run.folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}; remove the folder to run this cell again") from error
    missing = [name for name in ("metric", "last", "best") if name not in result]
    if missing:
        raise UserError(f"{path} has no {missing[0]!r}, which tables are made of")
    row: dict[str, Any] = {"task": run.task, "cell": run.cell, "seed": run.seed}
    fields = {name: value for name, value in result.items() if name not in ("command", "seed", "versions")}
    fields["dataset"] = fields.pop("task", None)
    for name, value in fields.items():
        if isinstance(value, dict):
            row |= {f"{name}.{key}": _plain(item) for key, item in value.items() if _is_scalar(item)}
        elif _is_scalar(value):
            row[name] = _plain(value)
    row["versions"] = _pairs(result.get("versions", {}))
    row["command"] = run.portable
    row["placeholders"] = _pairs({name: portable(value) for name, value in values.items()})
    return row


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _plain(value: Any) -> Any:
    return portable(value) if isinstance(value, str) else value


def _pairs(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
