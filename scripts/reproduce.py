"""Run a table of experiments and render it; finished runs are never repeated. `--help` explains every flag.

python scripts/reproduce.py glue_short --set data=FOLDER --set model=ENCODER --jobs 2
python scripts/reproduce.py --forest
"""

import argparse
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import _paths  # noqa: F401
import pandas as pd

from common import ROOT
from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable
from common.run.numbers import Number
from common.run.record import git_revision
from common.run.suggest import suggest
from scripts.lib.tables.collect import collect, keys, read_rows, recognised, write_rows
from scripts.lib.tables.forest import draw_table, write_forest
from scripts.lib.tables.launch import launch, unfinished
from scripts.lib.tables.plan import Run, plan, short
from scripts.lib.tables.render import render
from scripts.lib.tables.summary import summarize
from scripts.lib.tables.table import Table, find_table, load_table


def build_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "name of a file in configs/tables, or a YAML file of your own in the same form"
    parser.add_argument("table", nargs="?", help=text)
    text = "nothing is run: the comparisons of these tables in one figure, forest.png and forest.svg, in --results or "
    text += "outputs/forest; without names those of results/front.yaml, with the pages that show them"
    parser.add_argument("--forest", nargs="*", metavar="TABLE", help=text)
    parser.add_argument("--seeds", type=Number(int, 1), metavar="N", help="seeds per cell (default: as the table says)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks (default: all of the table)")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these cells and what they need (default: all)")
    assignment = {"action": "append", "default": [], "type": _assignment, "metavar": "KEY=VALUE"}
    text = "value of one of the table's placeholders, such as data or model (may be repeated)"
    parser.add_argument("--set", dest="values", **assignment, help=text)
    parser.add_argument("--jobs", type=Number(int, 1), default=1, metavar="N", help="runs at once (default: 1)")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="where (default: local)")
    text = "submitit parameter of --launcher slurm, such as slurm_partition=gpu, timeout_min=600, gpus_per_node=1"
    parser.add_argument("--slurm", **assignment, help=text)
    parser.add_argument("--smoke", action="store_true", help="every run for seconds, all in outputs/reproduce-smoke")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--render-only", action="store_true", help="render what is finished, run nothing")
    text = "besides table.md: LaTeX, CSV, and a plot of the differences as PNG and SVG"
    parser.add_argument("--formats", nargs="+", choices=("tex", "csv", "plots"), default=[], help=text)
    text = "rows of runs.csv by the same commands, --set values and code count as finished, even without their "
    text += "folders; all: by any revision of the code"
    parser.add_argument("--keep-rows", nargs="?", const="same", choices=("same", "all"), help=text)
    parser.add_argument("--output", type=Path, help="folder of the run folders (default: outputs/reproduce)")
    parser.add_argument("--results", type=Path, help="folder of the rendered tables (default: results)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.slurm and args.launcher != "slurm":
        raise UserError("--slurm needs --launcher slurm")
    for flag, folder in (("--output", args.output), ("--results", args.results)):
        if folder:  # before any run, whose results would have nowhere to go
            check_writable(flag, folder)
    if (args.table is None) == (args.forest is None):
        raise UserError("give the name of a table, or --forest")
    if args.forest is not None:
        print(f"written: {', '.join(short(path) for path in write_forest(args.forest, args.results))}")
        return
    table = load_table(find_table(args.table))
    outputs = "reproduce-smoke" if args.smoke else "reproduce"
    output = (args.output or ROOT / "outputs" / outputs).absolute()
    results = (args.results or (output / "results" if args.smoke else ROOT / "results")).absolute() / table.name
    values = {name: _anchored(value) for name, value in args.values}
    seeds = args.seeds or (1 if args.smoke else table.seeds)

    selected = _selected(plan(table, values, seeds, output, smoke=args.smoke), table, args.tasks, args.cells)
    earlier = read_rows(results / "runs.csv")

    def every_run() -> list[Run]:
        """Of other seeds, those alone that `runs.csv` names: tables with the same commands share the run folders."""
        return plan(table, values, seeds, output, more=read_rows(results / "runs.csv")["seed"], smoke=args.smoke)

    kept = recognised(every_run(), earlier) if args.keep_rows else {}
    if args.keep_rows == "same":
        known, kept = kept, recognised(every_run(), earlier, git_revision())
        if other := len(known.keys() - kept.keys()):
            print(f"{other} rows of other revisions of the code are not kept; --keep-rows all keeps them")
    todo = unfinished(selected, lambda run: run.finished or run in kept)
    if args.dry_run:
        _print_commands(selected, todo)
        return

    def save_rows() -> tuple[pd.DataFrame, dict[Run, str]]:
        """All finished runs, those of tasks, cells and seeds that were not asked for today as well."""
        rows, unusable = collect(every_run(), kept)
        if len(rows):
            write_rows(rows, results / "runs.csv")
        return rows, unusable

    present, _ = collect(every_run(), kept)
    planned = {(run.task, run.cell, run.seed, run.portable, run.placeholders) for run in todo}
    if lost := len(keys(earlier) - keys(present) - (set() if args.render_only else planned)):
        why = "of other commands or --set values or of runs that are not here"
        print(f"{lost} earlier rows, {why}, leave runs.csv with the first one that is written", flush=True)
    failed = {}
    if not args.render_only:
        counts = f"{len(selected)} runs, {len(todo)} left to do"
        print(f"{counts}; their folders and logs are in {short(output)}", flush=True)
        options = {name: _plain_value(value) for name, value in args.slurm}
        logs = output / "submitit"
        failed = launch(todo, args.jobs, args.launcher, options, logs, finished=save_rows)
    rows, unusable = save_rows()
    if len(rows) and rows["last"].notna().any():
        summary = summarize(table, rows)
        render(table, summary, rows, results, args.formats)
        files = ["runs.csv", "table.md", *(f"table.{kind}" for kind in ("tex", "csv") if kind in args.formats)]
        if "plots" in args.formats:
            files += draw_table(table, rows, results)
        print(f"{len(rows)} runs in {short(results)}: {', '.join(files)}")
    else:
        nothing = "has measured anything" if len(rows) else "has finished"
        print(f"no run with these commands and --set values {nothing} in {short(output)}, so there is no table")
    for run, reason in unusable.items():
        print(f"{run.title} is not in the table: {reason}; without its folder it is run again")
    if failed:
        print(f"{len(failed)} of {len(todo)} runs failed: " + ", ".join(run.title for run in failed))
    if failed or unusable:
        sys.exit(1)


def _selected(runs: list[Run], table: Table, tasks: list[str] | None, cells: list[str] | None) -> list[Run]:
    valid_tasks = [task for task in table.tasks if task]  # the nameless one cannot be asked for
    for flag, chosen, valid in (("--tasks", tasks, valid_tasks), ("--cells", cells, table.cells)):
        for name in chosen or []:
            if name not in valid:
                raise UserError(f"{flag}: {table.path.name} has no {name!r}; {suggest(name, valid)}")
    return [run for run in runs if (not tasks or run.task in tasks) and (not cells or run.cell in cells)]


def _print_commands(wanted: list[Run], todo: list[Run]) -> None:
    left = set(todo)
    for run in dict.fromkeys([*wanted, *todo]):
        state = "finished" if run not in left else "to resume" if run.resumable else "to run"
        print(f"# {run.title}: {state}\n{shlex.join(['python', *run.command()[1:]])}")


def _anchored(value: str) -> str:
    """A path that exists here stays the same path for runs that start elsewhere.

    Anything else is left alone, but for a slash at its end or `./` before it: a run may make the folder that it names.
    """
    if Path(value).exists():
        return short(Path(value))
    return os.path.normpath(value) if "/" in value and "://" not in value else value


def _plain_value(text: str) -> object:
    """A number, true or false as such, anything else as text: 10:00:00 and 0123 are times and names to Slurm."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return name, value


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):  # also where a shell's background job would ignore Ctrl-C, as would
        signal.signal(ending, signal.default_int_handler)  # its children: running jobs are ended, too
    run_cli(main)
