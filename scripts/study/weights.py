"""How close trained students came to their teachers' weights, and how large their own are: a line a run.

python -m scripts.study.weights outputs/reproduce/*-seed1-* --output results/start/weights.csv
"""

import argparse
from pathlib import Path

import torch

from common.matrices import as_matrix
from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable, write_text
from common.torchvision_repair import repair_torchvision
from scripts.lib.report.load import load_run
from scripts.lib.report.networks import has_networks, weight_pairs


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
    import pandas as pd

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


def closeness(pairs) -> dict[str, float]:
    """Mean, lowest and highest cosine of W_s and W_t over the pairs; means of ||W_s - W_t||_F / ||W_t||_F, of ||W_s||_F
    and of the largest singular value of W_s."""
    cosines, distances, norms, largest = [], [], [], []
    for _, student, teacher in pairs:
        largest.append(float(torch.linalg.matrix_norm(as_matrix(student.detach()).double(), 2)))
        student, teacher = student.detach().double().flatten(), teacher.detach().double().flatten()
        norms.append(float(student.norm()))
        cosines.append(float(student @ teacher / (student.norm() * teacher.norm())))
        distances.append(float((student - teacher).norm() / teacher.norm()))
    count = len(cosines)
    return {
        "cosine": sum(cosines) / count,
        "lowest": min(cosines),
        "highest": max(cosines),
        "distance": sum(distances) / count,
        "norm": sum(norms) / count,
        "sigma_1": sum(largest) / count,
    }


if __name__ == "__main__":
    run_cli(main)
