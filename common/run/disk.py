"""Free space: looked at before training, and named when it has run out."""

import errno
import shutil
from pathlib import Path

from common.run.errors import UserError

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


def check_space(name: str, folder: Path, needed: int) -> None:
    """Refuse a folder whose disk has less than `needed` bytes free (UserError); name: the flag or key that gave it."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(
            f"{name} {folder}: {in_bytes(free)} are free there, two checkpoints of this run take {in_bytes(needed)}"
        )


def in_bytes(count: float) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is what an error comes from; libraries that write for us hide it in errors of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if not isinstance(error, UserError) and any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def place(error: BaseException | None) -> str:
    """The file that could not be written, as far as the error or its causes tell; "" if they do not."""
    while error is not None:
        if isinstance(error, OSError) and error.filename:
            return str(error.filename)
        error = error.__cause__ or error.__context__
    return ""
