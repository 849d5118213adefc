"""The record of a run: resolved config, one JSON line per log step, one result file with all that a table needs."""

import json
import math
import platform
import resource
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.files import write_json, write_text

LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "numpy")


class RunRecord:
    """Writes `config.json`, `metrics.jsonl` and `result.json` into an output folder (one process only: rank 0).

    Args:
        folder: the run's output folder.
        config: the resolved settings, JSON-serialisable.
        resume_step: on resuming, the step of the checkpoint; log lines of later steps are dropped, they come again.
    """

    def __init__(self, folder: Path, config: dict[str, Any], resume_step: int | None = None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = folder / "metrics.jsonl"
        kept = []
        if resume_step is not None and self._metrics.exists():
            lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resume_step]
        write_text(self._metrics, "".join(kept))
        write_json(folder / "config.json", config)

    def log(self, step: int, **values: Any) -> None:
        """Append one line; numbers that are not finite are written as strings, so that every line is valid JSON."""
        line = {"step": step, **{key: _finite(value) for key, value in values.items()}}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, **result: Any) -> dict[str, Any]:
        """Write `result.json`: the given fields, then where, with what and by which command they were measured."""
        result = {
            **result,
            "peak_memory_bytes": peak_memory_bytes(),
            "git_revision": git_revision(),
            "versions": versions(),
            "device": device_name(),
            "command": " ".join(shlex.quote(word) for word in ("python", *sys.argv)),
        }
        write_json(self.folder / "result.json", result)
        return result


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU if one is used, resident on the host otherwise."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def git_revision() -> str:
    """The commit of this source tree, with `-dirty` when source files differ from it; "unknown" outside of git."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if status.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return f"{processor}, {torch.get_num_threads()} threads"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
