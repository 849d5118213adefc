"""How close trained students came to their teachers' weights, and how large their own are: a line a run.

python -m scripts.study.weights outputs/reproduce/*-seed1-* --output results/start/weights.csv
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from common.matrices import as_matrix
from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable, write_text
from common.torchvision_repair import repair_torchvision
from scripts.lib.report.load import load_run
from scripts.lib.report.networks import Pairs, has_networks, weight_pairs


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="finished runs; without a teacher: left out"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="a CSV file for the same lines")
    args = parser.parse_args()
    if args.output:
        check_writable("--output", args.output.parent)
        if args.output.is_dir():
            raise UserError(f"--output {args.output} is a folder; give the name of a file")
    repair_torchvision()
    lines = []
    for folder in args.folders:
        run = load_run(folder)
        if has_networks(run):
            try:
                found = closeness(weight_pairs(run))
            except torch.linalg.LinAlgError as error:
                raise UserError(f"{folder}: the student's weights are not finite") from error
            lines.append({"run": folder.name, "method": run.method, "seed": run.seed, **found})
    if not lines:
        raise UserError("none of the folders has a student and names a teacher")
    table = pd.DataFrame(lines)
    print(table.to_string(index=False, float_format="%.3f"))
    if args.output:
        write_text(args.output, table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))


def closeness(pairs: Pairs) -> dict[str, float]:
    """Mean, lowest and highest cosine of W_s and W_t over the pairs; means of ||W_s - W_t||_F / ||W_t||_F, of ||W_s||_F
    and of the largest singular value of W_s."""
    rows = []
    for _, *weights in pairs:
        student, teacher = (as_matrix(weight.detach()).double() for weight in weights)
        row = {"sigma_1": torch.linalg.matrix_norm(student, 2), "norm": student.norm()}
        row["cosine"] = (student * teacher).sum() / (student.norm() * teacher.norm())
        rows.append(row | {"distance": (student - teacher).norm() / teacher.norm()})
    table = pd.DataFrame(rows).astype(float)
    means, bounds = table.mean(), {"lowest": table["cosine"].min(), "highest": table["cosine"].max()}
    return {"cosine": means["cosine"], **bounds, **means[["distance", "norm", "sigma_1"]]}


if __name__ == "__main__":
    run_cli(main)
