"""SIGTERM (a preempted job) and SIGINT (Ctrl-C): the present step is finished and saved, one line says how to go on."""

import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal ended the run; not an Exception, so that no library takes it for an error that it can pass over.

    Attributes:
        signum: of the signal; the exit code is 128 + signum.
        saved: what was saved before, in words; "" for nothing.
    """

    def __init__(self, signum: int, saved: str = ""):
        super().__init__(signum, saved)
        self.signum, self.saved = signum, saved

    @property
    def code(self) -> int:
        return 128 + self.signum

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        return f"stopped by {name}, {self.saved}; to go on: {resume_command()}" if self.saved else f"stopped by {name}"


def resume_command(argv: Sequence[str] | None = None) -> str:
    """The command line that continues this one's run."""
    program, *words = sys.argv if argv is None else argv
    words = [word for word in words if word not in ("--overwrite_output_dir", "--overwrite", "--resume")]
    return shlex.join(["python", program, "--resume", *words])


class Request:
    """Whether a signal has asked the run to stop.

    Attributes:
        signum: of the signal, or None.
    """

    def __init__(self):
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def receive(self, signum: int, _frame=None) -> None:
        if self.signum == signum:  # asked for twice: not to be waited for
            raise Stopped(signum)
        self.signum = signum


@contextmanager
def stop_requests() -> Iterator[Request]:
    """While training: a signal is kept for the end of the step (`Request`), the same one again ends at once."""
    request = Request()
    with handled(request.receive):
        yield request


@contextmanager
def handled(handler, signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Another handler of signals; without effect outside of the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, earlier in before.items():
            signal.signal(each, signal.SIG_DFL if earlier is None else earlier)


def end_at_once(signum: int, _frame=None) -> None:
    """The handler where there is nothing to save yet; `ended_by` tells of it where a library makes another error of it.

    safetensors does, for one: a signal while it loads would be told as a damaged file.
    """
    _ended_by.append(signum)
    raise Stopped(signum)


def ended_by() -> int | None:
    """The signal that `end_at_once` has received since `forget_signals`, or None."""
    return _ended_by[-1] if _ended_by else None


def forget_signals() -> None:
    """Signals of an earlier program in this process are none of the next one's."""
    _ended_by.clear()


_ended_by: list[int] = []
