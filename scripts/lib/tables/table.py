"""A table file: its cells and the arguments of each. `configs/tables/glue_short.yaml` explains the keys."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from common import ROOT
from common.run.errors import UserError
from common.run.reading import read_text
from common.run.suggest import suggest
from common.run.yaml_files import UniqueKeyLoader

FOLDER = ROOT / "configs" / "tables"
RESERVED = ("task", "cell", "seed", "output")  # placeholders that every run fills in by itself


def _message(text: str) -> WrapValidator:
    """Whatever is wrong with a value, this is said about it."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(text.format(value)) from None

    return WrapValidator(check)


_NAME = Field(pattern=r"^\w[\w.-]*$", max_length=100)  # folders are called by it

Text = Annotated[str, _message("expected a text, got {!r}")]
Name = Annotated[str, _NAME, _message("{!r} is no name; letters, digits, and . _ - inside, 100 at most")]
Values = dict[Name, Annotated[str, _message("expected one value, got {!r}")]]
Arguments = dict[str, Annotated[str | list[str], _message("expected one value or a list of values, got {!r}")]]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False), _message("{!r} is no number above 0")]
PositiveInteger = Annotated[int, Field(gt=0), _message("{!r} is no whole number above 0")]


class Part(BaseModel, frozen=True):
    """A mapping of the file; its keys are the fields. A key with nothing behind it is like none."""

    @model_validator(mode="before")
    @classmethod
    def check_keys(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content or {}
        keys = [field.alias or name for name, field in cls.model_fields.items()]
        for key in content:
            if key not in keys:
                raise ValueError(f"unknown key {key!r}; {suggest(str(key), keys)}")
        return {key: value for key, value in content.items() if value}


PartOf = TypeVar("PartOf", bound=Part)


class Published(Part):
    """Figures from elsewhere, in the table's display units: task name ("" in a table without tasks) -> figure."""

    value: Annotated[
        dict[str, PositiveNumber], BeforeValidator(lambda value: value if isinstance(value, dict) else {"": value})
    ] = {}
    source: Text = ""


class Cell(Part):
    """One row of a table: a command, run once per task and seed.

    Attributes:
        label: how the rendered tables call it.
        needs: names of the cells (of the same task and seed) that must be finished first.
        versus: name of the cell that this one is compared with; "" where that is the table's control.
        control_of: in the place of `versus`, the cell whose control this one is: tables show that cell minus this one,
            so that a positive difference speaks for it.
        shared: run once, with the first seed, for the other cells of all seeds.
        args: arguments on top of the table's and the task's.
        published: figures from elsewhere.
        smoke: arguments on top of the table's smoke overrides.
    """

    label: Annotated[Text, AfterValidator(lambda text: " ".join(text.split()))]  # a cell of the tables is one line
    needs: Annotated[
        list[str],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        _message("expected a cell or a list of cells, got {!r}"),
    ] = []
    versus: Text = ""
    control_of: Text = ""
    shared: Annotated[bool, _message("expected true or false, got {!r}")] = False
    args: Arguments = {}
    published: Published = Published()
    smoke: Arguments = {}


class Task(Part):
    """One section of a table: arguments that all cells share there, and values for placeholders."""

    args: Arguments = {}
    values: Values = {}


class Table(Part):
    """A table file, checked. `tasks` has one nameless task where the file has none."""

    name: Name = Field(alias="table")
    title: Text
    description: Text = ""
    script: Text
    control: Text
    first_seed: PositiveInteger = 1
    seeds: PositiveInteger = 5
    scale: PositiveNumber = 1.0
    placeholders: Values = {}
    base: Arguments = {}
    tasks: dict[Name, Task] = {"": Task()}
    cells: dict[Name, Cell]
    family: list[Text] = []  # cells whose comparisons were planned together: their p values are also corrected
    smoke: Arguments = {}
    _path: Path

    @property
    def path(self) -> Path:
        return self._path

    def versus(self, name: str) -> str:
        """Name of the cell that a cell is compared with; "" if with none."""
        cell = self.cells[name]
        unrelated = cell.shared or name == self.control  # one run for all seeds is the partner of none
        return cell.versus or cell.control_of or ("" if unrelated else self.control)

    @model_validator(mode="after")
    def check_names(self):
        """Cells, placeholders and the values of a task are all written as {name}: none may hide another."""
        taken = dict.fromkeys(RESERVED, "the name of a built-in placeholder")
        for where, names, what in (
            ("cells", self.cells, "the name of a cell"),
            ("placeholders", self.placeholders, "a placeholder"),
            *((f"tasks.{name}.values", task.values, "") for name, task in self.tasks.items()),
        ):
            for name in names:
                if name in taken:
                    raise ValueError(f"{where}: {name!r} is already {taken[name]}")
            if what:  # other tasks have values of the same names
                taken |= dict.fromkeys(names, what)
        return self

    @model_validator(mode="after")
    def check_references(self):
        _check_known("control", [self.control], self.cells)
        for position, (name, cell) in enumerate(self.cells.items()):
            _check_known(f"cells.{name}.needs", cell.needs, self.cells)
            for need in cell.needs:
                if cell.shared and not self.cells[need].shared:
                    raise ValueError(f"cells.{name} is shared by all seeds, but {need!r}, which it needs, is not")
                if need not in list(self.cells)[:position]:
                    raise ValueError(f"cells.{name}.needs: {need!r} must stand above {name!r}")
            if cell.versus and cell.control_of:
                raise ValueError(f"cells.{name}: versus and control_of are one comparison in two directions; give one")
            key = f"cells.{name}.{'control_of' if cell.control_of else 'versus'}"
            if name in (cell.versus, cell.control_of):
                others = [other for other in self.cells if other != name]
                raise ValueError(f"{key}: this is the cell itself; {suggest(name, others)}")
            other = cell.versus or cell.control_of or self.control
            _check_known(key, [other], self.cells)
            if not cell.shared and self.cells[other].shared:  # its one run would be paired with one of many
                key = key if cell.versus or cell.control_of else "control"
                raise ValueError(f"{key}: {other!r} is shared, one run for all seeds; give one with all of them")
            _check_known(f"cells.{name}.published.value", cell.published.value, self.tasks, "task")
            if cell.published.value and not cell.published.source:
                raise ValueError(f"cells.{name}.published: source is missing")
        _check_known("family", self.family, self.cells)
        return self


def _check_known(where: str, names: Iterable[str], valid: Iterable[str], what: str = "cell") -> None:
    for name in names:
        if name not in valid:
            raise ValueError(f"{where}: unknown {what} {name!r}; {suggest(name, valid)}")


def find_table(name: str) -> Path:
    """The file of a table: one of `configs/tables` by name, or any YAML file by path.

    Raises:
        UserError: there is neither.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"unknown table {name!r}; {suggest(name, (p.stem for p in sorted(FOLDER.glob('*.yaml'))))}")
    return path


def load_table(path: Path) -> Table:
    """Read and check a table file.

    Raises:
        UserError: what is wrong, with the file and the key.
    """
    table = checked(Table, _read(path), path.name)
    table._path = path
    return table


def checked(model: type[PartOf], content: Any, file: str) -> PartOf:
    """A file's content, checked; a UserError names file and key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("", "[key]"))
        own = {"missing": "this key is missing or empty"}
        wrong = f"expected `key: value` lines, got {first['input']!r:.100}"
        own |= dict.fromkeys(("dict_type", "model_type"), wrong)
        message = own.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise UserError(": ".join(filter(None, [file, key, message]))) from None


class _TextLoader(UniqueKeyLoader):
    """All scalars stay the text that was written (5e-5 is no float in YAML 1.1)."""

    yaml_implicit_resolvers: Mapping = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}


def _read(path: Path) -> Any:
    text = read_text(path)
    try:
        return yaml.load(text, _TextLoader)
    except (yaml.reader.ReaderError, yaml.MarkedYAMLError) as error:
        unreadable = isinstance(error, yaml.reader.ReaderError)
        place = error.position if unreadable else error.problem_mark.index
        reason = error.reason if unreadable else error.problem
        raise UserError(f"{path.name}, line {text.count(chr(10), 0, place) + 1}: {reason}") from error
