"""Interleaved timing of alternatives, and the file that comes of it."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from common.run.files import write_json
from common.run.record import device_name, git_revision, versions


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(works: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call; the alternatives take turns, so that a change of the machine's pace meets all alike."""
    seconds = {name: [] for name in works}
    for turn in range(warmup + repeats):
        for name, work in works.items():
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest and number of the repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def summaries(works: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, dict[str, float]]:
    """Of the seconds of alternatives that take turns."""
    return {name: summary(values) for name, values in interleaved(works, repeats, warmup).items()}


def write(name: str, results: dict, folder: Path) -> Path:
    """results/benchmark/<name>.json with the device, threads, versions and revision beside the figures."""
    path = folder / f"{name}.json"
    where = {"device": device_name(), "versions": versions(), "git_revision": git_revision()}
    write_json(path, {**where, **results})
    return path
