"""The directions that a run with DSKD has chosen, and the spectra around them, drawn for the page."""

from typing import Any

import matplotlib as mpl
import numpy as np

from common.run.errors import UserError
from scripts.lib.report import heatmaps, plots
from scripts.lib.report.load import Run
from scripts.lib.report.networks import has_networks, weight_pairs
from scripts.lib.report.spectra import first_middle_last, singular_values, update_spectra, weight_spectrum


def directions(run: Run) -> dict[str, Any] | None:
    """Which, how many, for how long, and how close; nothing without DSKD, None before the first choice."""
    if not run.choices:
        return None if run.has_dskd else {}
    drawn, pairs = heatmaps.thinned(run.choices), run.pairs
    curvature = run.setting("DSKD.BASIS", "basis") == "curvature"
    return {
        "ranked_by": "eigenvalue of the curvature" if curvature else "singular value of the update",
        "steps": [choice.step for choice in run.choices],
        "drawn": len(drawn),
        "legend": heatmaps.weight_legend(),
        "maps": {pair: heatmaps.weight_map(drawn, pair, run.last_step) for pair in pairs},
        "overlap": _overlap(run),
        "distance": _distance(run),
        "effective": heatmaps.effective_map(drawn, pairs, run.last_step),
        "pairs": [_figures(run, pair) for pair in pairs],
    }


def spectra_of_updates(run: Run) -> dict[str, Any] | None:
    """Those of the first, a middle and the last choice; none where no singular value is known."""
    shown = first_middle_last(run.choices)
    panels = update_spectra(shown, run.pairs)
    return {"steps": [choice.step for choice in shown], "panels": panels} if panels else None


def spectra_of_weights(run: Run) -> dict[str, Any] | None:
    """Those of the exported student and its teacher, or why they are missing; nothing before the export."""
    if not has_networks(run):
        return None
    try:
        found = [(name, *map(singular_values, weights)) for name, *weights in weight_pairs(run)]
    except UserError as error:
        return {"missing": error}
    return {"panels": {name: weight_spectrum(student, teacher) for name, student, teacher in found}}


def _overlap(run: Run) -> str | None:
    if len(run.choices) < 2:
        return None
    shared, jaccard = heatmaps.overlaps(run.choices, run.pairs)
    steps = np.array([choice.step for choice in run.choices[1:]])
    lines = {"weights": (steps, shared.mean(1)), "sets": (steps, jaccard.mean(1))}
    return plots.curves(lines, "share kept", dashed="sets", band=(shared.min(1), shared.max(1)))


def _distance(run: Run) -> str:
    steps, pairs = np.array([choice.step for choice in run.choices]), run.pairs
    rows = np.array([[choice.distance[pair] for choice in run.choices] for pair in pairs])
    labels = [pair if pair in (pairs[0], pairs[-1]) else f"_{pair}" for pair in pairs]
    lines = {label: (steps, row) for label, row in zip(labels, rows, strict=True)} | {"mean": (steps, rows.mean(0))}
    colors = [*mpl.colormaps["viridis"](np.linspace(0, 0.92, len(pairs))), plots.COLORS[1]]
    return plots.curves(lines, "relative distance", colors=colors, dashed="mean", span=plots.DISTANCE_SPAN)


def _figures(run: Run, pair: str) -> list[Any]:
    """What the template's table of layer pairs has in a row."""
    first, last = run.choices[0], run.choices[-1]
    index, weight, _ = last.weights[pair]
    chosen = [len(index), f"{last.effective(pair):.1f}", index[weight.argmax()] + 1, f"{weight.max():.3f}"]
    return [pair, *chosen, f"{first.distance[pair]:.4f}", f"{last.distance[pair]:.4f}"]
