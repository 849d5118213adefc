"""The tables of the benchmark's JSON files, as its parts print them and docs/performance.md shows them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.lib.tables.forest import Row, compare
from scripts.lib.tables.render import interval_text, mean_text

Results = Mapping[str, Any]  # what a file of results/benchmark has
RUNS = {"cv": "CIFAR", "nlp": "RTE"}
RENEWAL = {  # factors and steps between their renewals -> cell of the table cifar100_few_renewal
    ("full", 1): "curvature",
    ("full", 2): "every_2",
    ("full", 4): "every_4",
    ("full", 8): "every_8",
    ("diagonal", 1): "diagonal",
    ("diagonal", 4): "diagonal_4",
}
# bases and intervals of the table of exactness; its file has more
HELD = (("own, 0", 2), ("own, 0", 10), ("own, 0", 100), ("own, 0.03", 100), ("update", 100))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (list(rows[0]), *(row.values() for row in rows))]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def method(results: Results) -> str:
    """DSKD's share of a training step, and what it consists of."""
    rows = []
    for result in results["results"]:
        settings, seconds = result["settings"], medians(result["seconds"])
        expansion, choice = _number(seconds["expand"]), _number(seconds["choose directions"])
        kept, peak = result["kept_copies_of_matched_weights"], result["copies_at_the_peak_of_a_refresh"]
        rows.append(
            {
                "recipe": result["case"],
                "training step without DSKD, s": _number(seconds["step"]),
                "DSKD, s a step": _number(result["dskd_seconds_per_step"]),
                "share": f"{100 * result['share_of_step']:.2f}%",
                "SVD in every step / DSKD": f"{result['per_step_svd_over_dskd']:.0f}",
                "held loss, s": _number(seconds["held"]),
                "exact gradient, s (every ... steps)": f"{expansion} ({settings['grad_steps']})",
                "choice, s (every ... steps)": f"{choice} ({settings['svd_steps']}, `{settings['driver']}`)",
                "copies kept (peak)": f"{kept:.2f} ({peak:.2f})",
            }
        )
    return table(rows)


def curvature(results: Results) -> str:
    """The share of a step of each setting, beside what it gains in the table cifar100_few_renewal."""
    rows = []
    for (factors, every), cell in RENEWAL.items():
        steps = "every step" if every == 1 else f"every {every} steps"
        shares = {
            each["case"]: f"{100 * each['share_of_step'][f'{factors} {every}']:.1f}%" for each in results["cases"]
        }
        gain = compare(Row(label=cell, table="cifar100_few_renewal", task="*", cell=cell, versus="kd"))
        rows.append({"factors": factors, "renewed": steps, **shares, "minus KD": interval_text(gain)})
    return table(rows)


def growth(results: Results) -> str:
    """From the first to the last point of every line."""
    lines = {
        "size": "size of 4 matrices, rank 32",
        "rank": "rank, 4 matrices of size 512",
        "pairs": "pairs of size 256, rank 32",
        "processes": "processes, 8 pairs of size 512",
    }
    names = {"choose directions": "choice of directions", "expand": "exact gradient", "held": "held loss"}
    names["SVD in every step"] = "SVD with autograd"
    rows = []
    for line, what in lines.items():
        points = sorted(results["lines"][line].items(), key=lambda point: int(point[0]))
        (first, low), (last, high) = points[0], points[-1]
        cells = {f"{shown}, ms": _range(1000, low.get(name), high.get(name)) for name, shown in names.items()}
        rows.append({"what grows": what, "from–to": f"{first}–{last}", **cells})
    return table(rows)


def exactness(results: Results) -> str:
    """Cosine of the applied gradient with the exact one over an interval, mean (worst pair)."""
    rows = []
    for program, run in RUNS.items():
        for stage, by_basis in results[program]["by_grad_steps"].items():
            cells = {
                f"{_basis(basis)}, {steps} steps": _cosine(by_basis.get(basis, {}).get(str(steps)))
                for basis, steps in HELD
            }
            rows.append({"run, stage": f"{run}, {stage}", **cells})
    return table(rows)


def drivers(results: Results) -> str:
    """Of gradient and direction weights in float32 beside an SVD in float64, and of the authors' release."""
    rows = []
    for program, run in RUNS.items():
        by_driver = results[program]["drivers"]
        gradients = {f"gradient, `{name}`": _cosine(by_driver[name]["gradient"], 4) for name in ("gram", "svd")}
        overlap = _cosine(by_driver["randomized"]["overlap"], 4)
        release = _cosine(results[program]["released"], 4)
        rows.append({"run": run, **gradients, "weights, `randomized`": overlap, "gradient, authors' release": release})
    return table(rows)


