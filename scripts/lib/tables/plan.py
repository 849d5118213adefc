"""From a table to its runs: every cell, task and seed as one command with a folder of its own."""

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT
from common.run.errors import UserError
from common.run.suggest import suggest
from scripts.lib.tables.table import RESERVED, Arguments, Table


@dataclass(frozen=True)
class Script:
    """How a training script takes its arguments.

    Attributes:
        path: the script.
        dotted: `--cfg FILE KEY VALUE ...` instead of `--key value` flags (`true` is a bare flag there).
        seed, output: what its seed and its output folder are called.
        start: words for a first start in a folder that may hold the rest of a broken one.
        checkpoint: the file that a folder has if `--resume` can continue there.
    """

    path: Path
    dotted: bool = False
    seed: str = "--seed"
    output: str = "--output_dir"
    start: tuple[str, ...] = ()
    checkpoint: str = "config.json"


SCRIPTS = {
    "nlp": Script(ROOT / "nlp/BERT-of-Theseus/run_glue_SVD_losslayer.py", start=("--overwrite_output_dir",)),
    "cv": Script(
        ROOT / "cv/train_svd.py",
        dotted=True,
        seed="SOLVER.SEED",
        output="OUTPUT_DIR",
        start=("--overwrite",),
        checkpoint="checkpoint.pt",
    ),
}


@dataclass(frozen=True)
class Run:
    """One cell with one task and one seed.

    Attributes:
        task, cell, seed: which one; the task is "" in a table without tasks.
        folder: where it runs; its name contains cell, seed and a hash of the resolved command.
        portable: the command with placeholders for what differs from machine to machine.
        placeholders: the values of the table's placeholders as `name=value ...`, without the folders of this machine.
        needs: the runs that must be finished first.
    """

    task: str
    cell: str
    seed: int
    folder: Path
    portable: str
    placeholders: str
    needs: tuple["Run", ...]
    script: Script = field(repr=False)
    words: tuple[str, ...] = field(repr=False)

    @property
    def title(self) -> str:
        return f"{self.task + ' ' if self.task else ''}{self.cell} seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def resumable(self) -> bool:
        return (self.folder / self.script.checkpoint).exists()

    def command(self) -> list[str]:
        """The words to start it with: from its checkpoint where its folder has one, from the beginning otherwise."""
        start = ("--resume",) if self.resumable else self.script.start
        words = [sys.executable, short(self.script.path)]
        if self.script.dotted:  # KEY VALUE pairs come last; --cfg FILE stands first
            return [*words, *self.words[:2], *start, *self.words[2:]]
        return [*words, *self.words, *start]


def plan(
    table: Table, values: Mapping[str, str], seeds: int, output: Path, *, more: Iterable[int] = (), smoke: bool = False
) -> list[Run]:
    """All runs of a table, seed by seed, so that an unfinished table has every cell equally often.

    Args:
        table: the table.
        values: placeholder -> value, on top of the table's defaults.
        seeds: every cell runs with so many seeds from the table's first one on, a shared one with the first alone.
        output: the folder of all run folders.
        more: seeds that every cell runs with as well.
        smoke: with the overrides that make every run short.

    Raises:
        UserError: a placeholder that does not exist, a script that does not exist.
    """
    for name in values:
        if name not in table.placeholders:
            valid = suggest(name, table.placeholders)
            raise UserError(f"--set {name}: {table.path.name} has no such placeholder; {valid}")
    planner = _Planner(table, find_script(table), {**table.placeholders, **values}, output, smoke)
    runs: dict[Run, None] = {}  # in order; a shared cell comes up with every seed
    for seed in sorted({*range(table.first_seed, table.first_seed + seeds), *more}):
        for task in table.tasks:
            done: dict[str, Run] = {}
            for name, cell in table.cells.items():
                done[name] = planner.run(task, name, table.first_seed if cell.shared else seed, done)
            runs |= dict.fromkeys(done.values())
    return list(runs)


