"""Curves over the steps of a run, as SVG text."""

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from common.run.figures import plain

Series = dict[str, tuple[np.ndarray, np.ndarray]]

DISTANCE_SPAN = 0.01  # the least that an axis of relative distances covers
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")
_MANY_CHOICES, _MANY_POINTS = 30, 40
_COLUMN_WIDTH, _LEGEND_WIDTH = 20, 64  # characters of a label that fit into half of a plot's width, and into all of it


def curves(
    series: Series,
    ylabel: str,
    *,
    steps_per_epoch: float | None = None,
    choices: Sequence[int] = (),
    legend: Sequence[str] = (),
    colors: Sequence = COLORS,
    dashed: str = "",
    band: tuple[np.ndarray, np.ndarray] | None = None,
    best: bool = False,
    span: float | None = None,
) -> str:
    """Lines over the steps.

    Args:
        series: label -> (steps, values); a label that starts with "_" is left out of the legend.
        steps_per_epoch: adds an axis of epochs on top.
        choices: steps of choices of directions, dotted if there are not too many.
        legend: labels of all plots of a page, so that each has one colour throughout; names even a single line.
        dashed: label of a line that is drawn dashed.
        band: from where to where the area around the first line is filled.
        best: marks the highest value of every line.
        span: the least that the axis of values covers, not to magnify noise; without it the axis starts at 0.
    """
    order = list(legend) or list(series)
    labels = {label: textwrap.fill(plain(label), _LEGEND_WIDTH) for label in series}
    shown = [label for label in labels.values() if not label.startswith("_")]
    columns = 1 if len(shown) > 4 or max(map(len, shown), default=0) > _COLUMN_WIDTH else len(shown)
    lines = sum(label.count("\n") + 1 for label in shown) if columns == 1 else 1
    with drawing((4.6, 2.9 + 0.17 * max(lines - 2, 0))) as (figure, axis):
        for step in choices if len(choices) <= _MANY_CHOICES else ():
            axis.axvline(step, color="#bbbbbb", linestyle=":", linewidth=0.8)
        if band:
            axis.fill_between(next(iter(series.values()))[0], *band, color=colors[0], alpha=0.2, linewidth=0)
        for label, (steps, values) in series.items():
            turn, place = divmod(order.index(label), len(colors))
            style = "--" if label == dashed else STYLES[turn % len(STYLES)]
            looks = {"color": colors[place], "linestyle": style, "linewidth": 1.3, "markersize": 4}
            marker = "o" if len(steps) == 1 else "." if len(steps) < _MANY_POINTS else None
            axis.plot(steps, values, label=labels[label], marker=marker, **looks)
            if best:
                axis.plot(
                    steps[values.argmax()], values.max(), "o", color=colors[place], fillstyle="none", markersize=7
                )
        axis.set(xlabel="optimizer step", ylabel=plain(ylabel))
        axis.set_xlim(_widened(axis.get_xlim(), 2))
        axis.set_ylim((0, 1.05 * axis.get_ylim()[1]) if span is None else _widened(axis.get_ylim(), span))
        if steps_per_epoch:
            functions = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
            axis.secondary_xaxis("top", functions=functions).set_xlabel("epoch")
        if legend or len(series) > 1:
            figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
        return svg(figure)


def _widened(limits: tuple[float, float], span: float) -> tuple[float, float]:
    low, high = limits
    margin = max(span - (high - low), 0) / 2
    return low - margin, high + margin


@contextmanager
def panel() -> Iterator[tuple[Figure, Axes]]:
    """A small drawing, one of many: the same margins in all, so that they line up and take little time."""
    with drawing((2.1, 1.65), font=8, layout=None) as (figure, axis):
        figure.subplots_adjust(left=0.28, right=0.92, bottom=0.15, top=0.95)
        yield figure, axis


@contextmanager
def drawing(
    size: tuple[float, float] = (4.6, 2.9), font: float = 9, layout: str | None = "constrained"
) -> Iterator[tuple[Figure, Axes]]:
    """A figure of this size in inches with one axis; the same data give the same SVG."""
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context({"svg.hashsalt": "report", "font.size": font, "axes.formatter.useoffset": False, **spines}):
        figure = Figure(figsize=size, layout=layout)
        axis = figure.subplots()
        axis.xaxis.set_major_locator(MaxNLocator(6 if size[0] > 4 else 3, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 150k
        yield figure, axis


def svg(figure: Figure) -> str:
    """The drawn figure as text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=200)
    return buffer.getvalue()
