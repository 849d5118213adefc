"""How good the held gradient of DSKD is while both pipelines train: by interval, by an adaptive rule, by driver.

The measurements are at a few ages; between them cosine and drift are interpolated linearly.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.matrices import DRIVERS
from scripts.lib.benchmark.timing import table, write
from scripts.study.exactness_plot import plot
from scripts.study.held_gradient import SMOOTHINGS, HeldGradient, Reference
from scripts.study.observed_runs import Plan, observe_cv, observe_nlp

THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1)
AGES = (1, 2, 5, 10, 20, 50, 100)
CV = Plan(
    steps=1200,
    batch=64,
    svd_steps=100,
    ages=AGES,
    stages={"lr 0.05": (0, 100, 300, 500), "lr 0.005": (600, 700, 800), "lr 0.0005": (900, 1000, 1100)},
    decays=(600, 900),
)
NLP = Plan(
    steps=300,
    batch=32,
    svd_steps=100,
    ages=AGES,
    stages={"beginning": (0,), "middle": (100,), "end": (200,)},
    tuning_steps=40,
)
_SMALL = {"steps": 12, "batch": 4, "svd_steps": 4, "ages": (1, 2, 4)}
QUICK_CV = Plan(**_SMALL, stages={"lr 0.05": (0,), "lr 0.005": (4,), "lr 0.0005": (8,)}, decays=(4, 8))
QUICK_NLP = Plan(**_SMALL, stages={"beginning": (0,), "middle": (4,), "end": (8,)}, tuning_steps=1)


def run(folder: Path, quick: bool, cifar100: str, glue: str, model: str) -> str:
    """Trains by both recipes, writes exactness.json, .png and .svg; returns the tables.

    Args:
        cifar100: folder of CIFAR-100. The teacher is the trained ResNet56 that cv/train_svd.py would find, except with
            `quick`: random weights.
        glue: folder with RTE/train.tsv.
        model: encoder, a folder or hub name; one without a fine-tuned classifier is fine-tuned for a few steps first.

    Raises:
        UserError: data, teacher or model are not there.
    """
    plans = {"cv": QUICK_CV if quick else CV, "nlp": QUICK_NLP if quick else NLP}
    observed = {
        "cv": observe_cv(plans["cv"], cifar100, quick, plans["cv"].held_gradient),
        "nlp": observe_nlp(plans["nlp"], glue, model),
    }
    results = {name: {**case, **_summary(held, plans[name])} for name, (held, case) in observed.items()}
    path = write("exactness", results, folder)
    plot({name: held.references for name, (held, _) in observed.items()}, folder)
    intervals = table([row for name in results for row in _interval_rows(name, results[name])])
    adaptive = table([row for name in results for row in _adaptive_rows(name, results[name])])
    drivers = table([row for name in results for row in _driver_rows(name, results[name])])
    released = "; ".join(f"{name} {_in_words(results[name]['released'])}" for name in results)
    return (
        "cosine of the applied gradient with the exact one over an interval, mean (worst pair), by smoothing and "
        "grad_steps:\n\n"
        f"{intervals}\n\nthe same without smoothing, where max ||W - W_0|| / ||W_0|| > t ends an interval, and its "
        "mean length:\n\n"
        f"{adaptive}\n\ndrivers in float32 beside an SVD in float64, mean (worst pair):\n\n{drivers}\n\n"
        f"gradient of the authors' release beside the exact one, mean (worst pair): {released}\n\n{path}"
    )


def applied(reference: Reference, interval: int, smoothing: float | None = 0.0) -> np.ndarray:
    """(pairs,) cosines of the gradient applied at the ages 0 to interval - 1 with the exact ones, averaged.

    smoothing: of the basis "own"; None for the basis "update".
    """
    cosine = np.array(reference.along_update if smoothing is None else reference.cosine[smoothing])
    return np.mean([_at(reference, cosine, age) for age in range(interval)], axis=0)


def adaptive_interval(reference: Reference, threshold: float) -> int:
    """Steps until the drift of any pair exceeds the threshold; the last age at most."""
    drift = np.array(reference.drift)
    last = reference.ages[-1]
    return next((age for age in range(1, last) if _at(reference, drift, age).max() > threshold), last)


def _at(reference: Reference, values: np.ndarray, age: int) -> np.ndarray:
    return np.array([np.interp(age, reference.ages, column) for column in values.T])


def _summary(held: HeldGradient, plan: Plan) -> dict:
    """The three tables of a pipeline, by stage, and the measurements that they come from."""
    stages = {stage: [r for r in held.references if r.stage == stage] for stage in plan.stages}
    by_interval = {
        stage: {
            value: {steps: _mean_and_worst([applied(r, steps, value) for r in references]) for steps in plan.ages}
            for value in SMOOTHINGS
        }
        | _along_update(references, plan)
        for stage, references in stages.items()
    }
    adaptive = {}
    for stage, references in stages.items():
        adaptive[stage] = {}
        for threshold in THRESHOLDS:
            lengths = [adaptive_interval(r, threshold) for r in references]
            cosine = [applied(r, length) for r, length in zip(references, lengths, strict=True)]
            adaptive[stage][threshold] = {**_mean_and_worst(cosine), "interval": float(np.mean(lengths))}
    drivers = {}
    for driver in DRIVERS:
        overlap = [value for r in held.references for value in r.overlap.get(driver, ())]
        drivers[driver] = {
            "gradient": _mean_and_worst([r.gradient[driver] for r in held.references]),
            "overlap": _mean_and_worst([overlap]) if overlap else None,
        }
    return {
        "pairs": held.names,
        "by_grad_steps": by_interval,
        "by_drift": adaptive,
        "drivers": drivers,
        "released": _mean_and_worst([r.released for r in held.references]),
        "references": [asdict(reference) for reference in held.references],
    }


def _along_update(references: list[Reference], plan: Plan) -> dict[str, dict]:
    chosen = [r for r in references if r.along_update]
    found = {steps: [applied(r, steps, None) for r in chosen] for steps in plan.ages} if chosen else {}
    return {"update": {steps: _mean_and_worst(cosines) for steps, cosines in found.items()}} if found else {}


def _mean_and_worst(cosines: list) -> dict[str, float]:
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
            "overlap of the direction weights": _in_words(found["overlap"]) if found["overlap"] else "",
        }
        for driver, found in result["drivers"].items()
    ]


def _in_words(found: dict[str, float], digits: int = 4) -> str:
    return f"{found['mean']:.{digits}f} ({found['worst']:.{digits}f})"
