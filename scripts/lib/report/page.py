"""The page of one run, or of several that are compared: page.html.j2 with what is drawn and counted in Python."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from scripts.lib.report import curves
from scripts.lib.report.classes import mixed_up
from scripts.lib.report.directions import directions, spectra_of_updates, spectra_of_weights
from scripts.lib.report.facts import figures, headline
from scripts.lib.report.labels import labels
from scripts.lib.report.load import Run


def report(runs: Sequence[Run]) -> str:
    """One HTML file with everything in it; jinja2 escapes all text that comes from the runs' files."""
    found = figures(runs)
    if len(runs) == 1:
        (run,) = runs
        names = ["All settings"]
        content = {
            "title": f"{run.method} on {run.task}, seed {run.seed}",
            "results": [(name, *values) for name, values in found.items()],
            "curves": curves.of_one(run),
            "confusion": run.confusion and mixed_up(run.confusion),
            "directions": directions(run),
            "update_spectra": spectra_of_updates(run),
            "weight_spectra": spectra_of_weights(run),
        }
    else:
        names = labels(runs)
        content = {
            "title": f"{len(runs)} runs on {', '.join(dict.fromkeys(run.task for run in runs))}",
            "results": list(zip(names, *found.values(), strict=True)),
            "measured": list(found),
            "curves": curves.of_several(runs, names),
        }
    content["runs"] = [(name, headline(run), run.settings.items()) for name, run in zip(names, runs, strict=True)]
    templates = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda svg: base64.b64encode(svg.encode()).decode()
    page = environment.get_template("page.html.j2").render(content)
    return page.encode("utf-8", "replace").decode()  # file names and settings can hold what UTF-8 cannot
