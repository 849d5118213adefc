"""How close trained students came to their teachers' weights: a line a run.

python scripts/weights.py outputs/reproduce/*-seed1-* --output results/start/weights.csv
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nlp" / "BERT-of-Theseus"))

from common.errors import Parser, UserError, run_cli
from common.files import check_writable, write_text
from common.torchvision_repair import repair_torchvision
from scripts.report_lib.load import load_run
from scripts.report_lib.networks import has_networks, weight_pairs


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="finished runs; without a teacher: left out"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="a CSV file for the same lines")
    args = parser.parse_args()
    if args.output:
        check_writable("--output", args.output.parent)
    repair_torchvision()
    import pandas as pd

    lines = []
    for folder in args.folders:
        run = load_run(folder)
        if has_networks(run):
            lines.append({"run": folder.name, "method": run.method, "seed": run.seed, **closeness(weight_pairs(run))})
    if not lines:
        raise UserError("none of the folders has a student and names a teacher")
    table = pd.DataFrame(lines)
    print(table.to_string(index=False, float_format="%.3f"))
    if args.output:
        write_text(args.output, table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))


def closeness(pairs) -> dict[str, float]:
    """Mean, lowest and highest cosine of W_s and W_t over the pairs, and mean ||W_s - W_t||_F / ||W_t||_F."""
    cosines, distances = [], []
    for _, student, teacher in pairs:
        student, teacher = student.detach().double().flatten(), teacher.detach().double().flatten()
        cosines.append(float(student @ teacher / (student.norm() * teacher.norm())))
        distances.append(float((student - teacher).norm() / teacher.norm()))
    count = len(cosines)
    return {
        "cosine": sum(cosines) / count,
        "lowest": min(cosines),
        "highest": max(cosines),
        "distance": sum(distances) / count,
    }


if __name__ == "__main__":
    run_cli(main)
