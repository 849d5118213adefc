"""Files are written aside and renamed into place, so that a killed run leaves the old file or the new one."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.run.errors import UserError


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary path)` in the folder of `path`, then rename the result to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = name_aside(path)
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def name_aside(path: Path) -> Path:
    """Where this process writes what is to become `path`; `remove_leftovers` knows the name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs were writing in a folder or one below it; call it with the folder locked (lock.py)."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_writable(name: str, folder: Path) -> None:
    """Refuse a folder, there or yet to be made, that nothing can be written to; leaves nothing behind.

    Tried out, as permissions tell little to root or of a file system that is read-only.

    Args:
        name: of the flag or key that gave the folder, for the message.
        folder: with or without folders that are still to be made above it.

    Raises:
        UserError: it or what it lies in is a file, or writing fails.
    """
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir():
            raise UserError(f"{name} {folder}{' is' if nearest == folder else f': {nearest} is'} a file")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be written to: {error.strerror}") from None
