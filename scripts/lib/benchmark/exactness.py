"""How good the held gradient of DSKD is while both programs train.

Exact gradients are kept right after choices of directions and at several moments between two choices, so that intervals
of every length and phase are looked at. Before the first choice all directions weigh alike: those gradients have a
stage of their own. The vision teacher is the trained ResNet56 that cv/train_svd.py would find, with --quick random
weights. The encoder is fine-tuned for half an epoch first.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np

from common.run.figures import drawn
from dskd import DirectionSensitivityLoss
from dskd.matrices import DRIVERS
from scripts.lib.benchmark import tables
from scripts.lib.benchmark.held_gradient import HeldGradient, Reference, Stages, applied
from scripts.lib.benchmark.loops import RECIPE
from scripts.lib.benchmark.timing import write

INTERVALS = (1, 2, 5, 10, 20, 50, 100)


def _stages(**choices: Sequence[int]) -> Stages:
    """Looked at right after the choices, and at three moments before the next ones."""
    return {name: [step + phase for step in steps for phase in (0, 25, 50, 75)] for name, steps in choices.items()}


# what a run is in the words of its program; the choices of directions are 100 steps apart, an epoch of images has 300
WORDS = {
    "cv": "DATASET.SUBSET 19200 SOLVER.EPOCHS 4 SOLVER.LR_DECAY_STAGES [2,3] DSKD.SVD_STEPS 100",
    "nlp": "--max_steps 300 --svd_steps 100",
}
_RATES = {"lr 0.05": (100, 300, 500), "lr 0.005": (600, 700, 800), "lr 0.0005": (900, 1000, 1100)}
STAGES = {"cv": _stages(beginning=(0,), **_RATES), "nlp": _stages(beginning=(0,), middle=(100,), end=(200,))}
QUICK_WORDS = {
    "cv": "DATASET.SUBSET 16 SOLVER.BATCH_SIZE 4 SOLVER.EPOCHS 3 SOLVER.LR_DECAY_STAGES [1,2] DSKD.SVD_STEPS 4",
    "nlp": "--max_steps 12 --svd_steps 4 --per_gpu_train_batch_size 4 --max_seq_length 32",
}
QUICK_STAGES = {name: {"beginning": (0, 2), "middle": (4, 6), "end": (8, 10)} for name in STAGES}
TITLES = {"cv": "CIFAR-100, ResNet56 -> ResNet20, KD", "nlp": "RTE, BERT with half of its layers"}


def run(folder: Path, quick: bool, cifar100: str, glue: str, model: str) -> str:
    """Trains by both programs; writes exactness.json, .png and .svg, returns the tables."""
    words, stages = (QUICK_WORDS, QUICK_STAGES) if quick else (WORDS, STAGES)
    runs = {
        "cv": follow_cv(words["cv"], stages["cv"], cifar100, random_teacher=quick),
        "nlp": follow_nlp(words["nlp"], stages["nlp"], glue, model),
    }
    results = {name: {"run": f"{TITLES[name]}: {words[name]}", **summary(held)} for name, held in runs.items()}
    path = write("exactness", {"model": Path(model).name, **results}, folder)
    with drawn(folder, "exactness", (9, 3.6)) as figure:
        for panel, (name, held) in zip(figure.subplots(1, 2), runs.items(), strict=True):
            _panel(panel, held.references, TITLES[name])
    return f"{tables.exactness(results)}\n\n{tables.drivers(results)}\n\n{path}"


def followed(module: ModuleType, maker: str, stages: Stages, train: Callable[[], Any]) -> HeldGradient:
    """What a training does whose program makes its loss by a function of a module."""
    make, found = getattr(module, maker), []

    def make_and_follow(*args) -> DirectionSensitivityLoss:
        dskd = make(*args)
        found.append(HeldGradient(dskd, stages))
        return dskd

    with patch.object(module, maker, make_and_follow):
        train()
    return found[0]


def follow_cv(words: str, stages: Stages, cifar100: str, random_teacher: bool) -> HeldGradient:
    """ResNet56 -> ResNet20 by KD with DSKD, in fewer steps than in configs/cifar100."""
    from cv import trainer
    from cv.config import load_config
    from cv.export import save_model
    from cv.models import build_model

    with TemporaryDirectory() as folder:
        more = f"OUTPUT_DIR {folder}/run LOG.TRACKERS [] LOG.PROGRESS false SOLVER.EVAL_EPOCHS 4 {words}"
        more += " DSKD.ENABLED true DSKD.RANK 0"
        cfg = load_config(RECIPE, [*more.split(), "DATASET.ROOT", cifar100])
        if random_teacher:
            save_model(build_model("resnet56", 100), "resnet56", f"{folder}/teacher")
            cfg.DISTILLER.TEACHER_CKPT = f"{folder}/teacher"
        return followed(trainer, "build_dskd", stages, lambda: trainer.train(cfg))


def follow_nlp(words: str, stages: Stages, glue: str, model: str) -> HeldGradient:
    """Module replacing on RTE to half of the layers with DSKD."""
    from bert_of_theseus import pipeline
    from bert_of_theseus.arguments import parse_arguments

    with TemporaryDirectory() as folder:
        more = f"--output_dir {folder}/run --do_train --task_name RTE --bf16 --report_to none --disable_tqdm"
        more += " --finetune_predecessor --predecessor_num_train_epochs 0.5 --learning_rate 2e-5 --replacing_rate 0.3"
        more += f" --scheduler_linear_k 0.0003 --ifsvd --rank_size 32 {words}"
        args = parse_arguments([*more.split(), "--model_name_or_path", model, "--data_dir", f"{glue}/RTE"])
        return followed(pipeline, "build_loss", stages, lambda: pipeline.run(args))


def summary(held: HeldGradient) -> dict[str, Any]:
    """What the tables say, by stage, and how long each of the gradients that it comes from was followed."""
    stages: dict[str, list[Reference]] = {}
    for reference in held.references:
        stages.setdefault(reference.stage, []).append(reference)

    def gradients(name: str) -> dict[str, float]:
        return mean_and_worst([reference.gradient[name] for reference in held.references])

    drivers = {name: {"gradient": gradients(name), "overlap": mean_and_worst([held.overlap[name]])} for name in DRIVERS}
    return {
        "pairs": held.dskd.names,
        "by_grad_steps": {stage: by_interval(mine) for stage, mine in stages.items()},
        "drivers": drivers,
        "released": gradients("released"),
        "references": [
            {"stage": each.stage, "step": each.step, "steps": len(each.cosine["update"])} for each in held.references
        ],
    }


def by_interval(references: Sequence[Reference]) -> dict[str, dict[str, dict[str, float]]]:
    """By basis with smoothing and by grad_steps, of the references that no choice ends before."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in references[0].cosine:
        by_age = [reference.cosine[name] for reference in references]
        intervals = [steps for steps in INTERVALS if steps <= max(map(len, by_age))]
        found[name] = {str(n): mean_and_worst([applied(e, n) for e in by_age if len(e) >= n]) for n in intervals}
    return found


def mean_and_worst(cosines: Sequence[Sequence[float]]) -> dict[str, float]:
    values = np.concatenate(cosines)
    return {"mean": round(float(values.mean()), 7), "worst": round(float(values.min()), 7)}


def _panel(panel, references: list[Reference], title: str) -> None:
    """The cosine of the held gradient with the exact one against its age: a color per stage, mean and worst pair."""
    for i, stage in enumerate(dict.fromkeys(reference.stage for reference in references)):
        cosines = [reference.cosine["own, 0"] for reference in references if reference.stage == stage]
        ages = range(1, max(map(len, cosines)))  # at age 0 it is 1
        at_age = [np.concatenate([each[age] for each in cosines if age < len(each)]) for age in ages]
        panel.plot(ages, [values.mean() for values in at_age], color=f"C{i}", label=stage)
        panel.plot(ages, [values.min() for values in at_age], ":", color=f"C{i}", linewidth=1)
    panel.set(title=title, xscale="log", ylabel="cosine with the exact gradient")
    panel.set_xlabel("age of the held gradient, optimizer steps (dotted: worst pair)")
    panel.legend(loc="lower left")
    panel.grid(alpha=0.3)
