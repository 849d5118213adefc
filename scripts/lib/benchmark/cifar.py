"""The CIFAR loop: images per second and memory beside the plain loop, parts of a step, several runs at once."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import torch

from common.run.processes import cores
from cv.allocator import keep_freed_memory
from cv.data import load_dataset
from cv.dskd import block_map
from dskd import pair_weights
from scripts.lib.benchmark import loops, method, tables
from scripts.lib.benchmark.loops import CIFAR_IMAGES, LOOPS, PRECISIONS, OurLoop, Steps, build, random_images
from scripts.lib.benchmark.timing import interleaved, summaries, summary, write


def run(folder: Path, quick: bool, root: str) -> str:
    """KD of ResNet20 from ResNet56 at batch 64 in both precisions; returns the tables."""
    batch, steps, images, repeats = (8, 1, 64, 1) if quick else (64, 20, CIFAR_IMAGES, 7)
    here = partial(Steps, batch=batch, steps=steps, threads=torch.get_num_threads())
    rates = against_plain(partial(here, images=images if root == "random" else root), repeats)
    memory = {key: loops.peak_memory_apart(*key, batch, steps, images) for key in rates}
    number = 2 if torch.cuda.is_available() else cores()
    together = side_by_side(number, batch, steps, repeats)
    data = random_images(images) if root == "random" else load_dataset("cifar100", root)
    keep_freed_memory()
    results = {
        precision: {
            "images_per_second": {loop: rates[loop, precision] for loop in LOOPS},
            "ratio": rates["ours", precision]["median"] / rates["plain", precision]["median"],
            "peak_memory_bytes": {loop: memory[loop, precision] for loop in LOOPS},
            "step": shares(build("ours", data, batch, precision), steps),
            "runs": together[precision],
        }
        for precision in PRECISIONS
    }
    case = f"KD, ResNet56 -> ResNet20, batch {batch}" + ", random images" * (root == "random")
    found = {"case": case, "runs_at_once": number, "precisions": results}
    path = write("cv", found, folder)
    return "\n\n".join([tables.cv(found), tables.step(found), tables.runs(found), str(path)])


def against_plain(steps: Callable[..., Steps], repeats: int) -> dict[tuple[str, str], dict[str, float]]:
    """Images a second by loop and precision; each loop has a process, since ours changes how its process allocates."""
    with ExitStack() as stack:
        pools = {loop: [stack.enter_context(each) for each in loops.processes(1)] for loop in LOOPS}
        asked = {(loop, precision): steps(loop, precision) for precision in PRECISIONS for loop in LOOPS}
        works = {key: partial(loops.at_once, pools[key[0]], each) for key, each in asked.items()}
        seconds = interleaved(works, repeats)
    return {key: summary([each.steps * each.batch / value for value in seconds[key]]) for key, each in asked.items()}


def run_compiled(folder: Path, quick: bool) -> str:
    """Our loop with and without SOLVER.COMPILE, on random images; returns the table."""
    batch, steps, repeats = (4, 1, 1) if quick else (64, 20, 7)
    data, precisions = random_images(steps * batch), {}
    keep_freed_memory()
    for precision in PRECISIONS:
        built = {name: build(loop, data, batch, precision) for name, loop in (("eager", "ours"), ("compiled",) * 2)}
        # nothing that an earlier run has compiled
        with TemporaryDirectory() as cache, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
            first = interleaved({"compiled": partial(built["compiled"].run, 1)}, repeats=1, warmup=0)["compiled"][0]
            seconds = interleaved({name: partial(loop.run, steps) for name, loop in built.items()}, repeats)
        rates = {name: summary([steps * batch / value for value in values]) for name, values in seconds.items()}
        ratio = rates["compiled"]["median"] / rates["eager"]["median"]
        precisions[precision] = {"images_per_second": rates, "ratio": ratio, "first_step_seconds": first}
    found = {"case": f"KD, ResNet56 -> ResNet20, batch {batch}, random images", "precisions": precisions}
    path = write("compiled", found, folder)
    return f"{tables.compiled(found)}\n\n{path}"


def shares(loop: OurLoop, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of the parts of a step with DSKD, and the share of the step of each.

    DSKD has the program's defaults and works on the loop's own weights and gradients; its choices and exact gradients
    are shared over the steps between them. The trainer's log is left out: below 0.1 ms in a step.
    """
    works = step_parts(loop)
    pairs = pair_weights(loop.kd.student, loop.kd.teacher, block_map(loop.kd.student, loop.kd.teacher))
    _, dskd = method.parts(method.Case("", pairs, lambda: None, method.CIFAR))
    seconds = tables.medians(summaries(works | dskd, repeats))
    step = {name: seconds[name] for name in works} | {"DSKD": method.cost_per_step(seconds, method.CIFAR)}
    return {"seconds": seconds, "share": {name: value / sum(step.values()) for name, value in step.items()}}


def step_parts(loop: OurLoop) -> dict[str, Callable[[], None]]:
    """A step of the loop, to be called part by part in this order; the loop is of no other use afterwards."""
    teach, now = loop.kd.teacher.features, SimpleNamespace()
    loop.kd.teacher.features = lambda _: now.taught  # what the part "teacher" has found

    def data() -> None:
        now.batch = next(loop.batches)

    def teacher() -> None:
        with torch.no_grad(), loop.autocast():
            now.taught = teach(now.batch[0])

    def student() -> None:
        now.loss = loop.loss(now.batch)

    def backward() -> None:
        loop.optimizer.zero_grad(set_to_none=True)  # not before: DSKD has had the last step's gradients
        now.loss.backward()

    works = {"data": data, "teacher": teacher, "student": student, "backward": backward}
    return works | {"optimizer": loop.optimizer.step}


def side_by_side(number: int, batch: int, steps: int, repeats: int) -> dict[str, dict]:
    """Images a second by precision: one run with `number` threads, and `number` runs with one thread, all together."""
    with ExitStack() as stack:
        one, many = ([stack.enter_context(each) for each in loops.processes(count)] for count in (1, number))
        kinds = {"one": (one, number), "many": (many, 1)}
        works = {
            (precision, kind): partial(
                loops.at_once, pools, Steps("ours", precision, batch, steps, threads, images=steps * batch)
            )
            for precision in PRECISIONS
            for kind, (pools, threads) in kinds.items()
        }
        seconds = interleaved(works, repeats)
    found = {}
    for precision in PRECISIONS:
        rates = {
            kind: summary([len(pools) * steps * batch / value for value in seconds[precision, kind]])
            for kind, (pools, _) in kinds.items()
        }
        ratio = rates["many"]["median"] / rates["one"]["median"]
        found[precision] = {"images_per_second": rates, "ratio": ratio}
    return found
