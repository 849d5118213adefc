"""How good the held gradient of DSKD is while both pipelines train: by interval, by an adaptive rule, by driver.

python -m scripts.study.exactness --cifar100 data/cifar100 --glue data/glue --model nreimers/MiniLM-L6-H384-uncased

Exact gradients are kept right after choices of directions and at several moments between two choices, and compared at
every age until the next choice. Before the first choice all directions weigh alike: those gradients have a stage of
their own. The vision teacher is the trained ResNet56 that cv/train_svd.py would find, except with --quick: random
weights. An encoder without a fine-tuned classifier is fine-tuned for a few steps first. Writes exactness.json, .png and
.svg.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.run.errors import run_cli
from common.run.figures import drawn
from dskd.matrices import DRIVERS
from scripts.lib.benchmark.command import command, parse
from scripts.lib.benchmark.timing import table, write
from scripts.study.held_gradient import SMOOTHINGS, HeldGradient, Plan, Reference

THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1)
INTERVALS = (1, 2, 5, 10, 20, 50, 100)
PHASES = (0, 25, 50, 75)  # steps after a choice at which a gradient is kept


def _plan(stages: dict[str, Sequence[int]], **settings) -> Plan:
    """Looked at after the choices of every stage; 0 stands for the start."""
    kept = {stage: [choice + phase for choice in choices for phase in PHASES] for stage, choices in stages.items()}
    return Plan(svd_steps=100, stages=kept, **settings)


_STAGES = {"lr 0.05": (100, 300, 500), "lr 0.005": (600, 700, 800), "lr 0.0005": (900, 1000, 1100)}
PLANS = {
    "cv": _plan({"before a choice": (0,), **_STAGES}, steps=1200, batch=64, decays=(600, 900)),
    "nlp": _plan({"before a choice": (0,), "middle": (100,), "end": (200,)}, steps=300, batch=32, tuning_steps=40),
}
_QUICK_STAGES = {"before a choice": (0, 2), "middle": (4, 6), "end": (8, 10)}
QUICK = Plan(steps=12, batch=4, svd_steps=4, stages=_QUICK_STAGES, decays=(4, 8), tuning_steps=1)
TITLES = {"cv": "CIFAR-100, ResNet56 -> ResNet20", "nlp": "RTE, BERT with half of its layers"}


def main() -> None:
    args = parse(command(__doc__, "--cifar100", "--glue", "--model"))
    print(run(args.output, args.quick, args.cifar100, args.glue, args.model))


def run(folder: Path, quick: bool, cifar100: str, glue: str, model: str) -> str:
    """Trains by both recipes, arguments as of the command line; returns the tables.

    Raises:
        UserError: data, teacher or model are not there.
    """
    from scripts.study.observed_runs import observe_cv, observe_nlp

    plans = dict.fromkeys(PLANS, QUICK) if quick else PLANS
    observed = {"cv": observe_cv(plans["cv"], cifar100, quick), "nlp": observe_nlp(plans["nlp"], glue, model)}
    results = {name: {**case, **_summary(held, plans[name])} for name, (held, case) in observed.items()}
    path = write("exactness", results, folder)
    with drawn(folder, "exactness", (9, 3.6)) as figure:
        for panel, (name, (held, _)) in zip(figure.subplots(1, 2), observed.items(), strict=True):
            _panel(panel, held.references, TITLES[name])
    return f"{_tables(results)}\n\n{path}"


def applied(cosines: Sequence[Sequence[float]], interval: int) -> np.ndarray:
    """(pairs,) cosines [age][pair] of the gradient applied at the ages 0 to interval - 1, averaged."""
    return np.mean(cosines[:interval], axis=0)


def adaptive_interval(reference: Reference, threshold: float) -> int:
    """Steps until the drift of any pair exceeds the threshold, or until the next choice."""
    drift = [max(pairs) for pairs in reference.drift]
    return next((age for age, value in enumerate(drift) if age and value > threshold), len(drift))


def _summary(held: HeldGradient, plan: Plan) -> dict:
    """The three tables of a pipeline, by stage, and the measurements that they come from."""
    stages = {stage: [r for r in held.references if r.stage == stage] for stage in plan.stages}
    return {
        "pairs": held.names,
        "by_grad_steps": {stage: _by_interval(references) for stage, references in stages.items()},
        "by_drift": {
            stage: {threshold: _by_drift(references, threshold) for threshold in THRESHOLDS}
            for stage, references in stages.items()
        },
        "drivers": {
            driver: {
                "gradient": _mean_and_worst([r.gradient[driver] for r in held.references]),
                "overlap": _mean_and_worst([held.overlap[driver]]),
            }
            for driver in DRIVERS
        },
        "released": _mean_and_worst([r.released for r in held.references]),
        "references": [_some_ages(reference) for reference in held.references],
    }


def _by_interval(references: list[Reference]) -> dict:
    """By smoothing, or "update", and by grad_steps, of the references that no choice ends before."""
    measured = {value: [r.cosine[value] for r in references] for value in SMOOTHINGS}
    measured["update"] = [r.along_update for r in references]
    longest = max(len(reference.drift) for reference in references)
    return {
        name: {
            steps: _mean_and_worst([applied(each, steps) for each in cosines if len(each) >= steps])
            for steps in INTERVALS
            if steps <= longest
        }
        for name, cosines in measured.items()
    }


def _by_drift(references: list[Reference], threshold: float) -> dict[str, float]:
    lengths = [adaptive_interval(reference, threshold) for reference in references]
    cosines = [applied(r.cosine[0.0], length) for r, length in zip(references, lengths, strict=True)]
    return {**_mean_and_worst(cosines), "interval": float(np.mean(lengths))}


def _some_ages(reference: Reference) -> dict:
    """A reference at the ages, and with the digits, that the file has room for."""
    ages = [age for age in (0, *INTERVALS) if age < len(reference.drift)]

    def some(by_age: Sequence) -> list:
        return np.round(by_age, 7)[ages].tolist()

    series = {key: some(getattr(reference, key)) for key in ("drift", "value_error", "along_update")}
    cosine = {value: some(by_age) for value, by_age in reference.cosine.items()}
    return {**asdict(reference), "ages": ages, "cosine": cosine, **series}


def _mean_and_worst(cosines: Sequence[Sequence[float]]) -> dict[str, float]:
    values = np.concatenate(cosines)
    return {"mean": float(values.mean()), "worst": float(values.min())}


def _tables(results: dict[str, dict]) -> str:
    intervals, adaptive, drivers = [], [], []
    for pipeline, result in results.items():
        for stage, rows in result["by_grad_steps"].items():
            for value, row in rows.items():
                basis = f"own, {value:g}" if isinstance(value, float) else value
                cells = {str(steps): _in_words(found) for steps, found in row.items()}
                intervals.append({"pipeline": pipeline, "stage": stage, "basis, smoothing": basis, **cells})
        for stage, row in result["by_drift"].items():
            cells = {f"t = {t}": f"{_in_words(found)}, {found['interval']:.1f} steps" for t, found in row.items()}
            adaptive.append({"pipeline": pipeline, "stage": stage, **cells})
        for driver, found in result["drivers"].items():
            gradient, overlap = _in_words(found["gradient"], 7), _in_words(found["overlap"])
            cells = {"cosine of the gradient": gradient, "overlap of the direction weights": overlap}
            drivers.append({"pipeline": pipeline, "driver": driver, **cells})
    released = "; ".join(f"{name} {_in_words(result['released'])}" for name, result in results.items())
    parts = (
        "cosine of the applied gradient with the exact one over an interval, mean (worst pair), by smoothing and "
        "grad_steps:",
        table(intervals),
        "the same without smoothing, where max ||W - W_0|| / ||W_0|| > t ends an interval, and its mean length:",
        table(adaptive),
        "drivers in float32 beside an SVD in float64, mean (worst pair):",
        table(drivers),
        f"gradient of the authors' release beside the exact one, mean (worst pair): {released}",
    )
    return "\n\n".join(parts)


def _in_words(found: dict[str, float], digits: int = 4) -> str:
    return f"{found['mean']:.{digits}f} ({found['worst']:.{digits}f})"


def _panel(panel, references: list[Reference], title: str) -> None:
    """The cosine of the held gradient with the exact one against its age: a color per stage, mean and worst pair."""
    for i, stage in enumerate(dict.fromkeys(reference.stage for reference in references)):
        cosines = [reference.cosine[0.0] for reference in references if reference.stage == stage]
        ages = range(1, max(map(len, cosines)))  # at age 0 it is 1
        at_age = [np.concatenate([each[age] for each in cosines if age < len(each)]) for age in ages]
        panel.plot(ages, [values.mean() for values in at_age], color=f"C{i}", label=stage)
        panel.plot(ages, [values.min() for values in at_age], ":", color=f"C{i}", linewidth=1)
    panel.set_title(title)
    panel.set_xscale("log")
    panel.set_xlabel("age of the held gradient, optimizer steps (dotted: worst pair)")
    panel.set_ylabel("cosine with the exact gradient")
    panel.legend(loc="lower left")
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    run_cli(main)