def find_script(table: Table) -> Script:
    """The script of a table: `nlp`, `cv`, or a path, from the table's folder or from the repository's root."""
    if table.script in SCRIPTS:
        return SCRIPTS[table.script]
    for base in (table.path.parent, ROOT):
        if (base / table.script).is_file():
            return Script((base / table.script).resolve())
    valid = suggest(table.script, SCRIPTS)
    raise UserError(f"{table.path.name}: script: there is no file {table.script!r}; {valid}, or a path")


def short(path: Path) -> str:
    """A path relative to the repository's root where it lies inside, which is where all commands run."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def portable(word: str) -> str:
    """A word without the folders of this machine: relative to the root, or no more than the last part of the path."""
    path = Path(word)
    if not path.is_absolute():
        return path.name if word.startswith("..") else word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def pairs(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class _Planner:
    table: Table
    script: Script
    values: Mapping[str, str]  # of all placeholders
    output: Path
    smoke: bool

    def run(self, task: str, cell: str, seed: int, others: Mapping[str, Run]) -> Run:
        table, script, where = self.table, self.script, f"{self.table.path.name}: cells.{cell}"
        row, section = table.cells[cell], table.tasks[task]
        layers = [table.base, section.args, row.args, *((table.smoke, row.smoke) if self.smoke else ())]
        words = [*_words(layers, script, where), script.seed, "{seed}", script.output, "{output}"]
        own = {"task": task, "cell": cell, "seed": str(seed), **section.values}
        needs = {name: others[name] for name in row.needs}

        def filled(values: Mapping[str, str], needs: Mapping[str, str], output: str) -> tuple[str, ...]:
            known = {**own, **values, **needs, "output": output}
            return tuple(_fill(word, known, where) for word in words)

        # neither the folder of the runs nor that of the repository is part of what a run is
        placed = {name: short(Path(path)) if Path(path).is_absolute() else path for name, path in self.values.items()}
        resolved = filled(placed, {name: run.folder.name for name, run in needs.items()}, "")
        digest = hashlib.sha256(json.dumps([portable(str(script.path)), *resolved]).encode()).hexdigest()[:10]
        folder = self.output / "-".join(filter(None, [task, cell, f"seed{seed}", digest]))
        values, others = ({name: f"{{{name}}}" for name in names} for names in (self.values, needs))
        masked = filled(values, others, "{output}")
        return Run(
            task=task,
            cell=cell,
            seed=seed,
            folder=folder,
            portable=_join(["python", portable(str(script.path)), *map(portable, masked)]),
            placeholders=pairs({name: portable(value) for name, value in self.values.items()}),
            needs=tuple(needs.values()),
            script=script,
            words=filled(self.values, {name: short(run.folder) for name, run in needs.items()}, short(folder)),
        )


def _words(layers: list[Arguments], script: Script, where: str) -> Iterator[str]:
    """The arguments as words; later layers replace earlier ones, `null` removes."""
    arguments = {key: value for layer in layers for key, value in layer.items()}
    arguments = {key: value for key, value in arguments.items() if value not in ("null", "~", "")}
    if script.dotted:
        if "cfg" not in arguments:
            raise UserError(f"{where}: cfg is missing; give the config file in base, the task's args or the cell's")
        if not isinstance(arguments["cfg"], str):
            raise UserError(f"{where}: cfg: expected one config file, got {arguments['cfg']!r}")
        yield from ("--cfg", arguments.pop("cfg"))
    for key, value in arguments.items():
        texts = value if isinstance(value, list) else [value]
        if script.dotted:
            yield from (key, f"[{', '.join(value)}]" if isinstance(value, list) else value)
        elif texts == ["true"]:
            yield f"--{key}"
        elif texts != ["false"]:
            yield from (f"--{key}", *texts)


def _join(words: list[str]) -> str:
    """`shlex.join` that leaves braces unquoted: they are placeholders here."""
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./{}-]+", word) else shlex.quote(word) for word in words)


def _fill(word: str, known: Mapping[str, str], where: str) -> str:
    def value(match: re.Match) -> str:
        if match[1] not in known:
            valid = [name for name in known if name not in RESERVED]
            raise UserError(f"{where}: unknown placeholder {match[0]}; {suggest(match[1], valid)}")
        return known[match[1]]

    return re.sub(r"\{(\w[\w.-]*)\}", value, word)
