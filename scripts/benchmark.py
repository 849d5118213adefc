"""What DSKD and the training loops cost, each beside a rival in the same run; writes results/benchmark/*.json.

python scripts/benchmark.py startup     seconds of --help and to a first training step
python scripts/benchmark.py method      DSKD's share of a training step, and against an SVD in every step
python scripts/benchmark.py curvature   the same for the basis curvature, which is renewed in every step
python scripts/benchmark.py growth      how DSKD's cost grows with matrices, rank, pairs and processes
python scripts/benchmark.py cv          speed and memory beside the toolkits' loop, parts of a step, runs at once
python scripts/benchmark.py nlp         speed and metric beside the GLUE example's loop, in equal time, too (needs GLUE)
python scripts/benchmark.py all         all of these
python scripts/benchmark.py compiled    the CIFAR loop with and without SOLVER.COMPILE: takes minutes, no part of all
python scripts/benchmark.py exactness   how right a held gradient stays in real runs: takes long, no part of all
python scripts/benchmark.py render      measures nothing: the tables of docs/performance.md anew from the files
"""

import argparse
import sys
from argparse import Namespace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from pkgutil import resolve_name

import _paths  # noqa: F401

from common import ROOT
from common.run.errors import Parser, run_cli
from common.run.files import check_writable
from common.run.numbers import Number
from common.torchvision_repair import repair_torchvision
from scripts.lib.benchmark.page import render

TASKS = ("MRPC", "SST-2")
# a function of scripts/lib/benchmark, imported when its turn comes, and what it takes after (output, quick)
PARTS = {
    "startup": ("startup:run", ()),
    "method": ("method:run", ()),
    "curvature": ("method:run_curvature", ()),
    "growth": ("growth:run", ()),
    "cv": ("cifar:run", ("cifar100",)),
    "nlp": ("glue:run", ("glue", "model", "tasks", "seeds", "block", "precision")),
    "compiled": ("cifar:run_compiled", ()),
    "exactness": ("exactness:run", ("cifar100", "glue", "model")),
}
ALL = [name for name in PARTS if name not in ("compiled", "exactness")]


def build_parser() -> Parser:
    """The parser of this script."""
    parser, count = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), Number(int, 1)
    parser.add_argument("what", choices=(*PARTS, "all", "render"))
    output = ROOT / "results" / "benchmark"
    parser.add_argument("--output", type=Path, default=output, help="folder of the files (default: results/benchmark)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    text = 'folder of CIFAR-100; "random": cv takes random images (default: data/cifar100)'
    parser.add_argument("--cifar100", default="data/cifar100", help=text)
    text = "folder with RTE/train.tsv and so on (default: data/glue)"
    parser.add_argument("--glue", default="data/glue", help=text)
    model = "nreimers/MiniLM-L6-H384-uncased"
    parser.add_argument("--model", default=model, help=f"pretrained encoder, a folder or a hub name (default: {model})")
    nlp = parser.add_argument_group("nlp")
    nlp.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"default: {' '.join(TASKS)}")
    nlp.add_argument("--seeds", type=count, default=3, help="trainings by each loop (default: 3)")
    steps = "steps between turns, a training is 7 x BLOCK (default: 8; 11: RTE's epoch)"
    nlp.add_argument("--block", type=count, default=8, help=steps)
    nlp.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of both loops (default: bf16)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.what == "render":
        print(render(args.output))
        return
    check_writable("--output", args.output)
    if args.what != "all":
        measure(args.what, args)
        return
    for name in ALL:  # one part changes how its process allocates
        process = get_context("spawn").Process(target=run_cli, args=(partial(measure, name, args),))
        process.start()
        try:
            process.join()
        finally:
            process.terminate()  # where this one was told to stop
        if process.exitcode:
            sys.exit(process.exitcode)


def measure(name: str, args: Namespace) -> None:
    """Run one part and print its tables."""
    repair_torchvision()
    place, more = PARTS[name]
    run = resolve_name(f"scripts.lib.benchmark.{place}")
    print(run(args.output, args.quick, *(getattr(args, key) for key in more)), flush=True)


if __name__ == "__main__":
    run_cli(main)
