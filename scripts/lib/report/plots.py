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

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")
_MANY_CHOICES = 30
_COLUMN_WIDTH, _LEGEND_WIDTH = 20, 64  # characters of a label that fit into half of a plot's width, and into all of it


def curves(
    series: Series,
    ylabel: str,
    *,
    xlabel: str = "optimizer step",
    steps_per_epoch: float | None = None,
    choices: Sequence[int] = (),
    legend: Sequence[str] = (),
    best: bool = False,
    zero: bool = False,
) -> str:
    """Lines over the steps.

    Args:
        series: label -> (steps, values).
        steps_per_epoch: adds an axis of epochs on top.
        choices: steps of choices of directions, dotted if there are not too many.
        legend: labels of all plots of a page, so that each has one colour throughout; names even a single line.
        best: marks the highest value of every line.
        zero: starts the axis of values at 0.
    """
    order = list(legend) or list(series)
    labels = {label: textwrap.fill(plain(label), _LEGEND_WIDTH) for label in series}
    columns = 1 if len(series) > 4 or max(map(len, labels.values())) > _COLUMN_WIDTH else 2
    lines = sum(label.count("\n") + 1 for label in labels.values()) if columns == 1 else 2
    with drawing((4.6, 2.9 + 0.17 * max(lines - 2, 0))) as (figure, axis):
        for step in choices if len(choices) <= _MANY_CHOICES else ():
            axis.axvline(step, color="#bbbbbb", linestyle=":", linewidth=0.8)
        for label, (steps, values) in series.items():
            turn, place = divmod(order.index(label), len(COLORS))
            color, style = COLORS[place], STYLES[turn % len(STYLES)]
            marker = "." if len(steps) < 40 else None
            looks = {"color": color, "linewidth": 1.3, "marker": marker, "markersize": 4}
            axis.plot(steps, values, style, label=labels[label], **looks)
            if best:
                axis.plot(steps[values.argmax()], values.max(), "o", color=color, markerfacecolor="white", markersize=6)
        axis.set(xlabel=xlabel, ylabel=plain(ylabel))
        if zero:
            axis.set_ylim(bottom=0)
        if steps_per_epoch:
            functions = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
            axis.secondary_xaxis("top", functions=functions).set_xlabel("epoch")
        if legend or len(series) > 1:
            figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
        return svg(figure)


def band(steps: Sequence[int], rows: np.ndarray, dashed: np.ndarray, ylabel: str) -> str:
    """Mean of (steps, pairs) rows with their range, and a dashed mean of others of that shape."""
    with drawing() as (figure, axis):
        axis.fill_between(steps, rows.min(1), rows.max(1), color=COLORS[0], alpha=0.2, linewidth=0)
        axis.plot(steps, rows.mean(1), color=COLORS[0], linewidth=1.5, marker="." if len(steps) < 40 else None)
        axis.plot(steps, dashed.mean(1), "--", color=COLORS[1], linewidth=1.2)
        axis.set(xlabel="optimizer step", ylabel=ylabel, ylim=(-0.02, 1.02))
        return svg(figure)


def bundle(steps: Sequence[int], rows: np.ndarray, ylabel: str) -> str:
    """A line for each of (steps, pairs) rows, the first pair dark and the last light, and their mean dashed."""
    with drawing() as (figure, axis):
        colors = mpl.colormaps["viridis"](np.linspace(0, 0.92, rows.shape[1]))
        marker = "." if len(steps) < 2 else None
        for values, color in zip(rows.T, colors, strict=True):
            axis.plot(steps, values, color=color, linewidth=1, marker=marker)
        axis.plot(steps, rows.mean(1), "--", color="#d55e00", linewidth=1.8, marker=marker)
        axis.set(xlabel="optimizer step", ylabel=ylabel)
        return svg(figure)


@contextmanager
def panel() -> Iterator[tuple[Figure, Axes]]:
    """A small drawing, one of many: the same margins in all, so that they line up and take little time."""
    with drawing((2.3, 1.8), font=8, layout=None) as (figure, axis):
        figure.subplots_adjust(left=0.26, right=0.92, bottom=0.14, top=0.95)
        yield figure, axis


@contextmanager
def drawing(
    size: tuple[float, float] = (4.6, 2.9), font: float = 9, layout: str | None = "constrained"
) -> Iterator[tuple[Figure, Axes]]:
    """A figure of this size in inches with one axis; the same data give the same SVG."""
    style = {
        "svg.hashsalt": "report",
        "font.size": font,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
    }
    with mpl.rc_context(style):
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
