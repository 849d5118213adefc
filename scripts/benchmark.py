"""What DSKD and the training loops cost, each beside a rival in the same run; writes results/benchmark/*.json.

python scripts/benchmark.py startup     seconds of --help and to a first training step
python scripts/benchmark.py method      DSKD's share of a training step, and against an SVD in every step
python scripts/benchmark.py curvature   the same for the basis curvature, which is renewed in every step
python scripts/benchmark.py growth      how DSKD's cost grows with matrices, rank, pairs and processes
python scripts/benchmark.py cv          images per second and memory beside the toolkits' loop (needs CIFAR-100)
python scripts/benchmark.py nlp         examples per second and metric beside the GLUE example's loop (needs GLUE)
python scripts/benchmark.py exactness   how far the held gradient is from the exact one in real training (needs both)
python scripts/benchmark.py scores      how far the release's choice of directions is from ours (needs CIFAR-100)
python scripts/benchmark.py all         all of these
"""

import argparse
from pathlib import Path

import _paths  # noqa: F401

from common import ROOT
from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable
from common.torchvision_repair import repair_torchvision

TASKS = ("RTE", "MRPC", "CoLA", "SST-2")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("startup", "method", "curvature", "growth", "cv", "nlp", "exactness", "scores", "all")
    parser.add_argument("what", choices=names)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results" / "benchmark", help="default: results/benchmark"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    parser.add_argument("--cifar100", default="data/cifar100", help="folder of CIFAR-100 (default: data/cifar100)")
    nlp = parser.add_argument_group("nlp and exactness")
    nlp.add_argument("--glue", default="data/glue", help="folder with RTE/train.tsv and so on (default: data/glue)")
    nlp.add_argument(
        "--model",
        default="nreimers/MiniLM-L6-H384-uncased",
        help="pretrained encoder, a folder or a hub name (default: %(default)s)",
    )
    nlp.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"default: {' '.join(TASKS)}")
    nlp.add_argument("--seeds", type=int, default=2, help="trainings by each loop (default: 2)")
    nlp.add_argument(
        "--block",
        type=int,
        default=8,
        help="steps between turns, a training is 7 x BLOCK (default: 8; 11: RTE's epoch)",
    )
    nlp.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of both loops (default: bf16)")
    args = parser.parse_args()
    for name in ("seeds", "block"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    check_writable("--output", args.output)
    repair_torchvision()

    def wanted(name: str) -> bool:
        return args.what in (name, "all")

    if wanted("startup"):
        from scripts.lib.benchmark import startup

        print(startup.run(args.output, args.quick), flush=True)
    if wanted("method"):
        from scripts.lib.benchmark import method

        print(method.run(args.output, args.quick), flush=True)
    if wanted("curvature"):
        from scripts.lib.benchmark import curvature

        print(curvature.run(args.output, args.quick), flush=True)
    if wanted("growth"):
        from scripts.lib.benchmark import growth

        print(growth.run(args.output, args.quick), flush=True)
    if wanted("cv"):
        from scripts.lib.benchmark import loops

        print(loops.run(args.output, args.quick, args.cifar100), flush=True)
    if wanted("nlp"):
        from scripts.lib.benchmark import glue

        bf16 = args.precision == "bf16"
        work = (args.glue, args.model, args.tasks, args.seeds, args.block, bf16)
        print(glue.run(args.output, args.quick, *work), flush=True)
    if wanted("exactness"):
        from scripts.lib.benchmark import exactness

        print(exactness.run(args.output, args.quick, args.cifar100, args.glue, args.model), flush=True)
    if wanted("scores"):
        from scripts.lib.benchmark import scores

        print(scores.run(args.output, args.quick, args.cifar100), flush=True)


if __name__ == "__main__":
    run_cli(main)
