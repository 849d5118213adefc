"""GLUE's metrics, from scikit-learn and scipy.

Defined on degenerate input: a correlation (Matthews, Pearson, Spearman) with a constant is 0.0, F1 without a positive
is 0.0.
"""

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from bert_of_theseus.tasks import Task


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"mcc": matthews_corrcoef(labels, predictions)}


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": accuracy_score(labels, predictions)}


def _accuracy_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {**_accuracy(predictions, labels), "f1": f1_score(labels, predictions, zero_division=0)}


def _accuracy_macro_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    f1 = f1_score(labels, predictions, average="macro", zero_division=0)
    recalls = [(predictions[labels == label] == label).mean() for label in np.unique(labels)]
    return {**_accuracy(predictions, labels), "f1": f1, "balanced_accuracy": np.mean(recalls)}


def _correlation(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are all but constant, or one example
        found = {"pearson": pearsonr, "spearman": spearmanr}
        values = {name: function(labels, predictions).statistic for name, function in found.items()}
    return {name: value if np.isfinite(value) else 0.0 for name, value in values.items()}


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = MappingProxyType(
    {
        "matthews": _matthews,
        "accuracy": _accuracy,
        "accuracy_f1": _accuracy_f1,
        "accuracy_macro_f1": _accuracy_macro_f1,
        "correlation": _correlation,
    }
)


def decide(task: Task, logits: np.ndarray) -> np.ndarray:
    """Predictions from a model's outputs: class numbers (N,) int64, or scores (N,) float64 for regression.

    Args:
        task: the task, with its labels.
        logits: (N, classes); (N,) or (N, 1) for regression.

    Raises:
        ValueError: outputs of another shape.
        FloatingPointError: outputs that are not finite, from which argmax would still make plausible predictions.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if task.regression and logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2 or logits.shape[1] != task.num_outputs:
        raise ValueError(f"{task.name}: expected outputs (N, {task.num_outputs}), got {logits.shape}")
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"{task.name}: the model's outputs are not finite; did the training diverge?")
    return logits[:, 0] if task.regression else logits.argmax(axis=1)


def compute(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics, all in [-1, 1].

    Args:
        task: the task, with its labels.
        logits: (N, classes); (N,) or (N, 1) for regression.
        labels: (N,) class numbers, or scores for regression.

    Returns:
        Keys `accuracy`, `f1` (of class 1; the mean over the classes for a custom task), `balanced_accuracy` (the mean
        recall of the classes), `mcc`, `pearson`, `spearman`, as far as the task has them.

    Raises:
        ValueError: shapes that do not fit, or no examples.
        FloatingPointError: outputs that are not finite.
    """
    predictions, labels = decide(task, logits), np.asarray(labels)
    if labels.shape != predictions.shape or not labels.size:
        raise ValueError(f"{task.name}: {predictions.shape} predictions for {labels.shape} labels")
    return {name: float(value) for name, value in METRICS[task.metrics](predictions, labels).items()}
