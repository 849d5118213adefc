"""A table file: its cells and the arguments of each. `configs/tables/glue_short.yaml` explains the keys."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

import yaml

from common import ROOT
from common.run.errors import UserError
from common.run.yaml_files import UniqueKeyLoader

FOLDER = ROOT / "configs" / "tables"
RESERVED = ("task", "cell", "seed", "output")  # placeholders that every run fills in by itself

_TABLE_KEYS = ("table", "title", "description", "script", "control", "first_seed", "seeds", "scale", "placeholders")
_TABLE_KEYS += ("base", "tasks", "cells", "curves", "smoke")
_TASK_KEYS = ("args", "values")
_CELL_KEYS = ("label", "needs", "versus", "shared", "args", "published", "smoke")
_PUBLISHED_KEYS = ("value", "source")
_CURVE_KEYS = ("x", "label", "cells")
_LONGEST_NAME = 100

Arguments = Mapping[str, Any]  # argument -> its text, or a list of texts


@dataclass(frozen=True)
class Cell:
    """One row of a table: a command, run once per task and seed.

    Attributes:
        name: its key in the file.
        label: how the rendered tables call it.
        needs: names of the cells (of the same task and seed) that must be finished first.
        versus: name of the cell that this one is compared with; "" where that is the table's control.
        shared: run once, with the first seed, for the other cells of all seeds.
        args: arguments on top of the table's and the task's.
        smoke: arguments on top of the table's smoke overrides.
        published: task name ("" in a table without tasks) -> figure published elsewhere, in the table's display units.
        source: where that was published.
    """

    name: str
    label: str
    needs: tuple[str, ...]
    versus: str
    shared: bool
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
class Curve:
    """A plot of the last metric of some cells against a setting of theirs or against what they cost.

    Attributes:
        name: its key in the file.
        label: how the x axis is called.
        points: name of a cell -> where it stands on the x axis; None for its measured cost.
    """

    name: str
    label: str
    points: Mapping[str, float | None]

    @property
    def by_cost(self) -> bool:
        return None in self.points.values()


@dataclass(frozen=True)
class Table:
    """A table file, checked. `tasks` has one nameless task where the file has none."""

    name: str
    path: Path
    title: str
    description: str
    script: str
    control: str
    first_seed: int
    seeds: int
    scale: float
    placeholders: Mapping[str, str]
    base: Arguments
    tasks: tuple[Task, ...]
    cells: tuple[Cell, ...]
    curves: tuple[Curve, ...]
    smoke: Arguments

    def cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)

    def versus(self, cell: Cell) -> str:
        """Name of the cell that a cell is compared with; "" if with none."""
        unrelated = cell.shared or cell.name == self.control  # one run for all seeds is the partner of none
        return cell.versus or ("" if unrelated else self.control)


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
    for task in tasks:
        for key in task.values:
            if key in names:
                raise UserError(f"{where}: tasks.{task.name}.values: {key!r} is already the name of a cell")
    for key in placeholders:
        _check_name(key, f"{where}: placeholders")
        if key in (*RESERVED, *names):
            raise UserError(f"{where}: placeholders: {key!r} is already the name of a cell or a built-in placeholder")
    control = _text(content, "control", where)
    if control not in names:
        raise UserError(f"{where}: control: unknown cell {control!r}; {suggest(control, names)}")
    _check_needs(cells, where)
    _check_versus(cells, control, where)
    return Table(
        name=name,
        path=path,
        title=_text(content, "title", where),
        description=_text(content, "description", where, default=""),
        script=_text(content, "script", where),
        control=control,
        first_seed=int(_number(content.get("first_seed", "1"), f"{where}: first_seed", whole=True)),
        seeds=int(_number(content.get("seeds", "5"), f"{where}: seeds", whole=True)),
        scale=_number(content.get("scale", "1"), f"{where}: scale"),
        placeholders=placeholders,
        base=_arguments(content, "base", where),
        tasks=tasks,
        cells=cells,
        curves=tuple(
            _curve(curve, value, f"{where}: curves.{curve}", names)
            for curve, value in _mapping(content, "curves", where).items()
        ),
        smoke=_arguments(content, "smoke", where),
    )


def suggest(wrong: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'? valid: x, y`, to end an error message with."""
    valid = list(valid)
    near = difflib.get_close_matches(wrong, valid, n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid: {', '.join(valid) or 'none'}"


class _TextLoader(UniqueKeyLoader):
    """All scalars stay the text that was written (5e-5 is no float in YAML 1.1)."""

    yaml_implicit_resolvers: Mapping = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _TextLoader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path.name}, line {line}: this is no UTF-8 text") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path.name}, line {line}: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path.name}, line {line}: {error.problem}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: a table file is a mapping with the keys {', '.join(_TABLE_KEYS)}")
    return content


def _task(name: str, value: Any, where: str, placeholders: Mapping[str, str]) -> Task:
    where = f"{where}: tasks.{name}"
    _check_name(name, where)
    value = _as_mapping(value, where)
    _check_keys(value, _TASK_KEYS, where)
    values = _texts(value.get("values", {}), f"{where}.values")
    for key in values:
        _check_name(key, f"{where}.values")
        if key in (*RESERVED, *placeholders):
            raise UserError(f"{where}.values: {key!r} is already a placeholder")
    return Task(name, _arguments(value, "args", where), values)


