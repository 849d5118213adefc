"""The demo's table and plot, from the run records."""

import json
import statistics
import time
from pathlib import Path


def read_result(folder: Path) -> dict:
    """result.json of a run."""
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def size_mb(folder: Path) -> float:
    """Size of the weights on disk, in 10^6 bytes."""
    return (folder / "model.safetensors").stat().st_size / 1e6


def text_latency(folder: Path, texts: list[str], repeats: int = 30) -> float:
    """Median milliseconds for one text at a time, tokenisation included."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def classify(text: str) -> None:
        with torch.inference_mode():
            model(**tokenizer(text, return_tensors="pt"))

    return _median_ms(classify, texts[:repeats])


def image_latency(folder: Path, repeats: int = 30) -> float:
    """Median milliseconds for one image at a time."""
    import torch

    from cv.export import load_model

    model, info = load_model(folder)
    image = torch.zeros(1, info["in_channels"], info["image_size"], info["image_size"])

    def classify(_: int) -> None:
        with torch.inference_mode():
            model(image)

    return _median_ms(classify, list(range(repeats)))


def write_table(path: Path, title: str, rows: list[dict[str, str]]) -> str:
    """Write and return a Markdown table under a title."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]

    def line(cells) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    body = [line(columns), line(["-" * width for width in widths]), *(line(row.values()) for row in rows)]
    text = "\n".join([f"**{title}**", "", *body]) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def plot(
    path: Path, panels: list[tuple[str, str, dict[str, list[float]]]], curve: list[list[tuple[int, float]]]
) -> None:
    """One panel of bars a pipeline (title, axis, label -> values of the seeds) and the DSKD loss over the steps.

    curve: (step, loss) points, one list for every choice of directions, between which the loss is not comparable.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(4.6 * (len(panels) + 1), 3.6), layout="constrained")
    for axis, (title, label, values) in zip(axes, panels, strict=False):
        names = list(values)
        means = [statistics.fmean(values[name]) for name in names]
        axis.barh(names, means, color=["#b9c3cf" if "DSKD" not in name else "#2f6f9f" for name in names])
        for place, name in enumerate(names):
            axis.plot(values[name], [place] * len(values[name]), "k.", markersize=5)
        every = [value for name in names for value in values[name]]
        spread = (max(every) - min(every)) or 1.0
        axis.set_xlim(min(every) - spread, max(every) + 0.15 * spread)  # bars do not start at zero: said in the label
        axis.invert_yaxis()
        axis.set(title=title, xlabel=f"{label} (axis cut)")
    for part in curve:
        axes[-1].plot(*zip(*part, strict=True), color="#2f6f9f")
    axes[-1].set(title="DSKD loss (text)", ylabel="mean over layer pairs", ylim=(0, None))
    axes[-1].set_xlabel("optimizer step (gap: new directions)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _median_ms(work, inputs: list) -> float:
    for value in inputs[:5]:
        work(value)
    times = []
    for value in inputs:
        start = time.perf_counter()
        work(value)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
