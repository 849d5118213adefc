"""A run's output folder: whose it is, what may be removed from it, an earlier run that is kept until it may go."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.run.errors import UserError
from common.run.files import check_writable, name_aside, remove_leftovers
from common.run.lock import locked
from common.run.reading import read_json

CHECKPOINT = "checkpoint.pt"
BEFORE = "checkpoint_before.pt"  # the one before it, for where it is damaged
# all that a run writes, beside the lock and what is being written
WRITTEN = (
    CHECKPOINT,
    BEFORE,
    "student",
    "student_best",
    "tracking",
    "config.json",
    "metrics.jsonl",
    "directions.jsonl",
)
WRITTEN += ("confusion.json", "result.json")
_FORMER = ".former_run"  # an earlier run, while the one that replaces it has no checkpoint
_MOVING = ".former_run_moves"  # the same, on its way there or back


class RunFolder:
    """An output folder in one process, which writes to it or not (`main`).

    An earlier run that is to be replaced is set aside and removed when the first checkpoint of the new one is complete
    (`settle`); where the new one ends before that, it comes back. After a kill the next start does the same (`hold`).
    """

    def __init__(self, path: Path, *, main: bool = True):
        self.path, self.main = path, main

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other runs out, remove what killed ones were writing, bring back what they had set aside.

        Raises:
            UserError: nothing can be written there, or another run holds it.
        """
        check_writable("OUTPUT_DIR", self.path)
        if not self.main:
            yield
            return
        with locked("OUTPUT_DIR", self.path):
            remove_leftovers(self.path)
            self._recover()
            try:
                yield
            except BaseException:
                if (self.path / _FORMER).exists():
                    print(f"the earlier run in {self.path} stays, as the new one has no checkpoint yet", flush=True)
                self._recover()
                raise

    def check(self, *, resume: bool, overwrite: bool) -> bool:
        """Refuse flags that do not fit to what is in the folder; gives whether there is a checkpoint to resume.

        Raises:
            UserError: a run is there and no flag says what becomes of it, or none is there and one does; what would be
                removed is not known to be a run's.
        """
        there = [name for name in WRITTEN if (self.path / name).exists()]
        if resume and not {CHECKPOINT, BEFORE} & set(there):
            if not self._is_a_runs():
                raise UserError(f"--resume: there is no {CHECKPOINT} in {self.path}")
            if self.main:
                print(f"note: the run in {self.path} ended before its first checkpoint, and starts again", flush=True)
            return False
        if there and not (resume or overwrite):
            raise UserError(f"OUTPUT_DIR {self.path} holds a run; give --resume, --overwrite or another OUTPUT_DIR")
        if there and overwrite and not self._is_a_runs():
            raise UserError(
                f"--overwrite: OUTPUT_DIR {self.path} has {', '.join(there)}, but no config.json of a run of this "
                "program, so that they may be somebody else's; remove them yourself, or give another OUTPUT_DIR"
            )
        return resume

    def _is_a_runs(self) -> bool:
        try:
            config = read_json(self.path / "config.json")
        except UserError:
            return False
        return isinstance(config.get("DISTILLER"), dict) and isinstance(config.get("SOLVER"), dict)

    def set_aside(self) -> None:
        """Make room for a new run: what a run wrote goes into a folder, which gets its name when all is in it."""
        if self.main and any((self.path / name).exists() for name in WRITTEN):
            (self.path / _MOVING).mkdir()
            for name in WRITTEN:
                if (self.path / name).exists():
                    os.replace(self.path / name, self.path / _MOVING / name)
            os.replace(self.path / _MOVING, self.path / _FORMER)

    def keep_checkpoint(self) -> None:
        """Keep the checkpoint as the one before the next, at no cost, where the file system has hard links."""
        path, aside = self.path / CHECKPOINT, name_aside(self.path / BEFORE)
        with suppress(OSError):
            aside.unlink(missing_ok=True)
            os.link(path, aside)
            os.replace(aside, self.path / BEFORE)

    def settle(self) -> None:
        """The new run has a checkpoint: the earlier one goes."""
        if self.main and (self.path / _FORMER).exists():
            shutil.rmtree(self.path / _FORMER)

    def _recover(self) -> None:
        """Finish what a kill at any place of `set_aside`, `settle` or of this method has left, or undo it."""
        former, moving = self.path / _FORMER, self.path / _MOVING
        if former.exists():
            if (self.path / CHECKPOINT).exists():
                shutil.rmtree(former)
            else:
                for name in WRITTEN:
                    path = self.path / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                os.replace(former, moving)
        if moving.exists():
            for path in moving.iterdir():
                os.replace(path, self.path / path.name)
            moving.rmdir()
