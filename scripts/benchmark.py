"""What DSKD and the training loops cost, each beside a rival in the same run; writes results/benchmark/*.json.

python scripts/benchmark.py startup     seconds of --help and to a first training step
python scripts/benchmark.py method      DSKD's share of a training step, and against an SVD in every step
python scripts/benchmark.py curvature   the same for the basis curvature, which is renewed in every step
python scripts/benchmark.py growth      how DSKD's cost grows with matrices, rank, pairs and processes
python scripts/benchmark.py cv          images per second and memory beside the toolkits' loop (needs CIFAR-100)
python scripts/benchmark.py nlp         examples per second and metric beside the GLUE example's loop (needs GLUE)
python scripts/benchmark.py all         all of these
"""

from pkgutil import resolve_name

import _paths  # noqa: F401

from common.run.errors import run_cli
from common.run.numbers import Number
from scripts.lib.benchmark.command import command, parse

TASKS = ("RTE", "MRPC", "CoLA", "SST-2")
# a function of scripts/lib/benchmark, imported when its turn comes, and what it takes after (output, quick)
PARTS = {
    "startup": ("startup:run", ()),
    "method": ("method:run", ()),
    "curvature": ("method:run_curvature", ()),
    "growth": ("growth:run", ()),
    "cv": ("loops:run", ("cifar100",)),
    "nlp": ("glue:run", ("glue", "model", "tasks", "seeds", "block", "precision")),
}


def main() -> None:
    parser, count = command(__doc__, "--cifar100", "--glue", "--model"), Number(int, 1)
    parser.add_argument("what", choices=(*PARTS, "all"))
    nlp = parser.add_argument_group("nlp")
    nlp.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"default: {' '.join(TASKS)}")
    nlp.add_argument("--seeds", type=count, default=2, help="trainings by each loop (default: 2)")
    steps = "steps between turns, a training is 7 x BLOCK (default: 8; 11: RTE's epoch)"
    nlp.add_argument("--block", type=count, default=8, help=steps)
    nlp.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of both loops (default: bf16)")
    args = parse(parser)
    for name in PARTS if args.what == "all" else [args.what]:
        place, more = PARTS[name]
        run = resolve_name(f"scripts.lib.benchmark.{place}")
        print(run(args.output, args.quick, *(getattr(args, key) for key in more)), flush=True)


if __name__ == "__main__":
    run_cli(main)
