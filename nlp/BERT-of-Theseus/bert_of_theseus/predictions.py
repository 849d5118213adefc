"""Predictions on a test set, in the TSV format that the GLUE server takes."""

from pathlib import Path

import numpy as np

from bert_of_theseus.metrics import decide
from bert_of_theseus.tasks import Task
from common.run.files import write_text


def write_predictions(task: Task, folder: str | Path, logits: np.ndarray, set_name: str = "test") -> Path:
    """Write one line an example, `index<TAB>prediction`, under the name that the server wants (`RTE.tsv`).

    The prediction is the label as the task's files write it. Scores of STS-B are clipped to [0, 5] and have three
    decimals; scores of a custom task are written in full. The index counts from 0, as it does in every GLUE test file.
    The file appears complete or not at all.

    Args:
        task: the task, with its labels.
        folder: made if need be.
        logits: (N, classes); (N,) or (N, 1) for regression; in the order of the test file.
        set_name: one of `task.test_sets`.

    Returns:
        The path of the file.

    Raises:
        ValueError, FloatingPointError: outputs of a wrong shape or not finite (`metrics.decide`).
    """
    values = decide(task, logits)
    if not task.regression:
        words = [task.labels[value] for value in values]
    elif task.score_range:
        words = [f"{value:.3f}" for value in values.clip(*task.score_range)]
    else:
        words = [f"{value:.9g}" for value in values]

    path = Path(folder) / task.predictions[set_name]
    lines = [f"{index}\t{word}\n" for index, word in enumerate(words)]
    write_text(path, "".join(["index\tprediction\n", *lines]))
    return path


def write_probabilities(task: Task, folder: str | Path, logits: np.ndarray, set_name: str = "test") -> Path:
    """Write one line an example, its index and the probability of every class, beside the file of predictions.

    A file of its own, as the GLUE server takes none with more columns; see `write_predictions`.
    """
    decide(task, logits)  # refuses what is not finite
    logits = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    rows = exponentials / exponentials.sum(axis=1, keepdims=True)
    path = Path(folder) / task.predictions[set_name].replace(".tsv", ".probabilities.tsv")
    lines = ["\t".join([str(index), *(f"{value:.6f}" for value in row)]) + "\n" for index, row in enumerate(rows)]
    write_text(path, "".join(["\t".join(["index", *task.labels]) + "\n", *lines]))
    return path
