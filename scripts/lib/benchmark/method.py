"""What DSKD adds to a training step: the held loss in every step, its refreshes shared over the steps between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.settings import HELD_STEPS, SETTINGS, by_name
from common.svd_loss import build_loss
from cv.allocator import keep_freed_memory
from cv.dskd import block_map
from cv.models import build_model
from dskd import DirectionSensitivityLoss, pair_weights
from dskd.groups import Pairs
from dskd.matrices import DRIVERS
from dskd.readings.curvature import FACTORS
from scripts.lib.benchmark import tables
from scripts.lib.benchmark.loops import OurLoop, random_images
from scripts.lib.benchmark.timing import summaries, write

# the defaults of the two programs, by the settings' names
GLUE = by_name({setting.dest: setting.glue for setting in SETTINGS})
GLUE["grad_steps"] = HELD_STEPS
CIFAR = by_name({setting.key: setting.cifar for setting in SETTINGS})


@dataclass
class Case:
    """A recipe: its matched weights, one training step without DSKD, and DSKD's settings."""

    name: str
    pairs: Pairs
    step: Callable[[], None]
    settings: Mapping[str, Any]


def bert_case(batch: int, length: int, device: str, **sizes: int) -> Case:
    """BERT-base 12 -> 6 by module replacing, half of the modules replaced, random weights and tokens.

    sizes: settings of BertConfig that replace BERT-base's.
    """
    from transformers import BertConfig, BertForSequenceClassification

    from bert_of_theseus.modeling import TheseusModel

    model = TheseusModel(BertForSequenceClassification(BertConfig(**sizes)), 6, seed=0).to(device).train()
    model.replacing_probability = 0.5
    tokens = torch.randint(30522, (batch, length), device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)

    def step() -> None:
        model(input_ids=tokens, labels=labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return Case(f"BERT-base 12 -> 6, batch {batch} x {length}", model.pairs(), step, GLUE)


def resnet_case(batch: int, names: tuple[str, str] = ("resnet56", "resnet20"), size: int = 32) -> Case:
    """A teacher and a student by KD, random images of `size` pixels."""
    teacher, student = (build_model(name, 100) for name in names)
    loop = OurLoop(student, teacher, random_images(batch, size), batch)
    pairs = pair_weights(student, teacher, block_map(student, teacher))
    names = " -> ".join(name.replace("resnet", "ResNet") for name in names)
    name = f"{names}, batch {batch}" + ("" if size == 32 else f", {size}x{size} pixels")
    return Case(name, pairs, lambda: loop.run(1), CIFAR)


def parts(case: Case, **changed: Any) -> tuple[DirectionSensitivityLoss, dict[str, Callable[[], object]]]:
    """The loss after a first choice of directions, and by name the things that it does, to be timed."""
    dskd = build_loss(case.pairs, {**case.settings, **changed}, seed=0)
    updates = [1e-5 * torch.randn_like(student) for student in dskd.students]  # AdamW-like in size
    for student in dskd.students:
        student.grad = torch.randn_like(student)

    def choose_directions() -> None:
        dskd.steps += dskd.svd_steps - 1  # the coming step chooses
        with dskd.observe(progress=0.5), torch.no_grad():
            # the optimizer's part, which is no cost of DSKD, but small beside it
            torch._foreach_add_(dskd.students, updates)

    def expand() -> None:
        dskd.held = None
        dskd.gradients()

    def held() -> None:
        (0.1 * dskd()).backward()

    choose_directions()
    works = {"choose directions": choose_directions, "expand": expand, "held": held}
    if dskd.drift:
        works["look at the drift"] = lambda: dskd.held.has_drifted(dskd.students, dskd.drift)
    return dskd, works


def cost_per_step(seconds: Mapping[str, float], settings: Mapping[str, Any]) -> float:
    """The held loss in every step, and the refreshes shared over the steps between them, as if all were drifting."""
    expansion = seconds["expand"] + seconds.get("look at the drift", 0.0)
    return seconds["held"] + expansion / settings["grad_steps"] + seconds["choose directions"] / settings["svd_steps"]


def per_step_svd_loss(pairs: Pairs, weights: Mapping[str, Tensor]) -> Tensor:
    """The rival: the mean of || W~_s - W~_t ||_F^2 over the pairs, by a full SVD of both, with autograd through it."""
    losses = []
    for name, student, teacher in pairs:
        aligned = []
        for matrix in (student.flatten(1), teacher.detach().flatten(1)):
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            aligned.append((U * (weights[name].sqrt() * S)) @ Vh)
        losses.append((aligned[0] - aligned[1]).square().sum())
    return torch.stack(losses).mean()


def svd_in_every_step(case: Case, dskd: DirectionSensitivityLoss) -> Callable[[], None]:
    """A step of the rival along the loss's directions, forward and backward."""
    weights = dskd.direction_weights()
    return lambda: (0.1 * per_step_svd_loss(case.pairs, weights)).backward()


def measure(case: Case, repeats: int) -> dict:
    """Seconds of every part by every driver, DSKD's share of a step, and the ratio to the SVD in every step."""
    dskd, works = parts(case)
    for driver in DRIVERS:
        if driver != case.settings["driver"]:
            found = parts(case, driver=driver)[1]
            works |= {f"{name}, {driver}": found[name] for name in ("choose directions", "expand")}
    works["per-step SVD"] = svd_in_every_step(case, dskd)
    seconds = summaries(works, repeats) | summaries({"step": case.step}, repeats)
    typical = tables.medians(seconds)
    cost = cost_per_step(typical, case.settings)
    size = sum(4 * student.numel() for student in dskd.students)
    kept = storages([dskd.state_dict(), [(group.targets, group.former) for group in dskd.groups]])
    return {
        "case": case.name,
        "pairs": len(case.pairs),
        "settings": {key: case.settings[key] for key in ("rank", "svd_steps", "grad_steps", "drift", "driver")},
        "seconds": seconds,
        "dskd_seconds_per_step": cost,
        "share_of_step": cost / typical["step"],
        "per_step_svd_over_dskd": typical["per-step SVD"] / cost,
        "kept_copies_of_matched_weights": sum(storage.nbytes() for storage in kept.values()) / size,
        "copies_at_the_peak_of_a_refresh": _peak_of_a_refresh(case) / size,
    }


def run(folder: Path, quick: bool) -> str:
    """Both recipes; returns the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = {"hidden_size": 48, "intermediate_size": 64}
    results = [measure(bert_case(2, 16, device, **tiny), 1) if quick else measure(bert_case(32, 128, device), 3)]
    keep_freed_memory()  # as the program for images does, and that for text does not
    results.append(measure(resnet_case(4), 2) if quick else measure(resnet_case(64), 20))
    found = {"results": results}
    path = write("method", found, folder)
    return f"{tables.method(found)}\n\n{path}"


def run_curvature(folder: Path, quick: bool) -> str:
    """Three recipes along the curvature, renewed and applied in every step or less often; the table."""
    keep_freed_memory()
    few, all_images = (4, 4) if quick else (50, 64)
    recipes = [
        resnet_case(few, ("resnet20", "resnet8"), 16),  # the table cifar100_few_renewal
        resnet_case(few, ("resnet56", "resnet8")),  # the table cifar100_few_56_maps
        resnet_case(all_images),
    ]
    cases = [_along_the_curvature(case, 2 if quick else 20) for case in recipes]
    found = {"cases": cases}
    path = write("curvature", found, folder)
    return f"{tables.curvature(found)}\n\n{path}"


def _along_the_curvature(case: Case, repeats: int) -> dict:
    settings = {**CIFAR, "basis": "curvature", "svd_steps": 1, "grad_steps": 1}
    works = {
        f"{name}, {factors}": work
        for factors in FACTORS
        for name, work in parts(case, **{**settings, "factors": factors})[1].items()
    }
    # the step by itself and last: it clears the gradients, of which the curvature is made
    seconds = summaries(works, repeats) | summaries({"step": case.step}, repeats)
    typical, shares = tables.medians(seconds), {}
    for factors in FACTORS:
        of_these = {name.removesuffix(f", {factors}"): value for name, value in typical.items()}
        for every in (1, 2, 4, 8):
            cost = cost_per_step(of_these, {"svd_steps": every, "grad_steps": every})
            shares[f"{factors} {every}"] = cost / typical["step"]
    return {"case": case.name, "seconds": seconds, "share_of_step": shares}


def _peak_of_a_refresh(case: Case) -> int:
    """Bytes that a loss made from nothing needs at most in a choice and the expansion after it, above what there was.

    Those of the tensors at the moment when most of them are alive.
    """

    def work() -> None:
        _, works = parts(case)
        works["expand"]()
        works["choose directions"]()
        works["expand"]()

    inputs = sum(2 * student.nbytes for _, student, _ in case.pairs)  # the update and the gradient that `parts` draws
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - inputs
    with _Alive() as alive:
        work()
    return alive.peak - inputs


def storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors in nested containers, once where several share it."""
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in found}


class _Alive(TorchDispatchMode):
    """Follows the storages of new tensors. On the host resident memory says less: malloc keeps what is freed."""

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for key, storage in storages(result).items():
            if key not in given:
                self._storages[key] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result
