"""The command line that the benchmark and the studies of real training share."""

import argparse
from pathlib import Path

from common import ROOT
from common.run.errors import Parser
from common.run.files import check_writable
from common.torchvision_repair import repair_torchvision

# by flag the default, and what it is
_DATA = {
    "--cifar100": ("data/cifar100", "folder of CIFAR-100"),
    "--glue": ("data/glue", "folder with RTE/train.tsv and so on"),
    "--model": ("nreimers/MiniLM-L6-H384-uncased", "pretrained encoder, a folder or a hub name"),
}


def command(description: str, *data: str) -> Parser:
    """A parser with --output, --quick and some flags for data and model."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = ROOT / "results" / "benchmark"
    parser.add_argument("--output", type=Path, default=output, help="default: results/benchmark")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    for flag in data:
        default, what = _DATA[flag]
        parser.add_argument(flag, default=default, help=f"{what} (default: {default})")
    return parser


def parse(parser: Parser) -> argparse.Namespace:
    """The arguments, of which the output is sure to be writable; torchvision can be imported afterwards."""
    args = parser.parse_args()
    check_writable("--output", args.output)
    repair_torchvision()
    return args
