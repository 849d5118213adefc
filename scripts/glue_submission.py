"""The predictions of several tasks as the zip that gluebenchmark.com takes. `--help` explains every flag.

python scripts/glue_submission.py outputs/cola outputs/rte outputs/mnli ... --output submission.zip
"""

import argparse
import io
import zipfile
from pathlib import Path

import _paths  # noqa: F401

from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable, write_aside
from common.run.reading import read_text

# the files of a submission, and how many examples their test sets have
ROWS = {
    "CoLA.tsv": 1063,
    "SST-2.tsv": 1821,
    "MRPC.tsv": 1725,
    "STS-B.tsv": 1379,
    "QQP.tsv": 390_965,
    "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463,
    "RTE.tsv": 3000,
    "WNLI.tsv": 146,
    "AX.tsv": 1104,
}
_DAY = (1980, 1, 1, 0, 0, 0)  # of every file: the same predictions give the same zip


def build_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="OUTPUT_DIR",
        help="output folder of a run of the text program with --do_predict, or any folder with such files",
    )
    parser.add_argument("--output", type=Path, default=Path("submission.zip"), metavar="FILE", help="the zip to write")
    return parser


def collect(folders: list[Path]) -> dict[str, str]:
    """File name -> its text, of all files in the order of `ROWS`.

    Raises:
        UserError: a file is in no folder or in two of them, or is not what the server takes.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for path in (place / name for place in (folder, folder / "predictions") for name in ROWS):
            if path.is_file():
                if path.name in found:
                    raise UserError(f"{path.name} is there twice, {found[path.name]} and {path}; leave one of them out")
                found[path.name] = path
    texts = {name: _checked(found[name]) for name in ROWS if name in found}
    if missing := [name for name in ROWS if name not in found]:
        raise UserError(
            f"no zip is written: the server needs all {len(ROWS)} files, and these are missing: {', '.join(missing)}; "
            "--do_predict writes the one of a task, and with MNLI AX.tsv"
        )
    return texts


def _checked(path: Path) -> str:
    text = read_text(path)
    header, *lines = text.splitlines()[: ROWS[path.name] + 2] or [""]
    if header != "index\tprediction":
        raise UserError(f"{path}: its first line is {header!r:.60}, index and prediction with a tab are expected")
    for index, line in enumerate(lines):
        number, tab, prediction = line.partition("\t")
        if number != str(index) or not tab or not prediction.strip() or "\t" in prediction:
            raise UserError(f"{path} line {index + 2}: {line!r:.60}; {index}, a tab and a prediction are expected")
    if len(lines) != ROWS[path.name]:
        count = len(text.splitlines()) - 1
        raise UserError(f"{path} has {count:,} predictions, the test set {ROWS[path.name]:,} examples")
    return text


def main() -> None:
    args = build_parser().parse_args()
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder; give a file")
    check_writable("--output", args.output.parent)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in collect(args.folders).items():
            archive.writestr(zipfile.ZipInfo(name, _DAY), text, zipfile.ZIP_DEFLATED)
    write_aside(args.output, lambda path: path.write_bytes(buffer.getvalue()))
    print(f"written: {args.output}, {len(ROWS)} files")


if __name__ == "__main__":
    run_cli(main)
