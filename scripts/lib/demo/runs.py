"""The demo's runs of the two programs, as a user would start them."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import ROOT
from common.run.errors import UserError

_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: of the kind of run, the same for all its seeds.
        seed: of the run.
        folder: where it writes.
        command: the program and its words.
    """

    name: str
    seed: int
    folder: Path
    command: tuple


def launch(run: Run) -> None:
    """Run on one thread; command and output go to the terminal when it has ended.

    Raises:
        UserError: it failed.
    """
    words = [str(word) for word in run.command]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    _running.add(process)
    said = process.communicate()[0].rstrip()
    _running.discard(process)
    print(f"\n$ {shlex.join(['python', *(shown(word) for word in words)])}\n{said}", flush=True)
    if process.returncode:
        raise UserError(f"{run.folder.name} failed (exit code {process.returncode}); its output is above")


def stop_all() -> None:
    """End the runs that are under way."""
    for process in list(_running):
        process.terminate()


def shown(path: Path | str) -> str:
    """A path as seen from the repository's root, where it lies inside."""
    return str(path).removeprefix(f"{ROOT}/")
