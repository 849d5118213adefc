"""How the cost of DSKD grows: with the size of the matrices, the rank, the number of pairs, and the number of ranks."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from common.run.figures import drawn
from scripts.lib.benchmark import tables
from scripts.lib.benchmark.method import GLUE, Case, parts, svd_in_every_step
from scripts.lib.benchmark.timing import summaries, write

_LABELS = {
    "size": "columns and rows of a matrix (4 pairs, rank 32)",
    "rank": "rank (4 pairs of 512 x 512)",
    "pairs": "pairs (256 x 256, rank 32)",
    "processes": "processes of one thread (8 pairs of 512 x 512, rank 32)",
}


def run(folder: Path, quick: bool) -> str:
    """Seconds of the parts along four lines; writes growth.json, .png and .svg, returns the table."""
    repeats, shrink, ranks = (1, 8, (1, 8, 64)) if quick else (5, 1, (4, 16, 64, 256, 512))
    lines = {
        "size": {n // shrink: _seconds(n // shrink, 4, 32, repeats) for n in (128, 256, 512, 768, 1024)},
        "rank": {k: _seconds(512 // shrink, 4, k, repeats) for k in ranks},
        "pairs": {count: _seconds(256 // shrink, count, 32, repeats) for count in (1, 4, 16, 36)},
        "processes": {count: _seconds_with_ranks(count, 512 // shrink, 8, repeats) for count in (1, 2)},
    }
    found = {"unit": "median seconds", "lines": lines}
    path = write("growth", found, folder)
    _plot(lines, folder)
    return f"{tables.growth(found)}\n\n{path}"


def _seconds(n: int, count: int, rank: int, repeats: int, rival: bool = True) -> dict[str, float]:
    torch.manual_seed(0)
    pairs = [(str(i), torch.nn.Parameter(torch.randn(n, n) / n), torch.randn(n, n) / n) for i in range(count)]
    case = Case("growth", pairs, lambda: None, {**GLUE, "rank": rank, "driver": "gram"})
    dskd, works = parts(case)
    if rival:
        works["SVD in every step"] = svd_in_every_step(case, dskd)
    return tables.medians(summaries(works, repeats))


def _seconds_with_ranks(ranks: int, n: int, count: int, repeats: int) -> dict[str, float]:
    """Of the slowest of several processes, which share the refreshes."""
    processes = ProcessPoolExecutor(ranks, multiprocessing.get_context("spawn"))
    with TemporaryDirectory() as shared, processes:
        jobs = [processes.submit(_rank, f"{shared}/ranks", rank, ranks, n, count, repeats) for rank in range(ranks)]
        found = [job.result() for job in jobs]
    return {name: max(each[name] for each in found) for name in found[0]}


def _rank(meeting_place: str, rank: int, ranks: int, n: int, count: int, repeats: int) -> dict[str, float]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=ranks)
    try:
        return _seconds(n, count, 32, repeats, rival=False)
    finally:
        dist.destroy_process_group()


def _plot(lines: dict[str, dict[int, dict[str, float]]], folder: Path) -> None:
    with drawn(folder, "growth", (10, 6.4)) as figure:
        for panel, (name, line) in zip(figure.subplots(2, 2).flat, lines.items(), strict=True):
            for part in next(iter(line.values())):
                panel.plot(list(line), [1000 * found[part] for found in line.values()], "o-", markersize=3, label=part)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(list(line), [str(x) for x in line])
            panel.minorticks_off()
            panel.set_xlabel(_LABELS[name])
            panel.set_ylabel("milliseconds")
            panel.grid(alpha=0.3)
        figure.axes[0].legend()
