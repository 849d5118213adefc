"""How good the held gradient of DSKD is while both programs train: by its age, by smoothing, by basis, by driver.

python -m scripts.study.exactness --cifar100 data/cifar100 --glue data/glue --model nreimers/MiniLM-L6-H384-uncased

Exact gradients are kept right after choices of directions and at several moments between two choices, and compared at
every age until the next choice. Before the first choice all directions weigh alike: those gradients have a stage of
their own. The vision teacher is the trained ResNet56 that cv/train_svd.py would find, except with --quick: random
weights. The encoder is fine-tuned for half an epoch first. Writes exactness.json, .png and .svg.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from common.run.errors import run_cli
from common.run.figures import drawn
from dskd import DirectionSensitivityLoss, Update, direction_sensitivity, select_directions
from dskd.controls import ReleasedGradient
from dskd.matrices import DRIVERS, as_matrix
from dskd.observed import ObservedStep
from dskd.readings import Reading
from scripts.lib.benchmark.command import command, parse
from scripts.lib.benchmark.loops import RECIPE
from scripts.lib.benchmark.timing import table, write

SMOOTHINGS = (0.0, 0.003, 0.01, 0.03)
INTERVALS = (1, 2, 5, 10, 20, 50, 100)
Stages = Mapping[str, Collection[int]]  # name -> the steps after which an exact gradient is kept, 0 being the start


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


@dataclass
class Reference:
    """A moment of a run whose exact gradient is kept, and what became of it.

    cosine: [age][pair] of what is kept and the exact gradient for the same directions, by "own, SMOOTHING" and
    "update", the other basis at the same weights; gradient: [pair] at this moment, by driver beside float64, and
    "released", of the authors' release beside the exact one.
    """

    stage: str
    step: int
    cosine: dict[str, list[list[float]]] = field(default_factory=dict)
    gradient: dict[str, list[float]] = field(default_factory=dict)


class HeldGradient:
    """The measurements of one run, taken around every step that its loss, with the reading `Own`, sees.

    Attributes:
        references: one a kept gradient, compared at every age from 0 until directions are chosen anew, which ends
            every interval for which a gradient is held.
        overlap: by driver, sum(min(w, w')) of the direction weights with those of float64, of all choices and pairs.
    """

    def __init__(self, dskd: DirectionSensitivityLoss, stages: Stages):
        self.dskd = dskd
        self.stage_of = {step: stage for stage, steps in stages.items() for step in steps}
        self.references: list[Reference] = []
        self.overlap: dict[str, list[float]] = {driver: [] for driver in DRIVERS}
        self._own, self._update = replace(dskd.reading, smoothing=0.0), Update(dskd.reading.rank)
        self._along: list[dict[str, Tensor]] = []  # what `Update` has chosen, by pair
        self._before: list[tuple[Tensor, Tensor | None]] = []  # weights and gradients
        self._open: list[tuple[Reference, dict[str, list[Tensor]]]] = []
        self._begin, self._end, self._progress = dskd.begin_step, dskd.end_step, 0.0
        dskd.begin_step, dskd.end_step = self._before_step, self._after_step

    def _before_step(self, progress: float, skip: Collection[str] = ()) -> ObservedStep:
        if not self._along:
            self._along = [self._update.start(as_matrix(W.detach())[None]) for W in self.dskd.students]
            self._look()
        if self.dskd.due:
            grads = [None if W.grad is None else W.grad.clone() for W in self.dskd.students]
            self._before = [(W.detach().clone(), grad) for W, grad in zip(self.dskd.students, grads, strict=True)]
        self._progress = progress
        return self._begin(progress, skip)

    def _after_step(self, step: ObservedStep) -> None:
        choices = self.dskd.choices
        self._end(step)
        if self.dskd.choices > choices:
            self._open = []
            self._note_choice()
        self._look()

    def _look(self) -> None:
        if (step := self.dskd.steps) in self.stage_of:
            self.references.append(Reference(self.stage_of[step], step))
            self._open.append((self.references[-1], self._keep(self.references[-1])))
        if self._open:
            now = {"own": self._gradients(self._own), "update": self._gradients(self._update)}
            for reference, kept in self._open:
                for name, held in kept.items():
                    reference.cosine.setdefault(name, []).append(cosines(held, now[name.partition(",")[0]]))

    def _note_choice(self) -> None:
        """Of the pairs that got a gradient in the step that chose; the others keep their directions."""
        rank = self._own.rank
        for i, (W, (start, grad)) in enumerate(zip(self.dskd.students, self._before, strict=True)):
            if grad is None or not grad.any():
                continue
            dW, G = as_matrix(W.detach() - start), as_matrix(grad)
            self._along[i] = self._update.choose(dW[None], G[None], self._progress, self._along[i])
            oracle = select_directions(direction_sensitivity(dW.double(), G.double(), self._progress, "svd"), rank)
            for driver in DRIVERS:
                weights = select_directions(direction_sensitivity(dW, G, self._progress, driver, rank), rank)
                self.overlap[driver].append(torch.minimum(weights, oracle).sum().item())

    def _keep(self, reference: Reference) -> dict[str, list[Tensor]]:
        kept = {f"own, {value:g}": self._gradients(replace(self._own, smoothing=value)) for value in SMOOTHINGS}
        oracle = self._gradients(replace(self._own, driver="svd"), torch.float64)
        for driver in DRIVERS:
            reference.gradient[driver] = cosines(self._gradients(replace(self._own, driver=driver)), oracle)
        reference.gradient["released"] = cosines(self._gradients(ReleasedGradient(self._own)), kept["own, 0"])
        return {**kept, "update": self._gradients(self._update)}

    def _gradients(self, reading: Reading, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Exact, of every pair, along the last choice: that of the run's loss, or the same made in `Update`."""
        states = list(self._along)
        if reading is not self._update:
            for group in self.dskd.groups:
                group.start(self.dskd.reading, self.dskd.students)
                for row, i in enumerate(group.index):
                    states[i] = group.of_rows([row])
        gradients = []
        for (_, *weights), state in zip(self.dskd.pairs, states, strict=True):
            student_mn, teacher_mn = (as_matrix(W.detach()).to(dtype)[None] for W in weights)
            chosen = {key: value.to(dtype) for key, value in state.items()}
            gradients.append(reading.value_and_gradient(student_mn, reading.target(teacher_mn, chosen, {}), chosen)[1])
        return gradients


def cosines(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[float]:
    """Of every two tensors, in float64."""
    flat = [[tensor.double().flatten() for tensor in tensors] for tensors in (left, right)]
    return [cosine_similarity(a, b, dim=0).item() for a, b in zip(*flat, strict=True)]


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


def main() -> None:
    args = parse(command(__doc__, "--cifar100", "--glue", "--model"))
    words, stages = (QUICK_WORDS, QUICK_STAGES) if args.quick else (WORDS, STAGES)
    runs = {
        "cv": follow_cv(words["cv"], stages["cv"], args.cifar100, args.quick),
        "nlp": follow_nlp(words["nlp"], stages["nlp"], args.glue, args.model),
    }
    results = {name: {"run": f"{TITLES[name]}: {words[name]}", **summary(held)} for name, held in runs.items()}
    path = write("exactness", {"model": args.model, **results}, args.output)
    with drawn(args.output, "exactness", (9, 3.6)) as figure:
        for panel, (name, held) in zip(figure.subplots(1, 2), runs.items(), strict=True):
            _panel(panel, held.references, TITLES[name])
    print(f"{_tables(results)}\n\n{path}")


def applied(cosines: Sequence[Sequence[float]], interval: int) -> np.ndarray:
    """(pairs,) cosines [age][pair] of the gradient applied at the ages 0 to interval - 1, averaged."""
    return np.mean(cosines[:interval], axis=0)


def summary(held: HeldGradient) -> dict[str, Any]:
    """What the tables say, by stage, and the measurements that it comes from, at some ages."""
    stages: dict[str, list[Reference]] = {}
    references = []
    for reference in held.references:
        stages.setdefault(reference.stage, []).append(reference)
        ages = [age for age in (0, *INTERVALS) if age < len(reference.cosine["update"])]
        some = {name: np.round(by_age, 7)[ages].tolist() for name, by_age in reference.cosine.items()}
        references.append({**asdict(reference), "ages": ages, "cosine": some})
    return {
        "pairs": held.dskd.names,
        "by_grad_steps": {stage: by_interval(mine) for stage, mine in stages.items()},
        "gradients": {name: _words([r.gradient[name] for r in held.references], 7) for name in (*DRIVERS, "released")},
        "overlap": {driver: _words([overlap]) for driver, overlap in held.overlap.items()},
        "references": references,
    }


def by_interval(references: Sequence[Reference]) -> dict[str, dict[str, str]]:
    """By basis with smoothing and by grad_steps, of the references that no choice ends before."""
    found: dict[str, dict[str, str]] = {}
    for name in references[0].cosine:
        by_age = [reference.cosine[name] for reference in references]
        intervals = [steps for steps in INTERVALS if steps <= max(map(len, by_age))]
        found[name] = {str(n): _words([applied(each, n) for each in by_age if len(each) >= n]) for n in intervals}
    return found


def _words(cosines: Sequence[Sequence[float]], digits: int = 4) -> str:
    values = np.concatenate(cosines)
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f})"


def _tables(results: dict[str, dict]) -> str:
    intervals, gradients = [], []
    for program, result in results.items():
        for stage, rows in result["by_grad_steps"].items():
            intervals += [{"program": program, "stage": stage, "basis": name, **row} for name, row in rows.items()]
        for name, cell in result["gradients"].items():
            overlap = result["overlap"].get(name, "")
            gradients.append({"program": program, "driver": name, "gradient": cell, "direction weights": overlap})
    parts = (
        "cosine of the applied gradient with the exact one over an interval, mean (worst pair), by smoothing and "
        "grad_steps:",
        table(intervals),
        "drivers in float32 beside an SVD in float64, cosine of the gradient and overlap of the direction weights, and "
        "the gradient of the authors' release beside the exact one:",
        table(gradients),
    )
    return "\n\n".join(parts)


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


if __name__ == "__main__":
    run_cli(main)
