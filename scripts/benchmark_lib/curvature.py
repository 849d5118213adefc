"""What the basis `curvature` adds to a training step when curvature and gradient are renewed in every step."""

from dataclasses import replace
from pathlib import Path

import torch

from benchmark_lib.method import cost_per_step, parts, resnet_case
from benchmark_lib.timing import interleaved, summary, table, write


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
    cost = cost_per_step(medians, case)
    share = cost / medians["step"]
    path = write("curvature", {"case": case.name, "seconds": seconds, "share_of_step": share}, folder)
    names = {"step": "training step", "choose directions": "curvature", "expand": "gradient", "held": "held loss"}
    row = {"recipe": case.name, **{f"{names[name]}, s": f"{median:.3g}" for name, median in medians.items()}}
    return f"{table([row | {'share': f'{100 * share:.2f}%'}])}\n\n{path}"
