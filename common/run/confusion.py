"""Which classes an evaluation takes for which: `confusion.json` beside the record of a run, for the report to draw."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.run.errors import UserError
from common.run.files import write_text
from common.run.reading import read_json, reading

CONFUSION = "confusion.json"
_LARGEST = 10**9  # examples of a cell


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of an evaluation, without its zeros.

    Attributes:
        classes: the classes' names, C of them.
        cells: (K, 3) int64, rows of (class, predicted class, number of examples) in the order of the classes.
        step: optimizer steps done.
        evaluated_on: what was evaluated on, in words.
    """

    classes: tuple[str, ...]
    cells: np.ndarray
    step: int
    evaluated_on: str

    @property
    def examples(self) -> np.ndarray:
        """(C,) examples of every class."""
        return self._sums(0, self.cells)

    @property
    def predicted(self) -> np.ndarray:
        """(C,) how many were taken for every class."""
        return self._sums(1, self.cells)

    @property
    def hits(self) -> np.ndarray:
        """(C,) how many of every class were recognised."""
        return self._sums(0, self.cells[self.cells[:, 0] == self.cells[:, 1]])

    def scores(self) -> dict[str, float]:
        """`balanced_accuracy`, the mean recall of the classes that have examples, and `macro_f1`, the mean F1 of the
        classes that have examples or were predicted; both in [0, 1], as scikit-learn defines them."""
        examples, predicted, hits = self.examples, self.predicted, self.hits
        seen, known = examples > 0, examples + predicted > 0
        return {
            "balanced_accuracy": float(np.mean(hits[seen] / examples[seen])),
            "macro_f1": float(np.mean(2 * hits[known] / (examples + predicted)[known])),
        }

    def _sums(self, column: int, cells: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(self.classes), dtype=np.int64)
        np.add.at(sums, cells[:, column], cells[:, 2])
        return sums


def confused(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """`Confusion.cells` of class numbers (N,) and the predicted ones (N,)."""
    pairs, counts = np.unique(np.stack([labels, predictions], axis=1), axis=0, return_counts=True)
    return np.column_stack([pairs, counts]).astype(np.int64)


def write_confusion(folder: Path, confusion: Confusion) -> None:
    """Write `confusion.json`; the one of an earlier evaluation is replaced."""
    described = {
        "step": confusion.step,
        "evaluated_on": confusion.evaluated_on,
        "classes": list(confusion.classes),
        "cells": confusion.cells.tolist(),
    }
    write_text(folder / CONFUSION, json.dumps(described) + "\n")


def read_confusion(folder: Path) -> Confusion | None:
    """What `write_confusion` wrote, None where there is no such file; a UserError where it is broken."""
    path = folder / CONFUSION
    if not path.exists():
        return None
    found = read_json(path)
    _check(path, found)
    cells = np.array(found["cells"], dtype=np.int64)
    return Confusion(tuple(found["classes"]), cells, found["step"], found["evaluated_on"])


def _check(path: Path, found: Mapping) -> None:
    with reading(path, "a confusion matrix"):
        classes, cells = found["classes"], found["cells"]
        if not (_all(classes, str) and isinstance(found["step"], int) and isinstance(found["evaluated_on"], str)):
            raise UserError(f"{path}: a number step, a text evaluated_on and a list of names, classes, are expected")
        limits = (len(classes) - 1, len(classes) - 1, _LARGEST)
        whole = bool(cells) and all(
            _all(cell, int) and len(cell) == 3 and all(0 <= n <= most for n, most in zip(cell, limits, strict=True))
            for cell in cells
        )
        if not whole or not all(count for *_, count in cells):
            raise UserError(f"{path}: cells are to be lists of class, predicted class and number of examples")


def _all(values: Sequence, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
