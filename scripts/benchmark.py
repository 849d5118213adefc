"""What DSKD and the training loops cost, each beside a rival in the same run; writes results/benchmark/*.json.

python scripts/benchmark.py startup     seconds of --help and to a first training step
python scripts/benchmark.py method      DSKD's share of a training step, and against an SVD in every step
python scripts/benchmark.py curvature   the same for the basis curvature, which is renewed in every step
python scripts/benchmark.py growth      how DSKD's cost grows with matrices, rank, pairs and processes
python scripts/benchmark.py cv          images per second and memory beside the toolkits' loop (needs CIFAR-100)
python scripts/benchmark.py nlp         examples per second and metric beside the GLUE example's loop (needs GLUE)
python scripts/benchmark.py all         all of these
"""

import argparse
from importlib import import_module
from pathlib import Path

import _paths  # noqa: F401

from common import ROOT
from common.run.errors import Parser, run_cli
from common.run.files import check_writable
from common.run.numbers import Number
from common.torchvision_repair import repair_torchvision

TASKS = ("RTE", "MRPC", "CoLA", "SST-2")
# a module of scripts/lib/benchmark, imported when its turn comes, and what its `run` takes after (output, quick)
PARTS = {
    "startup": ("startup", ()),
    "method": ("method", ()),
    "curvature": ("curvature", ()),
    "growth": ("growth", ()),
    "cv": ("loops", ("cifar100",)),
    "nlp": ("glue", ("glue", "model", "tasks", "seeds", "block", "precision")),
}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*PARTS, "all"))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results" / "benchmark", help="default: results/benchmark"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    parser.add_argument("--cifar100", default="data/cifar100", help="folder of CIFAR-100 (default: %(default)s)")
    nlp = parser.add_argument_group("nlp")
    nlp.add_argument("--glue", default="data/glue", help="folder with RTE/train.tsv and so on (default: %(default)s)")
    nlp.add_argument(
        "--model",
        default="nreimers/MiniLM-L6-H384-uncased",
        help="pretrained encoder, a folder or a hub name (default: %(default)s)",
    )
    nlp.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"default: {' '.join(TASKS)}")
    count = Number(int, 1)
    nlp.add_argument("--seeds", type=count, default=2, help="trainings by each loop (default: 2)")
    steps = "steps between turns, a training is 7 x BLOCK (default: 8; 11: RTE's epoch)"
    nlp.add_argument("--block", type=count, default=8, help=steps)
    nlp.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of both loops (default: bf16)")
    args = parser.parse_args()
    check_writable("--output", args.output)
    repair_torchvision()
    for name in PARTS if args.what == "all" else [args.what]:
        module, more = PARTS[name]
        run = import_module(f"scripts.lib.benchmark.{module}").run
        print(run(args.output, args.quick, *(getattr(args, key) for key in more)), flush=True)


if __name__ == "__main__":
    run_cli(main)
