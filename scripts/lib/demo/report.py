"""The demo's tables and plot, from the run records."""

import itertools
import json
import statistics
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.run.figures import drawn
from common.run.files import write_text
from scripts.lib.demo.runs import Run, shown
from scripts.lib.tables.render import mean_text

_BLUE, _GREY = "#2f6f9f", "#7a8794"


@dataclass(frozen=True)
class Part:
    """A comparison of the demo.

    Attributes:
        name: of its file.
        title: what is compared.
        teacher: what the teacher is.
        teachers: its run.
        students: what each kind of run is, and its runs; the second is the first with DSKD or the anchor.
        texts: to measure latency with; none for images.
    """

    name: str
    title: str
    teacher: str
    teachers: list[Run]
    students: dict[str, list[Run]]
    texts: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, list[Run]]:
        """The teacher and the kinds of students that have runs."""
        return {self.teacher: self.teachers} | {label: runs for label, runs in self.students.items() if runs}

    def values(self, label: str) -> list[float]:
        """The final metric of a kind, seed by seed."""
        return [read_result(run.folder)["last"] for run in self.kinds[label]]

    @property
    def metric(self) -> str:
        """What is measured, in words."""
        return f"dev {read_result(self.teachers[0].folder)['metric']}" if self.texts else "test top-1, %"

    @property
    def digits(self) -> int:
        """Decimal places of the metric."""
        return 3 if self.texts else 2


def read_result(folder: Path) -> dict:
    """result.json of a run."""
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def size_mb(folder: Path) -> float:
    """Size of the weights on disk, in 10^6 bytes."""
    return (folder / "model.safetensors").stat().st_size / 1e6


def text_latency(folder: Path, texts: list[str]) -> float:
    """Median milliseconds for one text at a time on a thread, tokenisation included."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    turns = itertools.cycle(texts)
    with torch.inference_mode():
        return _median_ms(lambda: model(**tokenizer(next(turns), return_tensors="pt")))


def image_latency(folder: Path) -> float:
    """Median milliseconds for one image at a time on a thread."""
    import torch

    from cv.export import load_model

    model, info = load_model(folder)
    image = torch.zeros(1, info["in_channels"], info["image_size"], info["image_size"])
    with torch.inference_mode():
        return _median_ms(lambda: model(image))


def write_part(folder: Path, part: Part) -> str:
    """Write the part's table as Markdown; gives it with the difference that DSKD makes and what to do next."""
    rows = []
    for label, runs in part.kinds.items():
        last, result = runs[-1].folder / "student", read_result(runs[-1].folder)
        latency = text_latency(last, part.texts) if part.texts else image_latency(last)
        parameters, size = f"{result['parameters'] / 1e6:.2f} M", f"{size_mb(last):.1f} MB"
        metric, seeds = mean_text(part.values(label), part.digits), str(len(runs))
        rows.append([label, metric, seeds, parameters, size, f"{latency:.1f} ms"])
    if part.texts:
        rows.insert(1, ["majority", f"{read_result(part.teachers[0].folder)['majority']:.{part.digits}f}", *[""] * 4])
    else:
        rows.insert(1, ["chance", "10.00", *[""] * 4])
    table = _table(["run", part.metric, "seeds", "parameters", "size", "latency"], rows)
    text = f"**{part.title}**\n\n{table}\n"
    write_text(folder / f"{part.name}.md", text)
    without, with_dskd, *_ = part.students
    pairs = zip(part.values(without), part.values(with_dskd), strict=True)
    differences = [ours - theirs for theirs, ours in pairs]
    better = sum(difference > 0 for difference in differences)
    said = f"{with_dskd} minus {without}: {mean_text(differences, part.digits, '+')}"
    said += f", higher in {better} of {len(differences)} seeds"
    return "\n".join([text, said, *_next_steps(part, part.students[with_dskd][0])]) + "\n"


def _next_steps(part: Part, run: Run) -> list[str]:
    """What can be done with a run of the part."""
    student = shown(run.folder / "student")
    if part.texts:
        load = f'AutoModelForSequenceClassification.from_pretrained("{student}")'
        predict = f"{shown(run.command[0])} --model_name_or_path {student} --do_predict (docs/extending.md)"
    else:
        load = f'cv.export.load_model("{student}")'
        predict = f"cv/predict.py {student} IMAGE ..."
    return [
        f"report:  python scripts/report.py {shown(run.folder)}", f"load:    {load}", f"predict: python {predict}",
    ]  # fmt: skip


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, rows)])


def plot(folder: Path, parts: list[Part]) -> None:
    """Write `demo.png` and `demo.svg`: of each part mean and standard deviation of each kind of run, and its seeds."""
    with drawn(folder, "demo", (4.6 * len(parts), 3.0)) as figure:
        for axis, part in zip(figure.subplots(1, len(parts)), parts, strict=True):
            for place, label in enumerate(part.kinds):
                ours = "DSKD" in label or "anchor" in label
                values, color = part.values(label), _BLUE if ours else _GREY
                axis.plot(values, [place + 0.22] * len(values), "o", color=color, alpha=0.45, markersize=3)
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                axis.errorbar(statistics.fmean(values), place, xerr=deviation, fmt="o", color=color, capsize=3)
            axis.set_yticks(range(len(part.kinds)), list(part.kinds))
            axis.set_ylim(len(part.kinds) - 0.4, -0.6)
            axis.margins(x=0.12)
            axis.grid(axis="x", alpha=0.3)
            axis.set_title(part.title.replace(": ", ":\n"), fontsize=8)
            axis.set_xlabel(f"{part.metric}: mean ± std, small: seeds")


def _median_ms(work: Callable[[], object]) -> float:
    """Of 30 calls on one thread, after 5 to warm up."""
    import torch

    torch.set_num_threads(1)
    return 1e3 * statistics.median(timeit.repeat(work, number=1, repeat=35)[5:])
