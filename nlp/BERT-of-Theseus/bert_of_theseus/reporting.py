"""Metrics of evaluations by set and name, in words, and in the model card."""

from pathlib import Path

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
