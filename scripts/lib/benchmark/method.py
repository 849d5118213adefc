"""What DSKD adds to a training step: the held loss in every step, its refreshes shared over the steps between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.matrices import DRIVERS
from common.svd_loss import DirectionSensitivityLoss
from cv.dskd import block_map
from cv.models import build_model
from scripts.lib.benchmark.memory import peak_above
from scripts.lib.benchmark.per_step_svd import per_step_svd_loss
from scripts.lib.benchmark.timing import interleaved, summary, table, write


@dataclass
class Case:
    """A recipe: its matched weights, one training step without DSKD, and DSKD's settings."""

    name: str
    pairs: list[tuple[str, Tensor, Tensor]]
    step: Callable[[], None]
    rank: int
    grad_steps: int
    drift: float = 0.0
    driver: str = "gram"
    svd_steps: int = 100
    basis: str = "own"


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

    return Case(
        f"BERT-base 12 -> 6, batch {batch} x {length}",
        model.pairs(),
        step,
        rank=32,
        grad_steps=100,
        driver="randomized",
    )


def resnet_case(batch: int, device: str) -> Case:
    """ResNet56 -> ResNet20 by KD, random images."""
    from cv.methods import build_distiller, method_defaults

    student, teacher = (build_model(name, 100).to(device) for name in ("resnet20", "resnet56"))
    kd = build_distiller(
        "kd", student, teacher, method_defaults().KD, num_classes=100, image_shape=(3, 32, 32), num_train=batch
    ).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels, indices = torch.zeros(batch, dtype=torch.long, device=device), torch.arange(batch, device=device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        sum(kd(images, labels, indices)[1].values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    names = block_map(student, teacher)
    pairs = [(s, student.get_submodule(s).weight, teacher.get_submodule(t).weight) for s, t in names]
    return Case(f"ResNet56 -> ResNet20, batch {batch}", pairs, step, rank=0, grad_steps=2, drift=0.0003)


def parts(case: Case, driver: str | None = None) -> tuple[DirectionSensitivityLoss, dict[str, Callable[[], None]]]:
    """The loss after a first choice of directions, and by name the things that it does, to be timed."""
    students = [student for _, student, _ in case.pairs]
    settings = {"grad_steps": case.grad_steps, "drift": case.drift, "driver": driver or case.driver}
    settings |= {"basis": case.basis}
    dskd = DirectionSensitivityLoss(case.pairs, case.rank, case.svd_steps, **settings)
    updates = [1e-5 * torch.randn_like(student) for student in students]  # AdamW-like in size
    for student in students:
        student.grad = torch.randn_like(student)

    def choose_directions() -> None:
        dskd.steps = case.svd_steps - 1
        with dskd.observe(progress=0.5), torch.no_grad():
            for student, update in zip(students, updates, strict=True):
                student.add_(update)  # the optimizer's part, which is no cost of DSKD, but small beside it

    def expand() -> None:
        dskd._held = None
        with torch.no_grad():
            dskd()

    def held() -> None:
        (0.1 * dskd()).backward()

    choose_directions()
    works = {"choose directions": choose_directions, "expand": expand, "held": held}
    return dskd, works | ({"look at the drift": dskd._has_moved} if case.drift else {})


def cost_per_step(seconds: Mapping[str, float], case: Case) -> float:
    """The held loss in every step, and the refreshes shared over the steps between them, as if all were drifting."""
    expansion = seconds["expand"] + seconds.get("look at the drift", 0.0)
    return seconds["held"] + expansion / case.grad_steps + seconds["choose directions"] / case.svd_steps


def measure(case: Case, repeats: int) -> dict:
    """Seconds of every part by every driver, DSKD's share of a step, and the ratio to the SVD in every step."""
    dskd, works = parts(case)
    weights = dskd.direction_weights()
    for driver in DRIVERS:
        if driver != dskd.driver:
            found = parts(case, driver)[1]
            works |= {f"{name}, {driver}": found[name] for name in ("choose directions", "expand")}
    works["per-step SVD"] = lambda: (0.1 * per_step_svd_loss(case.pairs, weights)).backward()
    seconds = {name: summary(values) for name, values in interleaved(works, repeats).items()}
    seconds["step"] = summary(interleaved({"step": case.step}, repeats)["step"])
    medians = {name: values["median"] for name, values in seconds.items()}
    cost = cost_per_step(medians, case)
    elements = sum(student.numel() for _, student, _ in case.pairs)
    return {
        "case": case.name,
        "pairs": len(case.pairs),
        "settings": {key: getattr(case, key) for key in ("rank", "svd_steps", "grad_steps", "drift", "driver")},
        "seconds": seconds,
        "dskd_seconds_per_step": cost,
        "share_of_step": cost / medians["step"],
        "per_step_svd_over_dskd": medians["per-step SVD"] / cost,
        "kept_copies_of_matched_weights": sum(tensor.numel() for tensor in _kept(dskd)) / elements,
        "copies_at_the_peak_of_a_refresh": _peak_of_a_refresh(case) / (4 * elements),
    }


def run(folder: Path, quick: bool) -> str:
    """Both recipes; returns the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"hidden_size": 48, "intermediate_size": 64} if quick else {}
    results = [
        measure(bert_case(2 if quick else 32, 16 if quick else 128, device, **sizes), 1 if quick else 3),
        measure(resnet_case(4 if quick else 64, device), 2 if quick else 20),
    ]
    path = write("method", {"results": results}, folder)
    rows = [
        {
            "recipe": result["case"],
            "training step, s": f"{result['seconds']['step']['median']:.4g}",
            "DSKD, s a step": f"{result['dskd_seconds_per_step']:.3g}",
            "share": f"{100 * result['share_of_step']:.2f}%",
            "SVD in every step / DSKD": f"{result['per_step_svd_over_dskd']:.0f}x",
            "extra copies of the matched weights: kept": f"{result['kept_copies_of_matched_weights']:.2f}",
            "at a refresh": f"{result['copies_at_the_peak_of_a_refresh']:.2f}",
        }
        for result in results
    ]
    return f"{table(rows)}\n\n{path}"


def _peak_of_a_refresh(case: Case) -> int:
    """Bytes that a loss made from nothing needs at most in a choice and the expansion after it."""

    def work() -> None:
        _, works = parts(case)
        works["expand"]()
        works["choose directions"]()
        works["expand"]()

    inputs = sum(2 * student.nbytes for _, student, _ in case.pairs)  # the update and the gradient that `parts` draws
    return peak_above(work) - inputs


def _kept(dskd: DirectionSensitivityLoss) -> list[Tensor]:
    """Everything that the loss keeps between steps."""
    return _tensors([dskd.state_dict(), [group.teacher_V for group in dskd._groups]])


def _tensors(tree) -> list[Tensor]:
    """The tensors in nested dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [tensor for branch in tree for tensor in _tensors(branch)] if isinstance(tree, list | tuple) else []
