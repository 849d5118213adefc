"""Bad input ends a program with one line and exit code 2; everything else keeps its traceback."""

import argparse
import errno
import os
import signal
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
_LONGEST = 2000  # characters of an error that are shown: a damaged file can have a header of megabytes


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line entry point; a `UserError` becomes `error: ...` on stderr and exit code 2.

    So do a path that is too long for the system and a disk that is full. Warnings of the method are one line, too.
    SIGTERM and Ctrl-C end with one line and exit codes 143 and 130.
    """
    from common.run.disk import is_full, place
    from common.run.stopping import Stopped, end_at_once, ended_by, forget_signals, handled, resume_command

    warnings.formatwarning = _one_line
    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}  # or the script's own
    ours = [signum for signum, handler in defaults.items() if signal.getsignal(signum) == handler]

    def ended_by_none() -> None:
        try:
            main()
        except Exception as error:
            if signum := ended_by():
                raise Stopped(signum) from error
            raise

    forget_signals()
    try:
        with handled(end_at_once, ours):
            ended_by_none()
    except UserError as error:
        if not is_full(error.__cause__):
            _refuse(str(error))
        _refuse(f"disk full: {error}")
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at exit
        sys.exit(1)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _refuse(f"{error.strerror}: {error.filename}")
        if not is_full(error):
            raise
        where = f": {place(error)} cannot be written" if place(error) else ""
        _refuse(f"disk full{where}; make room, then go on with: {resume_command()}")


def _refuse(message: str):
    line = " ".join(message.split())
    print(f"error: {line[:_LONGEST]}{' ...' * (len(line) > _LONGEST)}", file=sys.stderr)
    sys.exit(2)
