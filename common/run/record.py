"""The record of a run: resolved config, one JSON line per log step, one result file with all that a table needs."""

import math
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import ROOT
from common.run.errors import UserError
from common.run.files import write_json
from common.run.step_log import StepLog

LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "numpy")


def check_circumstances(checkpoint: Path, before: Mapping[str, int | str], now: Mapping[str, int | str]) -> None:
    """Refuse to resume where what the steps depend on, besides the settings, has changed.

    Args:
        checkpoint: for the message.
        before: as written with the checkpoint; one that is absent, in an older checkpoint, is not compared.
        now: numbers by name; hashes, as texts, by the name of what they are of.

    Raises:
        UserError: one differs.
    """
    for name, value in now.items():
        if (earlier := before.get(name, value)) != value:
            if isinstance(value, str):
                raise UserError(
                    f"--resume: {checkpoint} was written with another {name} (sha256 {earlier:.12}, now {value:.12}); "
                    "go on with that one, or start a new run"
                )
            raise UserError(f"--resume: {checkpoint} was written with {earlier} {name}, now there are {value}")


class RunRecord:
    """Writes `config.json`, `metrics.jsonl` and `result.json` into an output folder (on the first process alone).

    Args:
        folder: the run's output folder.
        config: the resolved settings, JSON-serialisable.
        resume_step: on resuming, the step of the checkpoint; log lines of later steps are dropped, they come again.
        resume_lines: the number of log lines when the checkpoint was written (`lines`), if it is known; lines after it
            are dropped, whatever their step.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], resume_step: int | None = None, resume_lines: int | None = None
    ):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = StepLog(folder / "metrics.jsonl", resume_step, resume_lines)
        write_json(folder / "config.json", config)
        if unused := unused_device():
            print(f"note: {unused}", flush=True)

    def log(self, step: int, **values: Any) -> None:
        """Append one line; numbers that are not finite are written as strings, so that every line is valid JSON."""
        self._metrics.append(step, **values)

    @property
    def lines(self) -> int:
        """The lines of the log so far, for a checkpoint to keep."""
        return self._metrics.lines

    def finish(self, **result: Any) -> dict[str, Any]:
        """Write `result.json`: the given fields, then where, with what and by which command they were measured.

        Raises:
            FloatingPointError: a number that is not finite.
        """
        if wrong := _not_finite(result):
            raise FloatingPointError(f"{wrong} of the result is not a finite number")
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


def _not_finite(value: Any, name: str = "") -> str:
    """The name of a number within a value that is not finite, "" if there is none."""
    if isinstance(value, Mapping):
        return next((wrong for key, entry in value.items() if (wrong := _not_finite(entry, str(key)))), "")
    return name if isinstance(value, float) and not math.isfinite(value) else ""


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU if one is used, resident on the host otherwise."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).exists():  # Linux, whose ru_maxrss counts the launching process, too
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def git_revision() -> str:
    """The commit of this source tree, with `-dirty` when source files differ from it; "unknown" outside of git.

    results/ is no source: the runner writes there between the runs of a table.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = [*git, "status", "--porcelain", "-uno", "--", ".", ":!results"]
        status = subprocess.run(changed, capture_output=True, text=True, check=True)
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


def unused_device() -> str:
    """What is to be said of a device that neither program uses, "" if there is none."""
    import torch

    if torch.backends.mps.is_available() and not torch.cuda.is_available():
        return "the GPU of this Mac (MPS) is not used; the run is on the processor"
    return ""


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
