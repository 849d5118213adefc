"""Run what a plan has left to do, several runs at once, on this machine or on a Slurm cluster (submitit)."""

import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import ROOT
from common.run.errors import UserError
from common.run.processes import cores
from scripts.lib.tables.plan import Run, short

LOG = "log.txt"
_POLL_SECONDS = 0.1
_NO_LIMIT_MINUTES = 60 * 24 * 365  # submitit ends local jobs after minutes otherwise


def unfinished(runs: Sequence[Run], done: Callable[[Run], bool]) -> list[Run]:
    """The runs that are not `done`, and those that they need in turn and whose folders are not there; in order."""
    wanted: dict[Run, None] = {}  # in order

    def want(run: Run) -> None:
        if run in wanted or run.finished:
            return
        for need in run.needs:
            want(need)
        wanted[run] = None

    for run in runs:
        if not done(run):
            want(run)
    return list(wanted)


def launch(
    runs: Sequence[Run], jobs: int, launcher: str, options: Mapping[str, Any], logs: Path, finished: Callable[[], Any]
) -> dict[Run, str]:
    """Run everything that can be run, `jobs` at a time.

    Args:
        runs: the runs, in the order in which they should start; a run waits for those that it needs.
        jobs: how many at once.
        launcher: "local" or "slurm".
        options: parameters of submitit's executor, such as slurm_partition.
        logs: folder for submitit's own files.
        finished: called whenever a run has ended well.

    Returns:
        The runs that failed or could not be started, with the reason.
    """
    executor = _executor(launcher, options, logs)
    waiting, running, failed = list(runs), {}, {}
    slots = list(range(jobs))
    interval = 1 if sys.stderr.isatty() else 60  # seconds; a log file gets a line a minute
    style = {"unit": "run", "dynamic_ncols": True, "smoothing": 0, "mininterval": interval, "miniters": 0}
    bar = tqdm(total=len(waiting), disable=not waiting, **style)

    def fail(run: Run, reason: str) -> None:
        failed[run] = reason
        bar.update()
        bar.write(f"{run.title}: {reason}")

    try:
        while waiting or running:
            for run in [run for run in waiting if any(need in failed for need in run.needs)]:
                waiting.remove(run)
                fail(run, "not run: it needs " + ", ".join(need.title for need in run.needs if need in failed))
            needed = dict.fromkeys(need for run in waiting for need in run.needs)  # in order
            for run in [n for n in needed if not (n.finished or n in running or n in failed or n in waiting)]:
                waiting.insert(0, run)  # its folder was there when the runner started
                bar.total += 1
            for run in [run for run in waiting if all(need.finished for need in run.needs)][: len(slots)]:
                waiting.remove(run)
                slot = slots.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                running[run] = _submit(executor, run, _environment(launcher, options, jobs, slot)), slot
            bar.set_postfix_str("running: " + ", ".join(run.title for run in running), refresh=False)
            bar.update(0)  # drawn where the interval is over
            time.sleep(_POLL_SECONDS)
            for run, (job, slot) in list(running.items()):
                if not job.done():
                    continue
                del running[run]
                slots.append(slot)
                if run.finished:
                    bar.update()
                    finished()
                else:
                    fail(run, f"failed; the end of {short(run.folder / LOG)}:\n{_tail(run, job)}")
    finally:
        for job, _ in running.values():
            job.cancel(check=False)
        bar.close()
    return failed


def execute(run: Run, environment: Mapping[str, str]) -> None:
    """Run a run's command from the repository's root, its output appended to `log.txt` in its folder.

    Only one process works in a folder at a time. The lock is the command's as well: should everything around it be
    killed, whoever comes next still waits for the command to end, and finds its result or its checkpoint.
    """
    with (run.folder / ".lock").open("w") as lock, (run.folder / LOG).open("a", encoding="utf-8") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.finished:
            return
        command = run.command()  # not earlier: whoever had the lock may have left a checkpoint to resume from
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        environment = {**os.environ, **environment}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=(lock.fileno(),), **streams)
        try:
            # not wait(): interrupted, it first gives the command a quarter of a second, and submitit kills after one
            while (code := process.poll()) is None:
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()  # where waiting was interrupted
            process.wait()
        log.write(f"exit code {code}\n")


def _submit(executor, run: Run, environment: Mapping[str, str]):
    from submitit.core.utils import FailedJobError

    try:
        return executor.submit(execute, run, environment)
    except FailedJobError as error:  # sbatch refuses it
        raise UserError(f"--launcher slurm: {error}; look at the --slurm values") from error


def _executor(launcher: str, options: Mapping[str, Any], logs: Path):
    import submitit

    # jobs import this module by name
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=launcher)
        if launcher == "local":
            executor.update_parameters(timeout_min=_NO_LIMIT_MINUTES)
        executor.update_parameters(**options)
    except (AssertionError, RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"--launcher {launcher}: {error or 'a --slurm value has the wrong type'}") from error
    return executor


def _environment(launcher: str, options: Mapping[str, Any], jobs: int, slot: int) -> dict[str, str]:
    """Processor cores shared among the jobs, unless the user has set the threads; GPUs taken in turn."""
    if launcher == "slurm":
        of_a_task = options.get("slurm_cpus_per_task", options.get("cpus_per_task", 1))
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(of_a_task))}
    gpus = _gpus()
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores() // jobs, 1))),
        "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)] if gpus else "",
    }


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


def _tail(run: Run, job: Any, lines: int = 12) -> str:
    log = run.folder / LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else job.stderr() or "nothing"
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-lines:])
