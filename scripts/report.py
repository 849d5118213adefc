"""What a run did, in pictures: one HTML file that needs nothing else. `--help` explains every flag.

python scripts/report.py outputs/digits/kd_resnet20_resnet8_dskd/seed1
python scripts/report.py DIR1 DIR2 --output comparison.html
"""

import argparse
from pathlib import Path

import _paths  # noqa: F401

from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable, write_text
from common.torchvision_repair import repair_torchvision
from scripts.lib.report.load import load_run
from scripts.lib.report.page import report


def build_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="OUTPUT_DIR",
        help="output folder of a run of either pipeline, finished or not; several are compared with each other",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the HTML file (default: OUTPUT_DIR/report.html)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    repair_torchvision()
    if len(args.folders) > 1 and args.output is None:
        raise UserError("several folders need --output, the file to write")
    output = args.output or args.folders[0] / "report.html"
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file")
    check_writable("--output" if args.output else "OUTPUT_DIR", output.parent)
    write_text(output, report([load_run(folder) for folder in args.folders]))
    print(f"written: {output}")


if __name__ == "__main__":
    run_cli(main)
