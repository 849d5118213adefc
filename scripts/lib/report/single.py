"""The report of one run."""

import numpy as np

from common.run.errors import UserError
from scripts.lib.report import heatmaps, plots
from scripts.lib.report.facts import RESULT_HEADER, headline, result_row
from scripts.lib.report.load import Run, metric_name
from scripts.lib.report.networks import has_networks, weight_pairs
from scripts.lib.report.page import details, grid, note, page, picture, section, table
from scripts.lib.report.spectra import first_middle_last, singular_values, update_spectra, weight_spectrum


def report(run: Run) -> str:
    """The HTML page."""
    title = f"{run.method} on {run.task}, seed {run.seed}"
    parts = [
        table(headline(run)),
        section("Result", table([result_row(run, "this run")], RESULT_HEADER, "Figures of the run")),
        section("Training", grid(_training(run)) or note("There is no log line with numbers yet.")),
        _directions(run),
        _update_spectra(run),
        _weight_spectra(run),
        section("Settings", details("All settings", table(list(run.settings.items()), ("setting", "value")))),
    ]
    return page(title, parts)


def _training(run: Run) -> list[str]:
    steps = [choice.step for choice in run.choices]
    jumps = " Dotted lines: new directions; between two of them values are comparable, across one they are not."
    drawn = []

    def add(keys: dict[str, str], ylabel: str, alt: str, caption: str, **how) -> None:
        series = {label: run.series(key) for key, label in keys.items()}
        series = {label: points for label, points in series.items() if len(points[0])}
        if series:
            drawn.append(picture(plots.curves(series, ylabel, **how), alt, caption))

    parts = [key for key in ("task_loss", *run.keys("loss_")) if len(run.series(key)[0])] or ["loss"]
    add(
        {key: key.removeprefix("loss_") for key in parts},
        "loss",
        "Task loss over the optimizer steps",
        "Training loss without DSKD's part, each part with its weight in the total (no unit); falling is learning.",
        zero=True,
    )
    add(
        {"dskd_loss": "DSKD loss"},
        "DSKD loss",
        "DSKD loss over the optimizer steps",
        "DSKD loss, the mean over the layer pairs before lambda multiplies it (squared weight units): how far student "
        "and teacher are apart along the selected directions." + (jumps if steps else ""),
        choices=steps,
        zero=True,
    )
    add(
        {key: metric_name(key) for key in run.metric_keys},
        f"{metric_name(run.metric_keys[0]) if len(run.metric_keys) == 1 else 'metric'} ({run.metric_unit})",
        "Evaluation metric over the optimizer steps",
        f"What the student scores on data that it is not trained on ({run.metric_unit}), higher is better; the circle "
        "is the best value.",
        steps_per_epoch=run.steps_per_epoch,
        best=True,
    )
    add(
        {"effective_directions": "effective directions"},
        "effective directions",
        "Effective number of directions over the optimizer steps",
        "How many directions the weights amount to, 1 / sum of squared weights, mean over the layer pairs: 1 means "
        "that a single direction is aligned.",
        choices=steps,
        zero=True,
    )
    add(
        {"learning_rate": "learning rate"},
        "learning rate",
        "Learning rate over the optimizer steps",
        "Learning rate of the optimizer: steps down or falls along the schedule.",
        zero=True,
    )
    add(
        {"images_per_second": "images/s", "examples_per_second": "examples/s"},
        "images per second" if run.vision else "examples per second",
        "Throughput over the optimizer steps",
        f"{'Images' if run.vision else 'Examples'} per second of training, evaluation not counted; dips are other work "
        "on the machine, or first steps.",
        zero=True,
    )
    add(
        {"replacing_probability": "replacing probability"},
        "probability",
        "Replacing probability over the optimizer steps",
        "Probability with which a successor layer stands in for the predecessor's layers; at 1 the student runs alone.",
        zero=True,
    )
    return drawn


def _ranked_by(run: Run) -> str:
    basis = run.setting("DSKD.BASIS", "basis", "own")
    return "eigenvalue of the curvature" if basis == "curvature" else "singular value of the update"


