"""One run at a time in an output folder, one process at a time in others."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from common.run.errors import UserError

LOCK = ".run.lock"  # in the output folder while a run holds it


@contextmanager
def locked(name: str, folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, for a run; a folder that was made and got nothing is removed again.

    The system lets go of the lock when its process ends, however it ends; only where it has no `flock` (Windows, some
    network file systems) does a killed run leave its file behind, and the refusal says so.

    Args:
        name: of the flag or key that gave the folder, for the message.
        folder: the run's output folder.

    Raises:
        UserError: another run holds it, with its process and start.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _take(name, path)
    try:
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(file)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: the next one makes a file of its own
        if sys.platform != "win32":
            os.close(file)
        if made:
            with suppress(OSError):  # the run has written to it
                folder.rmdir()


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Wait until no other process is in a folder, made if need be: several runs may start at once.

    Gives whether the system has locks, without which nothing is waited for.
    """
    with ExitStack() as stack:
        alone = False
        with suppress(ImportError, OSError):
            import fcntl  # not on Windows

            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # which unlocks it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        yield alone


def check_unlocked(name: str, folder: Path) -> None:
    """Refuse a folder that a run holds (UserError), without taking it: before data and models are read."""
    path = folder / LOCK
    if path.exists():
        file = _take(name, path)
        path.unlink(missing_ok=True)
        os.close(file)


def _take(name: str, path: Path) -> int:
    while True:
        try:
            file, is_locked = _open(path)
        except OSError as error:
            raise UserError(f"{name} {path.parent} cannot be written to: {error.strerror}") from None
        if not is_locked:
            if file is not None:
                os.close(file)
            raise UserError(f"{name} {path.parent} is in use by {_holder(path)}; wait for it, or give another folder")
        try:
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # its holder removed the file between opening and locking


def _open(path: Path) -> tuple[int | None, bool]:
    """(open file, whether it is ours now)."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return _exclusive(path)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return file, False
    except OSError:  # a file system without locks
        os.close(file)
        if path.stat().st_size == 0:  # of the open above
            path.unlink()
        return _exclusive(path)
    return file, True


def _exclusive(path: Path) -> tuple[int | None, bool]:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return None, False


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        words = f"another run, process {holder['pid']}, started {holder['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        words = "another run that has just started"
    if sys.modules.get("fcntl"):
        return words
    return f"{words} (remove {path} if it is no longer there)"
