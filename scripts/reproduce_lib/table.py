"""A table file: which cells there are, and the arguments of each. `configs/tables/glue_rte.yaml` explains the keys."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "tables"
RESERVED = ("task", "cell", "seed", "output")  # placeholders that every run fills in by itself

_TABLE_KEYS = ("table", "title", "description", "script", "control", "seeds", "scale", "placeholders", "base", "tasks")
_TABLE_KEYS += ("cells", "smoke")
_TASK_KEYS = ("args", "values")
_CELL_KEYS = ("label", "needs", "args", "published", "smoke")
_PUBLISHED_KEYS = ("value", "source")

Arguments = Mapping[str, Any]  # argument -> its text, or a list of texts


@dataclass(frozen=True)
class Cell:
    """One row of a table: a command, run once per task and seed.

    Attributes:
        name: its key in the file.
        label: how the rendered tables call it.
        needs: names of the cells (of the same task and seed) that must be finished first.
        args: arguments on top of the table's and the task's.
        smoke: arguments on top of the table's smoke overrides.
        published: task name ("" in a table without tasks) -> figure published elsewhere, in the table's display units.
        source: where that was published.
    """

    name: str
    label: str
    needs: tuple[str, ...]
    args: Arguments
    smoke: Arguments
    published: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Task:
    """One section of a table: arguments that all cells share there, and values for placeholders."""

    name: str
    args: Arguments
    values: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table file, checked. `tasks` has one nameless task where the file has none."""

    name: str
    path: Path
    title: str
    description: str
    script: str
    control: str
    seeds: int
    scale: float
    placeholders: Mapping[str, str]
    base: Arguments
    tasks: tuple[Task, ...]
    cells: tuple[Cell, ...]
    smoke: Arguments

    def cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)


def find_table(name: str) -> Path:
    """The file of a table: one of `configs/tables` by name, or any YAML file by path.

    Raises:
        UserError: there is neither.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"there is no table file {name}")
        return Path(name)
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"unknown table {name!r}; {suggest(name, (p.stem for p in sorted(FOLDER.glob('*.yaml'))))}")
    return path


def load_table(path: Path) -> Table:
    """Read and check a table file.

    Raises:
        UserError: what is wrong, with the file and the key.
    """
    where = path.name
    content = _read(path)
    _check_keys(content, _TABLE_KEYS, where)
    name = _text(content, "table", where)
    _check_name(name, f"{where}: table")
    placeholders = _texts(content.get("placeholders", {}), f"{where}: placeholders")
    tasks = tuple(
        _task(task_name, value, where, placeholders) for task_name, value in _mapping(content, "tasks", where).items()
    )
    tasks = tasks or (Task("", {}, {}),)
    cells = tuple(
        _cell(cell_name, value, where, [t.name for t in tasks])
        for cell_name, value in _mapping(content, "cells", where).items()
    )
    if not cells:
        raise UserError(f"{where}: cells is empty; a table needs at least one")
    names = [cell.name for cell in cells]
    for key in placeholders:
        _check_name(key, f"{where}: placeholders")
        if key in (*RESERVED, *names):
            raise UserError(f"{where}: placeholders: {key!r} is already the name of a cell or a built-in placeholder")
    control = _text(content, "control", where)
    if control not in names:
        raise UserError(f"{where}: control: unknown cell {control!r}; {suggest(control, names)}")
    _check_needs(cells, where)
    return Table(
        name=name,
        path=path,
        title=_text(content, "title", where),
        description=content.get("description", ""),
        script=_text(content, "script", where),
        control=control,
        seeds=int(_number(content.get("seeds", "5"), f"{where}: seeds", whole=True)),
        scale=_number(content.get("scale", "1"), f"{where}: scale"),
        placeholders=placeholders,
        base=_arguments(content, "base", where),
        tasks=tasks,
        cells=cells,
        smoke=_arguments(content, "smoke", where),
    )


def suggest(wrong: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'? valid: x, y`, to end an error message with."""
    valid = list(valid)
    near = difflib.get_close_matches(wrong, valid, n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid: {', '.join(valid) or 'none'}"


class _TextLoader(yaml.BaseLoader):
    """All scalars stay the text that was written (5e-5 is no float in YAML 1.1); a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        own = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if own.count(key.value) > 1 and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
        self.flatten_mapping(node)
        return dict(super().construct_mapping(node, deep))


def _read(path: Path) -> dict:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _TextLoader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path.name}, line {line}: {error.problem}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: a table file is a mapping with the keys {', '.join(_TABLE_KEYS)}")
    return content
