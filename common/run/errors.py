"""Bad input ends a program with one line and exit code 2; everything else keeps its traceback."""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """The user's input is wrong. One line: what, where (file, line, key or flag), what would be right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s: one line, exit code 2, no usage text before it."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


@contextmanager
def user_errors() -> Iterator[None]:
    """What the method (dskd) refuses of the user's settings or networks, as a `UserError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _one_line(message: Warning | str, category: type[Warning], *where) -> str:
    if str(message).startswith("DSKD: "):
        return f"warning: {message}\n"
    return _formatwarning(message, category, *where)


_formatwarning = warnings.formatwarning


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line entry point; a `UserError` becomes `error: ...` on stderr and exit code 2.

    So does a path that is too long for the system. Warnings of the method are one line, too.
    """
    warnings.formatwarning = _one_line
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at exit
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