def cv(results: Results) -> str:
    """Images per second and memory of both loops."""
    rows = []
    for precision, result in results["precisions"].items():
        rates = {f"{loop}, images a second": _spread(found, 0) for loop, found in result["images_per_second"].items()}
        memory = {f"{loop}, MB": f"{size / 1e6:.0f}" for loop, size in result["peak_memory_bytes"].items()}
        rows.append({"precision": precision, **rates, "ours / plain": f"{result['ratio']:.2f}", **memory})
    return table(rows)


def step(results: Results) -> str:
    """The parts of a step of our CIFAR loop, in percent of the step."""
    rows = []
    for precision, result in results["precisions"].items():
        shares = {part: f"{100 * share:.1f}%" for part, share in result["step"]["share"].items()}
        rows.append({"precision": precision, **shares})
    return table(rows)


def runs(results: Results) -> str:
    """Images per second of one run with all cores and of as many runs as there are cores."""
    rows, number = [], results["runs_at_once"]
    names = {"one": f"one run, {number} threads", "many": f"{number} runs at once, one thread each"}
    for precision, result in results["precisions"].items():
        found = result["runs"]
        rates = {f"{names[kind]}: images a second": _spread(x, 0) for kind, x in found["images_per_second"].items()}
        rows.append({"precision": precision, **rates, "ratio": f"{found['ratio']:.2f}"})
    return table(rows)


def compiled(results: Results) -> str:
    """Images per second of our CIFAR loop without and with SOLVER.COMPILE."""
    rows = []
    for precision, result in results["precisions"].items():
        rates = {f"{name}, images a second": _spread(x, 0) for name, x in result["images_per_second"].items()}
        first = f"{result['first_step_seconds']:.0f}"
        rows.append(
            {"precision": precision, **rates, "ratio": f"{result['ratio']:.2f}", "first step compiled, s": first}
        )
    return table(rows)


def nlp(results: Results) -> str:
    """Examples per second of both loops, metric of all trainings: mean ± standard deviation over the seeds."""
    rows = []
    for task, result in results["tasks"].items():
        measured = result["examples_per_second"].items()
        rates = {f"{loop}, examples a second": _spread(found, 1) for loop, found in measured}
        tokens = f"{result['tokens_per_example']['ours']:.0f}"
        found = result["dev_metric"].items()
        metrics = {f"{name}, metric": mean_text([100 * x for x in values], 1) for name, values in found}
        rows.append(
            {"task": task, **rates, "ours / plain": f"{result['ratio']:.2f}", "ours, tokens": tokens, **metrics}
        )
    return table(rows)


def startup(results: Results) -> str:
    """Seconds of every command."""
    return table([{"command": name, "s": _spread(found, 2)} for name, found in results["seconds"].items()])


# of the page: what stands between which markers, and the file that it comes from
TABLES: Mapping[str, tuple[str, Callable[[Results], str]]] = {
    "method": ("method", method),
    "curvature": ("curvature", curvature),
    "growth": ("growth", growth),
    "exactness": ("exactness", exactness),
    "drivers": ("exactness", drivers),
    "cv": ("cv", cv),
    "step": ("cv", step),
    "runs": ("cv", runs),
    "nlp": ("nlp", nlp),
    "startup": ("startup", startup),
}


def medians(seconds: Results) -> dict[str, float]:
    """Of summaries by name (timing.py)."""
    return {name: found["median"] for name, found in seconds.items()}


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _range(scale: float, first: float | None, last: float | None) -> str:
    return "" if first is None or last is None else f"{_number(scale * first)}–{_number(scale * last)}"


def _spread(found: Results, digits: int) -> str:
    """Median (lowest–highest)."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}–{found['max']:.{digits}f})"


def _cosine(found: Results | None, digits: int = 3) -> str:
    return "" if found is None else f"{found['mean']:.{digits}f} ({found['worst']:.{digits}f})"


def _basis(name: str) -> str:
    basis, _, smoothing = name.partition(", ")
    return f"`{basis}`" + (f" smoothed by {smoothing}" if smoothing not in ("", "0") else "")
