"""Metrics of evaluations by set and name, in words, and in the model card."""

import shlex
from pathlib import Path

import numpy as np

from bert_of_theseus.metrics import compute
from bert_of_theseus.tasks import Task


def flatten(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of an evaluation as `<set>_<metric>`, without the Trainer's timings and losses."""
    timings = ("_runtime", "_per_second", "_time", "_loss")
    kept = {key: value for key, value in metrics.items() if key.startswith("eval_") and not key.endswith(timings)}
    return {key.removeprefix("eval_"): value for key, value in kept.items()}


def merged(history: list[dict], step: int | None) -> dict[str, float]:
    """All metrics of the evaluation at a step (the Trainer logs one line per evaluation set)."""
    return flatten({key: value for line in history if line["step"] == step for key, value in line.items()})


def in_words(metrics: dict[str, float]) -> str:
    """One line of them."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def method_in_words(args, layers: int) -> str:
    """What the student is, for the log and the model card."""
    words = f"{layers} layers, {args.method}"
    return words + (
        f" + DSKD ({args.basis}, lambda {args.lambda_size:g}, rank {args.rank_size})" if args.if_svd else ""
    )


def layer_map(layers: int, count: int, start: str) -> str:
    """Which layers of the predecessor every layer of the student stands for, and starts as."""
    if layers % count:
        return f"layers: the student's {count} start as the predecessor's first {count} of {layers}"
    size = layers // count
    groups = [f"{i * size}" + (f"-{(i + 1) * size - 1}" if size > 1 else "") for i in range(count)]
    stands = ", ".join(f"{i} for {group}" for i, group in enumerate(groups))
    first = [(i + 1) * size - 1 if start == "paired" else i for i in range(count)]
    return f"layers (student for predecessor): {stands}; the student starts as {', '.join(map(str, first))}"


def majority_metric(task: Task, datasets: dict) -> float:
    """What the task's metric is where every dev example gets the training set's most frequent class, or mean score."""
    labels, train = datasets[task.dev_sets[0]].labels, datasets["train"].labels
    if task.regression:
        logits = np.full((len(labels), 1), np.mean(train))
    else:
        logits = np.tile(np.bincount(train, minlength=task.num_outputs), (len(labels), 1))
    return compute(task, logits, labels)[task.primary]


def summary(metric: str, rows: list[tuple]) -> str:
    """The table at the end of a run; rows: (what, value of the metric or None, parameters or "", ms or "")."""
    lines = [f"{'':<14}{metric:>20}{'parameters':>14}{'ms/example':>12}"]
    for what, value, parameters, milliseconds in rows:
        shown = "" if value is None else f"{value:.4f}"
        size = f"{parameters / 1e6:.2f} M" if parameters != "" else ""
        speed = f"{milliseconds:.1f}" if milliseconds != "" else ""
        lines.append(f"{what:<14}{shown:>20}{size:>14}{speed:>12}".rstrip())
    return "\n".join(lines)


def next_steps(folder: Path) -> str:
    """What can be done with a finished run."""
    student = folder / "student"
    lines = [f"the student is a plain transformers checkpoint: {student}"]
    lines.append(f"report:  python scripts/report.py {shlex.quote(str(folder))}")
    lines.append(f"load:    AutoModelForSequenceClassification.from_pretrained({str(student)!r})")
    lines.append(f"predict: this program with --model_name_or_path {shlex.quote(str(student))} --do_predict")
    return "\n".join(lines)


def _name(model: str) -> str:
    return Path(model).name if Path(model).exists() else model


def card(args, task: Task, model, how: str, metrics: dict[str, float]) -> str:
    """README.md of a saved model."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    table = f"\n| metric | value |\n| --- | --- |\n{rows}\n" if metrics else ""
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---
# {task.name}: {how}

From `{_name(args.model_name_or_path)}`, seed {args.seed}. {size:.1f} M parameters.
{table}
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```
"""
