"""Both programs under faults: killed, stopped, damaged, out of disk, two at once. What was tried, and what held.

python -m scripts.study.faults --minutes 10 --output results/faults

Every case is a run of a tiny model with DSKD in a process of its own, with faults at moments and places drawn by
--seed, that is started again until it ends. It holds where student, log and choices are those of an uninterrupted run,
bit for bit (times left out), and nothing is left behind; a damaged file may be refused in one line instead. Cases take
turns until the time is over. For Linux, as it forks. The full disk is a small tmpfs, left out where the rights do not
allow a mount. Writes table.md, and faults.json with what did not hold.
"""

import argparse
import itertools
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from common import ROOT
from common.run.errors import Parser, UserError, run_cli
from common.run.files import check_writable, write_text
from common.run.numbers import Number
from common.torchvision_repair import repair_torchvision
from scripts.lib.benchmark.tables import table
from scripts.lib.benchmark.timing import write
from scripts.study.tiny_runs import Program, prepare

_OFTEN = 5  # times that a run is killed or stopped before it may end
_SMALL_DISK = "24m"


class FaultError(AssertionError):
    """Something did not hold."""


class MountError(Exception):
    """The rights do not allow a small disk."""


def check(holds: bool, *found: object) -> None:
    if not holds:
        raise FaultError(" ".join(map(str, found)))


def check_same(program: Program, folder: Path) -> None:
    different = program.difference(folder)
    check(not different, different)


# The cases; each may use the folder and what it draws, and counts the faults that it made


def interrupted(signums: Sequence[int], program: Program, folder: Path, draw: random.Random) -> int:
    """A run that signals end at random moments, and that is started again until it ends by itself."""
    turn = 0  # so many times it was ended before it was done
    while True:
        pid, signum = program.start(folder, *([program.again(folder)] if turn else [])), draw.choice(signums)
        if turn < _OFTEN:
            begun = 0.0 if signum == signal.SIGKILL else 0.1  # before that there is no handler of signals
            time.sleep(begun + draw.uniform(0, 0.6 * program.seconds))
            os.kill(pid, signum)  # it is not waited for yet: the id is its own
        run = program.ended(pid)
        if run.code == 0:
            check_same(program, folder)
            return turn
        check(turn < _OFTEN and run.code in (-signal.SIGKILL, 128 + signum), "ended with", run)
        check("Traceback" not in run.said, run)
        turn += 1


def replaced(program: Program, folder: Path, draw: random.Random) -> int:
    """A run that is to replace an earlier one, killed, and started once more with the same flag."""
    shutil.copytree(program.whole, folder)
    for _ in range(times := draw.randint(1, 3)):
        pid = program.start(folder, program.overwrite)
        time.sleep(draw.uniform(0, program.seconds))
        os.kill(pid, signal.SIGKILL)
        program.ended(pid)
    run = program.run(folder, program.overwrite)
    check(run.code == 0, run)
    check_same(program, folder)
    return times


