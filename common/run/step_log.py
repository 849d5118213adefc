"""A log of JSON lines with a step each, which a resumed run continues from its checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

from common.run.files import write_text
from common.run.reading import parse_json, read_text, reading


class StepLog:
    """Appends lines to a file (on the first process alone).

    Args:
        path: the file; what an earlier run left in it is removed.
        resume_step: on resuming, the step of the checkpoint; lines up to it stay, those of later steps come again.
        resume_lines: how many lines there were at the checkpoint, if it is known: what a finished run wrote after its
            last checkpoint is of the same step.

    Attributes:
        lines: the number of lines so far.

    Raises:
        UserError: a line to be kept is damaged.
    """

    def __init__(self, path: Path, resume_step: int | None = None, resume_lines: int | None = None):
        self._path = path
        kept = []
        if resume_step is not None and path.exists():
            lines = read_text(path).split("\n")[:-1][:resume_lines]  # a last one without an end was being written
            for number, line in enumerate(lines, 1):
                where = f"{path} line {number}"
                with reading(where, "a line of a log"):
                    if parse_json(line, where)["step"] <= resume_step:
                        kept.append(line + "\n")
        write_text(path, "".join(kept))
        self.lines = len(kept)

    def append(self, step: int, **values: Any) -> None:
        """Add one line; numbers that are not finite are written as strings, so that every line is valid JSON."""
        line = json.dumps({"step": step, **_finite(values)}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.lines += 1


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
