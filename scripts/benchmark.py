"""What DSKD and the training loops cost, each beside a rival in the same run; writes results/benchmark/*.json.

python scripts/benchmark.py method      DSKD's share of a training step, and against an SVD in every step
python scripts/benchmark.py cv          images per second beside the toolkits' loop (needs CIFAR-100)
python scripts/benchmark.py all         both
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nlp" / "BERT-of-Theseus"))

from common.errors import Parser, run_cli
from common.torchvision_repair import repair_torchvision

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("method", "cv", "all"))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results" / "benchmark", help="default: results/benchmark"
    )
    parser.add_argument("--cifar100", default="data/cifar100", help="folder of CIFAR-100 (default: data/cifar100)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    args = parser.parse_args()
    repair_torchvision()
    from benchmark_lib import loops, method

    if args.what in ("method", "all"):
        print(method.run(args.output, args.quick), flush=True)
    if args.what in ("cv", "all"):
        print(loops.run(args.output, args.quick, args.cifar100), flush=True)


if __name__ == "__main__":
    run_cli(main)