def _cell(name: str, value: Any, where: str, tasks: list[str]) -> Cell:
    where = f"{where}: cells.{name}"
    _check_name(name, where)
    if name in RESERVED:
        raise UserError(f"{where}: {name!r} is the name of a built-in placeholder; give another")
    value = _as_mapping(value, where)
    _check_keys(value, _CELL_KEYS, where)
    needs = value.get("needs", [])
    if not isinstance(needs, str | list):
        raise UserError(f"{where}.needs: expected a cell or a list of cells, got {needs!r}")
    published = _as_mapping(value.get("published", {}), f"{where}.published")
    _check_keys(published, _PUBLISHED_KEYS, f"{where}.published")
    figures = published.get("value", {})
    if not isinstance(figures, dict):
        figures = {"": figures}
    for task in figures:
        if task not in tasks:
            raise UserError(f"{where}.published.value: unknown task {task!r}; {suggest(task, tasks)}")
    return Cell(
        name=name,
        label=" ".join(_text(value, "label", where).split()),  # a line, as it is a cell of the rendered tables
        needs=tuple([needs] if isinstance(needs, str) else needs),
        versus=_text(value, "versus", where) if "versus" in value else "",
        shared=_boolean(value.get("shared", "false"), f"{where}.shared"),
        args=_arguments(value, "args", where),
        smoke=_arguments(value, "smoke", where),
        published={task: _number(text, f"{where}.published.value") for task, text in figures.items()},
        source=_text(published, "source", f"{where}.published") if published else "",
    )


def _curve(name: str, value: Any, where: str, names: list[str]) -> Curve:
    _check_name(name, where)
    value = _as_mapping(value, where)
    _check_keys(value, _CURVE_KEYS, where)
    by_cost = "x" in value
    if by_cost and value["x"] != "cost":
        raise UserError(f"{where}.x: expected cost, got {value['x']!r}; other values stand in cells, as `cell: value`")
    cells = value.get("cells")
    if not cells or not isinstance(cells, list if by_cost else dict):
        form = "a list of cells" if by_cost else "`cell: value` lines (or x: cost and a list of cells)"
        raise UserError(f"{where}.cells: expected {form}, got {cells!r}")
    for cell in cells:
        if cell not in names:
            raise UserError(f"{where}.cells: unknown cell {cell!r}; {suggest(str(cell), names)}")
    points = {cell: None if by_cost else _number(cells[cell], f"{where}.cells.{cell}", above=-inf) for cell in cells}
    return Curve(name, _text(value, "label", where), points)


def _boolean(value: Any, where: str) -> bool:
    if value not in ("true", "false"):
        raise UserError(f"{where}: expected true or false, got {value!r}")
    return value == "true"


def _check_needs(cells: tuple[Cell, ...], where: str) -> None:
    names = [cell.name for cell in cells]
    for position, cell in enumerate(cells):
        for need in cell.needs:
            if need not in names:
                raise UserError(f"{where}: cells.{cell.name}.needs: unknown cell {need!r}; {suggest(need, names)}")
            if cell.shared and not cells[names.index(need)].shared:
                raise UserError(
                    f"{where}: cells.{cell.name} is shared by all seeds, but {need!r}, which it needs, is not"
                )
            if names.index(need) >= position:
                raise UserError(f"{where}: cells.{cell.name}.needs: {need!r} must stand above {cell.name!r}")


def _check_versus(cells: tuple[Cell, ...], control: str, where: str) -> None:
    shared = {cell.name: cell.shared for cell in cells}
    for cell in cells:
        others = [other.name for other in cells if other is not cell]
        if cell.versus and cell.versus not in others:
            problem = "this is the cell itself" if cell.versus == cell.name else f"unknown cell {cell.versus!r}"
            raise UserError(f"{where}: cells.{cell.name}.versus: {problem}; {suggest(cell.versus, others)}")
        if not cell.shared and shared[cell.versus or control]:  # its one run would be paired with one of many
            key, other = (f"cells.{cell.name}.versus", cell.versus) if cell.versus else ("control", control)
            raise UserError(f"{where}: {key}: {other!r} is shared, one run for all seeds; give one with all of them")


def _check_keys(content: Mapping, valid: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in valid:
            raise UserError(f"{where}: unknown key {key!r}; {suggest(str(key), valid)}")


def _check_name(name: str, where: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{where}: {name!r} is no name; letters, digits, and . _ - inside")
    if len(name) > _LONGEST_NAME:  # folders are called by it
        raise UserError(f"{where}: a name of {len(name)} letters; {_LONGEST_NAME} at most")


def _as_mapping(value: Any, where: str) -> dict:
    if value == "":  # a key with nothing behind it
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected `key: value` lines, got {value!r}")
    return value


def _mapping(content: Mapping, key: str, where: str) -> dict:
    return _as_mapping(content.get(key, {}), f"{where}: {key}")


def _text(content: Mapping, key: str, where: str, default: str | None = None) -> str:
    value = content.get(key) or default
    if value is None:
        raise UserError(f"{where}: {key} is missing; give a text")
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: expected a text, got {value!r}")
    return value


def _texts(value: Any, where: str) -> dict[str, str]:
    value = _as_mapping(value, where)
    for key, text in value.items():
        if not isinstance(text, str):
            raise UserError(f"{where}.{key}: expected one value, got {text!r}")
    return value


def _arguments(content: Mapping, key: str, where: str) -> Arguments:
    value = _mapping(content, key, where)
    for name, text in value.items():
        single = text if isinstance(text, list) else [text]
        if not all(isinstance(item, str) for item in single):
            raise UserError(f"{where}: {key}.{name}: expected one value or a list of values, got {text!r}")
    return value


def _number(text: Any, where: str, *, whole: bool = False, above: float = 0) -> float:
    try:
        value = int(text) if whole else float(text)
    except (TypeError, ValueError):
        value = nan
    if not above < value < inf:
        limit = "" if above == -inf else f" above {above}"
        raise UserError(f"{where}: {text!r} is no {'whole ' if whole else ''}number{limit}")
    return value
