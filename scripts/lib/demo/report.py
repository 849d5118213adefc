"""The demo's table and plot, from the run records."""

import itertools
import json
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from common.run.figures import drawn
from common.run.files import write_text


def read_result(folder: Path) -> dict:
    """result.json of a run."""
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def size_mb(folder: Path) -> float:
    """Size of the weights on disk, in 10^6 bytes."""
    return (folder / "model.safetensors").stat().st_size / 1e6


def text_latency(folder: Path, texts: list[str]) -> float:
    """Median milliseconds for one text at a time, tokenisation included."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    turns = itertools.cycle(texts)
    with torch.inference_mode():
        return _median_ms(lambda: model(**tokenizer(next(turns), return_tensors="pt")))


def image_latency(folder: Path) -> float:
    """Median milliseconds for one image at a time."""
    import torch

    from cv.export import load_model

    model, info = load_model(folder)
    image = torch.zeros(1, info["in_channels"], info["image_size"], info["image_size"])
    with torch.inference_mode():
        return _median_ms(lambda: model(image))


def write_table(path: Path, title: str, rows: list[dict[str, str]]) -> str:
    """Write and return a Markdown table under a title."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]

    def line(cells) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    body = [line(columns), line(["-" * width for width in widths]), *(line(row.values()) for row in rows)]
    text = "\n".join([f"**{title}**", "", *body]) + "\n"
    write_text(path, text)
    return text


def plot(folder: Path, panels: list[tuple[str, str, dict[str, list[float]]]], dskd_run: Path) -> None:
    """Write `demo.png` and `demo.svg`: bars for each pipeline and the DSKD loss over the steps of a run.

    panels: title, axis and label -> values of the seeds, of each pipeline.
    """
    log = pd.read_json(dskd_run / "metrics.jsonl", lines=True).dropna(subset="dskd_loss")
    between = read_result(dskd_run)["dskd"]["svd_steps"]
    with drawn(folder, "demo", (4.6 * (len(panels) + 1), 3.6)) as figure:
        *bars, curve = figure.subplots(1, len(panels) + 1)
        for axis, (title, label, values) in zip(bars, panels, strict=True):
            colors = ["#2f6f9f" if "DSKD" in name else "#b9c3cf" for name in values]
            axis.barh(list(values), [statistics.fmean(seeds) for seeds in values.values()], color=colors)
            for place, seeds in enumerate(values.values()):
                axis.plot(seeds, [place] * len(seeds), "k.", markersize=5)
            every = [value for seeds in values.values() for value in seeds]
            spread = (max(every) - min(every)) or 1.0
            axis.set_xlim(min(every) - spread, max(every) + 0.15 * spread)  # not from zero: said in the label
            axis.invert_yaxis()
            axis.set(title=title, xlabel=f"{label} (axis cut)")
        # a point is the mean of the steps up to it; losses along other directions are not comparable
        for _, part in log.groupby((log["step"] - 1) // between):
            curve.plot(part["step"], part["dskd_loss"], color="#2f6f9f")
        curve.set(title="DSKD loss (text)", ylabel="mean over layer pairs", ylim=(0, None))
        curve.set_xlabel("optimizer step (gap: new directions)")


def _median_ms(work: Callable[[], object]) -> float:
    """Of 30 calls, after 5 to warm up."""
    return 1e3 * statistics.median(timeit.repeat(work, number=1, repeat=35)[5:])
