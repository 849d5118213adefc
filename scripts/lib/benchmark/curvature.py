"""What the basis `curvature` adds to a training step, renewed in every step as in its recipe, and less often."""

from pathlib import Path

from scripts.lib.benchmark.method import CIFAR, cost_per_step, parts, resnet_case
from scripts.lib.benchmark.timing import medians, summaries, table, write

OFTEN = {**CIFAR, "basis": "curvature", "svd_steps": 1, "grad_steps": 1, "drift": 0.0}
RARER = {**OFTEN, "svd_steps": 4, "grad_steps": 2}  # a row of configs/tables/cifar100_few_ablation.yaml


def run(folder: Path, quick: bool) -> str:
    """ResNet56 -> ResNet20; writes curvature.json, returns the table."""
    case = resnet_case(4 if quick else 64)
    _, works = parts(case, **OFTEN)
    repeats = 2 if quick else 20
    # the step by itself and last: it clears the gradients, of which the curvature is made
    seconds = summaries(works, repeats) | summaries({"step": case.step}, repeats)
    typical = medians(seconds)
    share, share_rarer = (cost_per_step(typical, settings) / typical["step"] for settings in (OFTEN, RARER))
    shares = {"share_of_step": share, "share_of_step_svd_steps_4_grad_steps_2": share_rarer}
    path = write("curvature", {"case": case.name, "seconds": seconds, **shares}, folder)
    names = {"step": "training step", "choose directions": "curvature", "expand": "gradient", "held": "held loss"}
    row = {"recipe": case.name, **{f"{names[name]}, s": f"{median:.3g}" for name, median in typical.items()}}
    row |= {"share": f"{100 * share:.2f}%", "share, curvature every 4 steps": f"{100 * share_rarer:.2f}%"}
    return f"{table([row])}\n\n{path}"
