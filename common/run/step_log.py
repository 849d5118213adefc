"""A log of JSON lines with a step each, which a resumed run continues from its checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

from common.run.files import write_text


class StepLog:
    """Appends lines to a file (one process only: rank 0).

    Args:
        path: the file; what an earlier run left in it is removed.
        resume_step: on resuming, the step of the checkpoint; lines up to it stay, those of later steps come again.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self._path = path
        kept = []
        if resume_step is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resume_step]
        write_text(path, "".join(kept))

    def append(self, step: int, **values: Any) -> None:
        """Add one line; numbers that are not finite are written as strings, so that every line is valid JSON."""
        line = json.dumps({"step": step, **_finite(values)}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
