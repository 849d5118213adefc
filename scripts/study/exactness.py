"""How good the held gradient of DSKD is while both pipelines train: by interval, by an adaptive rule, by driver.

python -m scripts.study.exactness --cifar100 data/cifar100 --glue data/glue --model nreimers/MiniLM-L6-H384-uncased

Exact gradients are kept right after choices of directions and at several moments between two choices, and compared at
every age until the next choice. Before the first choice all directions weigh alike: those gradients have stages of
their own. Writes exactness.json, .png and .svg.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common import ROOT
from common.run.errors import Parser, run_cli
from common.run.figures import drawn
from common.run.files import check_writable
from common.torchvision_repair import repair_torchvision
from dskd.matrices import DRIVERS
from scripts.lib.benchmark.timing import table, write
from scripts.study.held_gradient import SMOOTHINGS, HeldGradient, Plan, Reference

THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1)
INTERVALS = (1, 2, 5, 10, 20, 50, 100)
PHASES = (0, 25, 50, 75)  # steps after a choice at which a gradient is kept


def _between(*choices: int) -> list[int]:
    return [choice + phase for choice in choices for phase in PHASES]


PLANS = {
    "cv": Plan(
        steps=1200,
        batch=64,
        svd_steps=100,
        stages={
            "before a choice": _between(0),
            "lr 0.05": _between(100, 300, 500),
            "lr 0.005": _between(600, 700, 800),
            "lr 0.0005": _between(900, 1000, 1100),
        },
        decays=(600, 900),
    ),
    "nlp": Plan(
        steps=300,
        batch=32,
        svd_steps=100,
        stages={"before a choice": _between(0), "middle": _between(100), "end": _between(200)},
        tuning_steps=40,
    ),
}
_SMALL = {"steps": 12, "batch": 4, "svd_steps": 4}
_SMALL |= {"stages": {"before a choice": (0, 2), "middle": (4, 6), "end": (8, 10)}, "tuning_steps": 1}
QUICK_PLANS = {"cv": Plan(**_SMALL, decays=(4, 8)), "nlp": Plan(**_SMALL)}
TITLES = {"cv": "CIFAR-100, ResNet56 -> ResNet20", "nlp": "RTE, BERT with half of its layers"}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = ROOT / "results" / "benchmark"
    parser.add_argument("--output", type=Path, default=output, help="default: results/benchmark")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    parser.add_argument(
        "--cifar100",
        default="data/cifar100",
        help="folder of CIFAR-100; the teacher is the trained ResNet56 that cv/train_svd.py would find, except with "
        "--quick: random weights (default: %(default)s)",
    )
    parser.add_argument("--glue", default="data/glue", help="folder with RTE/train.tsv (default: %(default)s)")
    parser.add_argument(
        "--model",
        default="nreimers/MiniLM-L6-H384-uncased",
        help="encoder, a folder or hub name; one without a fine-tuned classifier is fine-tuned for a few steps first "
        "(default: %(default)s)",
    )
    args = parser.parse_args()
    check_writable("--output", args.output)
    repair_torchvision()
    print(run(args.output, args.quick, args.cifar100, args.glue, args.model))


def run(folder: Path, quick: bool, cifar100: str, glue: str, model: str) -> str:
    """Trains by both recipes, arguments as of the command line; returns the tables.

    Raises:
        UserError: data, teacher or model are not there.
    """
    from scripts.study.observed_runs import observe_cv, observe_nlp

    plans = QUICK_PLANS if quick else PLANS
    observed = {"cv": observe_cv(plans["cv"], cifar100, quick), "nlp": observe_nlp(plans["nlp"], glue, model)}
    results = {name: {**case, **_summary(held, plans[name])} for name, (held, case) in observed.items()}
    path = write("exactness", results, folder)
    with drawn(folder, "exactness", (9, 3.6)) as figure:
        for panel, (name, (held, _)) in zip(figure.subplots(1, 2), observed.items(), strict=True):
            _panel(panel, held.references, TITLES[name])
    intervals, adaptive, drivers = (
        table([row for name, result in results.items() for row in rows(name, result)])
        for rows in (_interval_rows, _adaptive_rows, _driver_rows)
    )
    released = "; ".join(f"{name} {_in_words(result['released'])}" for name, result in results.items())
    return (
        "cosine of the applied gradient with the exact one over an interval, mean (worst pair), by smoothing and "
        "grad_steps:\n\n"
        f"{intervals}\n\nthe same without smoothing, where max ||W - W_0|| / ||W_0|| > t ends an interval, and its "
        "mean length:\n\n"
        f"{adaptive}\n\ndrivers in float32 beside an SVD in float64, mean (worst pair):\n\n{drivers}\n\n"
        f"gradient of the authors' release beside the exact one, mean (worst pair): {released}\n\n{path}"
    )


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
    found = {}
    for name, cosines in measured.items():
        longest = max(map(len, cosines))
        found[name] = {
            steps: _mean_and_worst([applied(each, steps) for each in cosines if len(each) >= steps])
            for steps in INTERVALS
            if steps <= longest
        }
    return found


def _by_drift(references: list[Reference], threshold: float) -> dict[str, float]:
    lengths = [adaptive_interval(reference, threshold) for reference in references]
    cosines = [applied(r.cosine[0.0], length) for r, length in zip(references, lengths, strict=True)]
    return {**_mean_and_worst(cosines), "interval": float(np.mean(lengths))}


def _some_ages(reference: Reference) -> dict:
    """A reference at the ages that the file has room for."""
    ages = [age for age in (0, *INTERVALS) if age < len(reference.drift)]
    found = {"ages": ages, **asdict(reference)}
    for key in ("drift", "value_error", "along_update"):
        found[key] = [found[key][age] for age in ages]
    found["cosine"] = {value: [pairs[age] for age in ages] for value, pairs in reference.cosine.items()}
    return found


def _mean_and_worst(cosines: Sequence[Sequence[float]]) -> dict[str, float]:
    values = np.concatenate(cosines)
    return {"mean": float(values.mean()), "worst": float(values.min())}


def _interval_rows(pipeline: str, result: dict) -> list[dict[str, str]]:
    return [
        {
            "pipeline": pipeline,
            "stage": stage,
            "basis, smoothing": f"own, {value:g}" if isinstance(value, float) else value,
            **{str(steps): _in_words(found) for steps, found in row.items()},
        }
        for stage, by_smoothing in result["by_grad_steps"].items()
        for value, row in by_smoothing.items()
    ]


def _adaptive_rows(pipeline: str, result: dict) -> list[dict[str, str]]:
    return [
        {
            "pipeline": pipeline,
            "stage": stage,
            **{f"t = {t}": f"{_in_words(found)}, {found['interval']:.1f} steps" for t, found in row.items()},
        }
        for stage, row in result["by_drift"].items()
    ]


def _driver_rows(pipeline: str, result: dict) -> list[dict[str, str]]:
    return [
        {
            "pipeline": pipeline,
            "driver": driver,
            "cosine of the gradient": _in_words(found["gradient"], 7),
            "overlap of the direction weights": _in_words(found["overlap"]),
        }
        for driver, found in result["drivers"].items()
    ]


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
