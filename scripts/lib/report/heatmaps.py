"""What became of the directions: heat maps and overlaps from the choices of a run."""

from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import NullLocator

from common.run.figures import plain
from scripts.lib.report.load import Choice, Selected
from scripts.lib.report.plots import drawing, panel, svg

_COLUMNS = 150  # choices drawn at most
_LINEAR, _ROWS = 64, 48  # of more directions than 64, neighbours share one of 48 logarithmic rows, not to vanish
_COLORS = "viridis"  # bright is much
_WEIGHTS = LogNorm(1e-3, 1, clip=True)


def thinned(choices: Sequence[Choice]) -> list[Choice]:
    """At most `_COLUMNS` of them, evenly spread, the first and the last included."""
    places = np.linspace(0, len(choices) - 1, min(len(choices), _COLUMNS)).round().astype(int)
    return [choices[i] for i in places]


def weight_map(choices: Sequence[Choice], pair: str, end: int) -> str:
    """Weight of every direction of a pair (1 = largest singular value) from each choice to the next, at last `end`."""
    chosen = [choice.weights[pair] for choice in choices]
    count = 1 + max(each.index.max() for each in chosen)
    edges = np.arange(1, count + 2) if count <= _LINEAR else np.unique(np.geomspace(1, count + 1, _ROWS + 1).round())
    weights = [np.histogram(each.index + 1, bins=edges, weights=each.weight)[0] for each in chosen]
    with panel() as (figure, axis):
        seen = np.ma.masked_equal(weights, 0).T
        axis.pcolormesh(_spans(choices, end), edges, seen, norm=_WEIGHTS, cmap=_COLORS, rasterized=True)
        axis.set_facecolor("black")
        if count > _LINEAR:
            axis.set_yscale("log")
            axis.yaxis.set_minor_locator(NullLocator())
        axis.invert_yaxis()
        axis.set_ylabel("direction")
        axis.yaxis.set_major_formatter("{x:g}")
        return svg(figure)


def weight_legend() -> str:
    """The colours of `weight_map`."""
    with drawing((4.2, 0.75)) as (figure, axis):
        mappable = mpl.cm.ScalarMappable(_WEIGHTS, _COLORS)
        label = "weight of a direction (black: not selected)"
        bar = figure.colorbar(mappable, cax=axis, orientation="horizontal", ticks=[1e-3, 1e-2, 1e-1, 1], label=label)
        bar.set_ticklabels(["0.001 or less", "0.01", "0.1", "1"])
        return svg(figure)


def effective_map(choices: Sequence[Choice], pairs: Sequence[str], end: int) -> str:
    """Effective number of directions of every pair, a row each."""
    values = np.array([[choice.effective(pair) for choice in choices] for pair in pairs])
    with drawing((6.2, 1.2 + 0.19 * len(pairs)), font=8) as (figure, axis):
        scale = LogNorm(1, max(2.0, values.max()))
        x, y = _spans(choices, end), np.arange(len(pairs) + 1)
        mesh = axis.pcolormesh(x, y, values, norm=scale, cmap=_COLORS, rasterized=True)
        axis.set_yticks(y[:-1] + 0.5, [plain(pair) for pair in pairs])
        axis.invert_yaxis()
        axis.set_xlabel("optimizer step")
        bar = figure.colorbar(mesh, pad=0.02, format="%g", label="effective directions")
        bar.ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
        return svg(figure)


def overlaps(choices: Sequence[Choice], pairs: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of consecutive choices, (choices - 1, pairs): sum_i min(w_i, w'_i), and the Jaccard index of the sets."""
    rows = [[_overlap(a.weights[pair], b.weights[pair]) for pair in pairs] for a, b in pairwise(choices)]
    return tuple(np.moveaxis(np.array(rows), -1, 0))


def _overlap(before: Selected, after: Selected) -> tuple[float, float]:
    common, i, k = np.intersect1d(before.index, after.index, return_indices=True)
    weight = np.minimum(before.weight[i] / before.weight.sum(), after.weight[k] / after.weight.sum()).sum()
    return float(weight), len(common) / (len(before.index) + len(after.index) - len(common))


def _spans(choices: Sequence[Choice], end: int) -> list[int]:
    steps = [choice.step for choice in choices]
    return [*steps, max(end, steps[-1] + 1)]
