"""Which classes are taken for which: the confusion matrix, or of many classes those that are mixed up most."""

from typing import Any

import numpy as np
from matplotlib.colors import Normalize

from common.run.confusion import Confusion
from common.run.figures import plain
from scripts.lib.report.plots import drawing, svg

_DRAWN = 12  # classes whose matrix can be read on a telephone; of more, pairs are listed
_PAIRS = 15
_NAME = 14  # characters of a class's name beside the matrix
_ROOM = 30  # characters of all names below the matrix; longer ones are numbered


def mixed_up(confusion: Confusion) -> dict[str, Any]:
    """What the page says of a confusion matrix."""
    scores = confusion.scores()
    few = len(confusion.classes) <= _DRAWN
    right, examples = confusion.hits.sum(), confusion.examples.sum()
    shares = {"accuracy": right / examples, **scores}
    return {
        "step": confusion.step,
        "evaluated_on": confusion.evaluated_on,
        "examples": f"{examples:,}",
        "classes": len(confusion.classes),
        "scores": ", ".join(f"{name.replace('_', ' ').replace('f1', 'F1')} {x:.4f}" for name, x in shares.items()),
        "matrix": _matrix(confusion) if few else None,
        "figures": _figures(confusion) if few else [],
        "pairs": [] if few else _pairs(confusion),
    }


def _matrix(confusion: Confusion) -> str:
    counts = np.zeros((len(confusion.classes),) * 2, dtype=np.int64)
    counts[confusion.cells[:, 0], confusion.cells[:, 1]] = confusion.cells[:, 2]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [_short(name) for name in confusion.classes]
    columns = names
    if max(map(len, names)) * len(names) > _ROOM:
        columns = [str(i) for i in range(1, len(names) + 1)]
        names = [f"{name}  {i}" for name, i in zip(names, columns, strict=True)]
    places = np.arange(len(names))
    side = 2.4 + 0.14 * len(names)
    with drawing((side, side), font=8) as (figure, axis):
        axis.imshow(shares, cmap="Blues", norm=Normalize(0, 1), aspect="auto")
        size = min(8, 75 * side / len(names) / len(str(counts.max())))  # points: as wide as a cell
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if shares[row, column] > 0.6 else "black"
            axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=color, fontsize=size)
        axis.set_xticks(places, columns)
        axis.set_yticks(places, names)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set(xlabel="predicted", ylabel="class")
        return svg(figure)


def _figures(confusion: Confusion) -> list[tuple[str, ...]]:
    columns = (confusion.classes, confusion.examples, confusion.predicted, confusion.hits)
    return [
        (name, f"{examples:,}", f"{predicted:,}", _share(hits, examples), _share(hits, predicted))
        for name, examples, predicted, hits in zip(*columns, strict=True)
    ]


def _pairs(confusion: Confusion) -> list[tuple[str, ...]]:
    wrong = confusion.cells[confusion.cells[:, 0] != confusion.cells[:, 1]]
    most = wrong[np.argsort(-wrong[:, 2], kind="stable")][:_PAIRS]
    names, examples = confusion.classes, confusion.examples
    return [(names[of], names[taken], f"{count:,}", _share(count, examples[of])) for of, taken, count in most]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _short(name: str) -> str:
    """Beginning and end: names of one kind tend to differ there."""
    return plain(name if len(name) <= _NAME else f"{name[: _NAME - 6]}…{name[-5:]}")
