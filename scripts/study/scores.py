"""How far the directions that the authors' release chooses are from the method's, while the vision recipe trains.

python -m scripts.study.scores --cifar100 data/cifar100

The teacher is the trained ResNet56 that cv/train_svd.py would find, except with --quick: random weights. Writes
scores.json.
"""

from pathlib import Path

import torch

from common.run.errors import run_cli
from dskd import direction_sensitivity, select_directions
from dskd.groups import Pairs
from dskd.matrices import as_matrix
from scripts.lib.benchmark.command import command, parse
from scripts.lib.benchmark.timing import table, write
from scripts.study.held_gradient import Plan

FULL = Plan(steps=500, batch=64, svd_steps=50)
QUICK = Plan(steps=4, batch=4, svd_steps=2)
NAMES = {
    "order": "scores in falling order, given to the largest singular values (CIFAR code)",
    "curvature": "curvature from diag(F1 diag(sigma^2) F2)",
}


def main() -> None:
    args = parse(command(__doc__, "--cifar100"))
    print(run(args.output, args.quick, args.cifar100))


class ScoreOverlaps:
    """Compares at every choice of directions; the methods are those of `HeldGradient`.

    pairs, rank, svd_steps: as of the loss of the run; total: planned steps.

    overlaps: sum(min(w, w')) of the method's direction weights w and those w' of each difference by itself, by name, a
    value per choice and pair; 1 is no difference, 0 means that no direction is shared.
    """

    def __init__(self, pairs: Pairs, rank: int, svd_steps: int, total: int):
        self.pairs, self.rank, self.svd_steps, self.total = pairs, rank, svd_steps, total
        self.overlaps: dict[str, list[float]] = {name: [] for name in NAMES}
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_step(self, step: int) -> None:
        if step % self.svd_steps == 0:
            self._before = [(W.detach().clone(), W.grad.clone()) for _, W, _ in self.pairs]

    def after_step(self, step: int) -> None:
        if step % self.svd_steps:
            return
        for (_, W, _), (start, grad) in zip(self.pairs, self._before, strict=True):
            dW, G = (as_matrix(matrix).double() for matrix in (W.detach() - start, grad))
            progress = (step - 1) / self.total
            ours = select_directions(direction_sensitivity(dW, G, progress), self.rank)
            others = {"order": ours.sort(descending=True).values, "curvature": self._mixed_curvature(dW, G, progress)}
            for name, weights in others.items():
                self.overlaps[name].append(torch.minimum(ours, weights).sum().item())

    def _mixed_curvature(self, dW: torch.Tensor, G: torch.Tensor, progress: float) -> torch.Tensor:
        """Direction weights with sum_j F1_ij sigma_j^2 F2_ji in the place of sigma_i^2 F1_ii F2_ii."""
        U, sigma, Vh = torch.linalg.svd(dW, full_matrices=False)
        F1, F2 = U.mT @ G @ G.mT @ U, Vh @ G.mT @ G @ Vh.mT
        mixed = (F1 * sigma.square() @ F2).diagonal()
        first = direction_sensitivity(dW, G, 0.0)
        return select_directions((1 - progress) * first + progress * mixed / mixed.sum(), self.rank)


def run(folder: Path, quick: bool, cifar100: str) -> str:
    """Trains ResNet56 -> ResNet20 with DSKD, arguments as of the command line; returns the table."""
    from scripts.study.observed_runs import observe_cv

    plan = QUICK if quick else FULL
    observed, case = observe_cv(
        plan, cifar100, quick, lambda pairs, dskd: ScoreOverlaps(pairs, dskd.reading.rank, plan.svd_steps, plan.steps)
    )
    values = {name: torch.tensor(found) for name, found in observed.overlaps.items()}
    overlaps = {name: {"mean": v.mean().item(), "worst": v.min().item(), "n": len(v)} for name, v in values.items()}
    path = write("scores", {**case, "overlap_of_the_direction_weights": overlaps}, folder)
    rows = [
        {
            "in the release": NAMES[name],
            "overlap, mean (worst)": f"{o['mean']:.3f} ({o['worst']:.3f})",
            "n": str(o["n"]),
        }
        for name, o in overlaps.items()
    ]
    return f"{table(rows)}\n\n{path}"


if __name__ == "__main__":
    run_cli(main)
