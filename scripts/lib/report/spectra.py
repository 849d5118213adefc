"""Singular values: of the updates that directions were chosen in, and of the weights that are aligned."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from common.run.errors import UserError
from scripts.lib.report.load import Choice
from scripts.lib.report.plots import COLORS, panel, svg

# (decades that an axis spans at most, where its ticks are in each of them)
_TICKS = ((0.8, (1, 1.2, 1.5, 2, 3, 5)), (2, (1, 2, 5)), (np.inf, (1,)))


def first_middle_last(choices: Sequence[Choice]) -> list[Choice]:
    """Three of them, or as many as there are."""
    return [choices[i] for i in sorted({0, len(choices) // 2, len(choices) - 1}) if choices]


def update_spectra(choices: Sequence[Choice], pairs: Sequence[str]) -> dict[str, str]:
    """Singular values of the selected directions, from the first choice (light) to the last, on axes of one range.

    Pairs of which none is known are left out.
    """
    known = {pair: [_known(choice, pair) for choice in choices] for pair in pairs}
    known = {pair: curves for pair, curves in known.items() if any(len(sigma) for _, sigma in curves)}
    least = min((sigma.min() for curves in known.values() for _, sigma in curves if len(sigma)), default=1)
    blues = mpl.colormaps["Blues"](np.linspace(1, 0.4, len(choices))[::-1])
    looks = [{"color": color, "marker": ".", "markersize": 3, "linewidth": 0.8} for color in blues]
    return {pair: _spectrum(curves, looks, least / 1.2, 1.2) for pair, curves in known.items()}


def singular_values(weight: Tensor) -> np.ndarray:
    """Falling; of a convolution, of its matrix with a row for each output channel.

    Raises:
        UserError: the weights are not finite, as those of a run that diverged.
    """
    if not weight.isfinite().all():
        raise UserError("there are weights that are not finite")
    return torch.linalg.svdvals(weight.detach().float().flatten(1)).numpy()


def weight_spectrum(student: np.ndarray, teacher: np.ndarray) -> str:
    """Both spectra; values below 1e-4 of the largest are left out."""
    kept = [values[values > 1e-4 * values.max(initial=0)] for values in (student, teacher)]
    present = np.concatenate(kept) if any(map(len, kept)) else np.ones(1)  # zero matrices have no spectrum
    looks = [{"color": COLORS[0], "linewidth": 1.2}, {"color": COLORS[1], "linewidth": 1.2, "linestyle": "--"}]
    curves = [(np.arange(1, len(values) + 1), values) for values in kept]
    return _spectrum(curves, looks, present.min() / 1.1, present.max() * 1.1)


def _known(choice: Choice, pair: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers from 1 and singular values of the selected directions, where there are any."""
    index, _, sigma = choice.weights[pair]
    return index[sigma > 0] + 1, sigma[sigma > 0]


def _spectrum(curves: Sequence[tuple[np.ndarray, np.ndarray]], looks: Sequence[dict], low: float, high: float) -> str:
    """Singular values on an axis from `low` to `high`, with as many plain numbers as there is room for."""
    places = next(places for decades, places in _TICKS if np.log10(high / low) <= decades)
    with panel() as (figure, axis):
        for (index, sigma), look in zip(curves, looks, strict=True):
            axis.plot(index, sigma, **look)
        axis.set(yscale="log", ylim=(low, high), ylabel="singular value")
        axis.yaxis.set_major_locator(LogLocator(subs=places))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        return svg(figure)
