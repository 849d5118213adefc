"""Run a table of experiments and render it; finished runs are never repeated. `--help` explains every flag.

python scripts/reproduce.py glue_rte --set data=FOLDER --set model=ENCODER --jobs 2
"""

import argparse
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml

from common.errors import UserError, run_cli
from scripts.reproduce_lib.launch import launch, unfinished
from scripts.reproduce_lib.plan import Run, plan, short
from scripts.reproduce_lib.table import Table, find_table, load_table, suggest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    parser = _Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="name of a file in configs/tables, or a YAML file of your own in the same form")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="run seeds 1 to N (default: as the table says)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks (default: all of the table)")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these cells and what they need (default: all)")
    parser.add_argument(
        "--set",
        dest="values",
        action="append",
        default=[],
        type=_assignment,
        metavar="KEY=VALUE",
        help="value of one of the table's placeholders, such as data or model (may be repeated)",
    )
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at once (default: 1)")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="where (default: local)")
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        type=_assignment,
        metavar="KEY=VALUE",
        help="submitit parameter of --launcher slurm, such as slurm_partition=gpu, timeout_min=600, gpus_per_node=1",
    )
    parser.add_argument("--smoke", action="store_true", help="every run for seconds; nothing goes to --results")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--render-only", action="store_true", help="render what is finished, run nothing")
    parser.add_argument(
        "--keep-rows",
        action="store_true",
        help="rows of runs.csv made by the same command count as finished, even if their folders are gone",
    )
    parser.add_argument("--output", type=Path, help="folder of the run folders (default: outputs/reproduce)")
    parser.add_argument("--results", type=Path, help="folder of the rendered tables (default: results)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    table = load_table(find_table(args.table))
    outputs = "reproduce-smoke" if args.smoke else "reproduce"
    output = (args.output or ROOT / "outputs" / outputs).absolute()
    results = (args.results or (output / "results" if args.smoke else ROOT / "results")).absolute() / table.name
    values = {name: _anchored(value) for name, value in args.values}
    seeds = args.seeds or (1 if args.smoke else table.seeds)

    runs = plan(table, values, seeds, output, smoke=args.smoke)
    wanted = _selected(runs, table, args.tasks, args.cells)
    todo = unfinished(wanted, lambda run: run.finished)
    if args.dry_run:
        _print_commands(wanted, todo)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running jobs are ended, too
    failed = launch(todo, args.jobs, launcher=args.launcher, options={}, logs=output / "submitit")
    sys.exit(1 if failed else 0)


def _selected(runs: list[Run], table: Table, tasks: list[str] | None, cells: list[str] | None) -> list[Run]:
    for flag, chosen, valid in (
        ("--tasks", tasks, [task.name for task in table.tasks if task.name]),
        ("--cells", cells, [cell.name for cell in table.cells]),
    ):
        for name in chosen or []:
            if name not in valid:
                raise UserError(f"{flag}: {table.path.name} has no {name!r}; {suggest(name, valid)}")
    return [run for run in runs if (not tasks or run.task in tasks) and (not cells or run.cell in cells)]


def _print_commands(wanted: list[Run], todo: list[Run]) -> None:
    import shlex

    for run in dict.fromkeys([*wanted, *todo]):
        state = "finished" if run.finished else "to resume" if (run.folder / "config.json").exists() else "to run"
        print(f"# {run.title}: {state}\n{shlex.join(['python', *run.command()[1:]])}")


def _anchored(value: str) -> str:
    """A path that exists here stays the same path for runs that start elsewhere; anything else is left alone."""
    return short(Path(value)) if Path(value).exists() else value


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return name, value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    run_cli(main)