def _directions(run: Run) -> str:
    if not run.choices:
        words = "No directions have been chosen (or recorded in directions.jsonl) yet." if run.has_dskd else ""
        return section("Directions", note(words)) if words else ""
    pairs = _pairs(run)
    end = run.last_step
    drawn = heatmaps.thinned(run.choices)
    less = f" Of {len(run.choices)} choices {len(drawn)} are drawn." if len(drawn) < len(run.choices) else ""
    panels = [
        picture(heatmaps.weight_map(drawn, pair, end), f"Weights of the directions of {pair} over the steps", pair)
        for pair in pairs
    ]
    return "\n".join(
        [
            section(
                "Which directions are aligned",
                note(
                    "A panel for each layer pair: to the right the optimizer step, downwards the direction, 1 being "
                    f"the largest {_ranked_by(run)} (logarithmic where there are many). Colour is the weight "
                    "of the direction in the loss, from each choice to the next; blank is not selected. One dark row "
                    "on top means that all weight lies on the leading direction." + less
                ),
                picture(heatmaps.weight_legend(), "Colour scale of the weights, from 0.001 to 1", "", kind="bar"),
                grid(panels, "panels"),
            ),
            section(
                "How many, for how long, and how close",
                grid(_choices_over_time(run, pairs)),
                picture(
                    heatmaps.effective_map(drawn, pairs, end),
                    "Effective number of directions of every layer pair over the steps",
                    "Effective number of directions, 1 / sum of squared weights, of every layer pair (a row each, from "
                    "the input of the network down) over the optimizer steps: dark spreads over many directions, "
                    "light concentrates on few.",
                    kind="wide",
                ),
                details("Figures of every layer pair", _pair_table(run, pairs)),
            ),
        ]
    )


def _pairs(run: Run) -> list[str]:
    return [pair for pair in run.choices[0].weights if all(pair in choice.weights for choice in run.choices)]


def _choices_over_time(run: Run, pairs: list[str]) -> list[str]:
    steps = [choice.step for choice in run.choices]
    distances = np.array([[choice.distance[pair] for pair in pairs] for choice in run.choices])
    drawn = []
    if len(steps) > 1:
        shared, jaccard = heatmaps.overlaps(run.choices, pairs)
        drawn.append(
            picture(
                plots.band(steps[1:], shared, jaccard, "share kept"),
                "Overlap of consecutive choices of directions over the steps",
                "How much of a choice is left in the next one, 1 is all: the sum of min(old weight, new weight), mean "
                "over the layer pairs (line) and their range (band); dashed, of the mere sets, common / either. A "
                "pair that kept its directions counts as 1.",
            )
        )
    drawn.append(
        picture(
            plots.bundle(steps, distances, "relative distance"),
            "Distance of the student's weights to the teacher's over the steps",
            "Distance of whole weights, ||W_s - W_t|| / ||W_t|| (Frobenius norms, no unit), a line for each layer pair "
            "from the first (dark) to the last (light), dashed their mean: 0 is the teacher's, about 1.4 an "
            "unrelated matrix of equal norm; the axis does not start at 0.",
        )
    )
    return drawn


def _pair_table(run: Run, pairs: list[str]) -> str:
    first, last = run.choices[0], run.choices[-1]
    rows = []
    for pair in pairs:
        index, weight, _ = last.weights[pair]
        cells = [len(index), f"{last.effective(pair):.1f}", index[weight.argmax()] + 1, f"{weight.max():.3f}"]
        rows.append([pair, *cells, f"{first.distance[pair]:.4f}", f"{last.distance[pair]:.4f}"])
    header = ["layer pair", "weights above 0", "effective directions", "heaviest direction", "its weight"]
    header += [f"distance at step {choice.step}" for choice in (first, last)]
    return table(rows, header, f"Directions chosen after step {last.step}")


def _update_spectra(run: Run) -> str:
    if not run.choices:
        return ""
    shown = first_middle_last(run.choices)
    panels = [
        picture(svg, f"Singular values of the updates of {pair} at their selected directions", pair)
        for pair, svg in update_spectra(shown, _pairs(run)).items()
    ]
    words = (
        "Singular values of the update in which directions were chosen, in units of its largest (logarithmic), against "
        "the direction, 1 being the largest. Every dot is a selected direction; of the others nothing is recorded. "
        f"From light to dark: the choices at step {', '.join(str(choice.step) for choice in shown)}; a pair "
        "that had none of its own by then has no line. Flat: the optimizer moves many directions equally far; steep: "
        "few."
    )
    return section("Spectra of the updates", note(words), grid(panels, "panels")) if panels else ""


def _weight_spectra(run: Run) -> str:
    title = "Spectra of the weights"
    if not has_networks(run):
        return ""
    try:
        found = [(name, *map(singular_values, weights)) for name, *weights in weight_pairs(run)]
    except UserError as error:
        return section(title, note(f"Left out: {error}"))
    panels = [
        picture(weight_spectrum(student, teacher), f"Singular values of {name}, student and teacher", name)
        for name, student, teacher in found
    ]
    words = (
        "Singular values of the exported student's weights (solid) and of the teacher's (dashed), largest first, on a "
        "logarithmic axis (weight units): where the lines meet, the weights are equally strong, not necessarily equal."
    )
    return section(title, note(words), grid(panels, "panels"))