def damaged(patterns: Sequence[str], program: Program, folder: Path, draw: random.Random) -> int:
    """A file of an unfinished run is cut off, changed or lost: the run ends as the whole one, or says what is wrong."""
    shutil.copytree(program.half, folder)
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.stat().st_size]
    path = draw.choice(sorted(found))
    content, kind = bytearray(path.read_bytes()), draw.choice(("cut off", "flipped", "deleted", "noise"))
    if kind == "flipped":
        for _ in range(draw.choice((1, 8, 100))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    changed = {"cut off": content[: draw.randrange(len(content))], "noise": draw.randbytes(draw.randrange(2000))}
    path.unlink() if kind == "deleted" else path.write_bytes(changed.get(kind, content))
    what = f"{path.relative_to(folder)} {kind}:"
    run = program.run(folder, "--resume")
    check(run.code == 0 or run.refused, what, run)
    if run.code == 0:
        ours, theirs = ((each / "student/model.safetensors").read_bytes() for each in (folder, program.whole))
        check(ours == theirs, what, "another student, without a word")
    return 1


def two_at_once(program: Program, folder: Path, draw: random.Random) -> int:
    """Of two runs that start in one folder one ends as if it were alone, and the other is refused."""
    first = program.start(folder)
    time.sleep(draw.choice((0, draw.uniform(0, 0.7 * program.seconds))))
    second = program.start(folder, *draw.choice(([], [program.overwrite])))
    runs = [program.ended(pid) for pid in (first, second)]
    check(sorted(run.code for run in runs) == [0, 2] and any(run.refused for run in runs), runs)
    check_same(program, folder)
    return 1


def full_disk(program: Program, folder: Path, draw: random.Random) -> int:
    """The disk fills up in the midst of a run; with room again it goes on."""
    with small_disk(folder) as disk:
        place, filler = disk / "run", disk / "filler"
        pid = program.start(place)
        time.sleep(draw.uniform(0.1, 0.9) * program.seconds)
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        run = program.ended(pid)
        told = "disk full" in run.said or "are free there" in run.said
        check(run.code == 0 or (run.refused and told), run)
        filler.unlink()
        if run.code:
            run = program.run(place, program.again(place))
        check(run.code == 0, "with room again:", run)
        check_same(program, place)
    return 1


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A tmpfs; a MountError where there can be none."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK}", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        raise MountError
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


CASES: dict[str, Callable[[Program, Path, random.Random], int]] = {
    "killed again and again (SIGKILL)": partial(interrupted, (signal.SIGKILL,)),
    "stopped again and again (SIGTERM, Ctrl-C)": partial(interrupted, (signal.SIGTERM, signal.SIGINT)),
    "killed while it replaces an earlier run": replaced,
    "a file of a checkpoint damaged": partial(damaged, ("checkpoint.pt", "checkpoint-*/*.*")),
    "a log or config.json damaged": partial(damaged, ("*.json", "*.jsonl")),
    "two runs at once in one folder": two_at_once,
    "disk full in the midst of a run": full_disk,
}


def try_all(minutes: float, seed: int) -> tuple[list[dict], list[str]]:
    """(for every program and case what was tried and held, the cases that cannot be tried here)."""
    rows: dict[tuple[str, str], dict] = {}
    left_out: list[str] = []
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        programs, place = prepare(Path(temporary)), Path(temporary) / "case"
        end = time.monotonic() + 60 * minutes
        for (case, attempt), program in itertools.cycle(itertools.product(CASES.items(), programs)):
            if time.monotonic() > end:
                return list(rows.values()), left_out
            if case in left_out:
                continue
            number = draw.randrange(2**32)
            row = {"program": program.name, "case": case, "tried": 0, "held": 0, "faults": 0, "failures": []}
            row = rows.setdefault((program.name, case), row)
            try:
                row["faults"] += attempt(program, place, random.Random(number))
                row["held"] += 1
            except FaultError as error:
                row["failures"].append({"seed": number, "found": str(error)[-2000:]})
            except MountError:
                left_out.append(case)
                rows.pop((program.name, case))
                continue
            except Exception as error:  # of the comparison: what it needs is not there
                row["failures"].append({"seed": number, "found": repr(error)[-2000:]})
            finally:
                shutil.rmtree(place, ignore_errors=True)
            row["tried"] += 1
    raise AssertionError  # the turns do not end


def show(rows: list[dict], left_out: Sequence[str]) -> str:
    """The table of what was tried and held, a line a case."""
    lines = []
    for case in CASES:
        of_case = [row for row in rows if row["case"] == case]
        for row in of_case:
            counts = {"tried": str(row["tried"]), "held": str(row["held"]), "faults made": str(row["faults"])}
            lines.append({"fault": case, "program": row["program"], **counts})
    total = {key: str(sum(row[key] for row in rows)) for key in ("tried", "held", "faults")}
    lines.append(
        {"fault": "all", "program": "both", **dict(zip(("tried", "held", "faults made"), total.values(), strict=True))}
    )
    return table(lines) + "".join(f"\n\nNot tried, as the rights do not allow it: {case}." for case in left_out)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=Number(float, 0, 10_000), default=10, help="how long (default: 10)")
    parser.add_argument("--seed", type=Number(int, 0), default=1, help="of the faults (default: 1)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/faults", help="default: results/faults")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if not hasattr(os, "fork"):
        raise UserError("this study forks, which this system does not know")
    check_writable("--output", args.output)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    repair_torchvision()
    rows, left_out = try_all(args.minutes, args.seed)
    shown = show(rows, left_out)
    command = shlex.join(["python", "-m", "scripts.study.faults", *sys.argv[1:]])
    path = write("faults", {"command": command, "left_out": left_out, "cases": rows}, args.output)
    write_text(args.output / "table.md", f"# Faults: what was tried and held\n\n`{command}`\n\n{shown}\n")
    print(f"{shown}\n\n{path}")
    sys.exit(any(row["failures"] for row in rows))


if __name__ == "__main__":
    run_cli(main)
