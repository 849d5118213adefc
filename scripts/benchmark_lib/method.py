"""What DSKD adds to a training step: the held loss in every step, its refreshes shared over the steps between them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmark_lib.per_step_svd import per_step_svd_loss
from benchmark_lib.timing import interleaved, summary, table, write
from common.svd_loss import DirectionSensitivityLoss
from cv.dskd import block_map
from cv.models import build_model


@dataclass
class Case:
    """A recipe: its matched weights, one training step without DSKD, and DSKD's settings."""

    name: str
    pairs: list[tuple[str, Tensor, Tensor]]
    step: Callable[[], None]
    rank: int
    grad_steps: int
    svd_steps: int = 100


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

    return Case(f"BERT-base 12 -> 6, batch {batch} x {length}", model.pairs(), step, rank=32, grad_steps=100)


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
    return Case(f"ResNet56 -> ResNet20, batch {batch}", pairs, step, rank=0, grad_steps=5)


def measure(case: Case, repeats: int) -> dict:
    """Seconds of every part, DSKD's share of a step, and the ratio to the SVD in every step."""
    students = [student for _, student, _ in case.pairs]
    dskd = DirectionSensitivityLoss(case.pairs, case.rank, case.svd_steps, grad_steps=case.grad_steps)

    def choose_directions() -> None:
        # what an optimizer step does, AdamW-like in size; its own time is part of the step, not of DSKD
        dskd.steps = case.svd_steps - 1
        with dskd.observe(progress=0.5), torch.no_grad():
            for student, update in zip(students, updates, strict=True):
                student.add_(update)

    def expand() -> None:
        dskd._held = None
        with torch.no_grad():
            dskd()

    def held() -> None:
        (0.1 * dskd()).backward()

    def rival() -> None:
        (0.1 * per_step_svd_loss(case.pairs, weights)).backward()

    updates = [1e-5 * torch.randn_like(student) for student in students]
    for student in students:
        student.grad = torch.randn_like(student)
    choose_directions()
    weights = dskd.direction_weights()
    works = {"choose directions": choose_directions, "expand": expand, "held": held, "per-step SVD": rival}
    seconds = {name: summary(values) for name, values in interleaved(works, repeats).items()}
    seconds["step"] = summary(interleaved({"step": case.step}, repeats)["step"])
    cost = seconds["held"]["median"] + seconds["expand"]["median"] / case.grad_steps
    cost += seconds["choose directions"]["median"] / case.svd_steps
    elements = sum(student.numel() for student in students)
    kept = _kept(dskd)
    return {
        "case": case.name,
        "pairs": len(case.pairs),
        "settings": {"rank": case.rank, "svd_steps": case.svd_steps, "grad_steps": case.grad_steps},
        "seconds": seconds,
        "dskd_seconds_per_step": cost,
        "share_of_step": cost / seconds["step"]["median"],
        "per_step_svd_over_dskd": seconds["per-step SVD"]["median"] / cost,
        "kept_copies_of_matched_weights": sum(tensor.numel() for tensor in kept) / elements,
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
            "kept copies of the matched weights": f"{result['kept_copies_of_matched_weights']:.2f}",
        }
        for result in results
    ]
    return f"{table(rows)}\n\n{path}"


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
