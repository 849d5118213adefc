"""What the basis `curvature` adds to a training step, renewed in every step as in its recipe, and less often."""

from dataclasses import replace
from pathlib import Path

import torch

from scripts.lib.benchmark.method import cost_per_step, parts, resnet_case
from scripts.lib.benchmark.timing import interleaved, summary, table, write


def run(folder: Path, quick: bool) -> str:
    """ResNet56 -> ResNet20; writes curvature.json, returns the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = resnet_case(4 if quick else 64, device)
    case = replace(case, basis="curvature", svd_steps=1, grad_steps=1, drift=0.0)
    _, works = parts(case)
    repeats = 2 if quick else 20
    # the step by itself and last: it clears the gradients, of which the curvature is made
    timed = interleaved(works, repeats) | interleaved({"step": case.step}, repeats)
    seconds = {name: summary(values) for name, values in timed.items()}
    medians = {name: values["median"] for name, values in seconds.items()}
    share = cost_per_step(medians, case) / medians["step"]
    rarer = replace(case, svd_steps=4, grad_steps=2)  # a row of configs/tables/cifar100_few_ablation.yaml
    share_rarer = cost_per_step(medians, rarer) / medians["step"]
    shares = {"share_of_step": share, "share_of_step_svd_steps_4_grad_steps_2": share_rarer}
    path = write("curvature", {"case": case.name, "seconds": seconds, **shares}, folder)
    names = {"step": "training step", "choose directions": "curvature", "expand": "gradient", "held": "held loss"}
    row = {"recipe": case.name, **{f"{names[name]}, s": f"{median:.3g}" for name, median in medians.items()}}
    row |= {"share": f"{100 * share:.2f}%", "share, curvature every 4 steps": f"{100 * share_rarer:.2f}%"}
    return f"{table([row])}\n\n{path}"
