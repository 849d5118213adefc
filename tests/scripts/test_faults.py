"""The study of faults on a program of a few lines: what does not hold is found, and what does counts as held."""

import json
import os
import random
import signal

import pytest

from scripts.study import faults
from scripts.study.tiny_runs import Ended, Program

if not hasattr(os, "fork"):
    pytest.skip("the study forks", allow_module_level=True)

# 20 steps with a checkpoint after each; CARE: whether it locks its folder and checks its checkpoint.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
CARE = {care}
folder, flags = Path(sys.argv[2]), sys.argv[3:]
folder.mkdir(exist_ok=True)
asked = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda signum, _: asked.append(signum))
if CARE:
    import fcntl
    lock = open(folder.with_name(folder.name + ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(print("error: in use", file=sys.stderr) or 2)

def put(name, text):
    (folder / "aside").write_text(text)
    os.replace(folder / "aside", folder / name)

sums = []
if "--resume" in flags:
    try:
        sums = json.loads((folder / "checkpoint.pt").read_text())
        if CARE and sums != [sum(range(step + 1)) for step in range(len(sums))]:
            raise ValueError
    except (ValueError, OSError):
        sys.exit(print("error: damaged", file=sys.stderr) or 2) if CARE else sums.append(7)
put("checkpoint.pt", json.dumps(sums))
put("config.json", "{{}}")
while len(sums) < 20:
    sums.append((sums[-1] if sums else 0) + len(sums))
    put("checkpoint.pt", json.dumps(sums))
    time.sleep(0.02)
    if asked:
        sys.exit(128 + asked[0])
for name in ("metrics.jsonl", "directions.jsonl"):
    put(name, "".join(json.dumps({{"step": n, "loss": s, "a_time": time.time()}}) + "\\n" for n, s in enumerate(sums)))
(folder / "student").mkdir(exist_ok=True)
put("student/model.safetensors", str(sums[-1]))
put("result.json", json.dumps({{"last": sums[-1], "best": 0, "steps": 20, "seconds": time.time()}}))
"""


@pytest.fixture(params=[True, False], ids=["careful", "careless"])
def program(request, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(care=request.param))
    made = Program("a program", script, [], "--output", "--overwrite", "checkpoint.pt", tmp_path / "runs", seconds=0.2)
    made.folder.mkdir()
    assert made.run(made.whole).code == 0
    pid = made.start(made.half)
    while not (made.half / "checkpoint.pt").exists() or len(json.loads((made.half / "checkpoint.pt").read_text())) < 5:
        pass
    os.kill(pid, signal.SIGKILL)
    made.ended(pid)
    made.careful = request.param
    return made


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_that_resumes_holds_and_its_ends_are_counted(program, tmp_path, signum):
    if not program.careful:
        pytest.skip("it does not promise that")
    program.seconds = 0.1
    assert faults.interrupted([signum], program, tmp_path / "case", random.Random(1)) >= 1


def test_two_at_once_are_told_from_one(program, tmp_path):
    def attempt():
        faults.two_at_once(program, tmp_path / "case", random.Random(1))

    if program.careful:
        attempt()
    else:
        with pytest.raises(faults.FaultError):
            attempt()


def test_damage_that_goes_unsaid_is_found(program, tmp_path):
    found = []
    for seed in range(30):
        try:
            faults.damaged(("checkpoint.pt",), program, tmp_path / f"case{seed}", random.Random(seed))
        except faults.FaultError as error:
            found.append(str(error))
    assert bool(found) != program.careful
    assert all("another student, without a word" in each or "ended" in each or "Traceback" in each for each in found)


def test_a_refusal_is_one_line():
    assert Ended(2, "error: it is damaged\n").refused
    assert not Ended(2, "error: it is damaged\nerror: twice\n").refused
    assert not Ended(2, "Traceback\nerror: \n").refused
    assert not Ended(1, "error: \n").refused


def test_the_table_counts_what_was_tried_and_names_what_could_not_be():
    case = next(iter(faults.CASES))
    rows = [{"program": name, "case": case, "tried": 3, "held": 2, "faults": 7} for name in ("images", "text")]
    lines = faults.show(rows, ["disk full in the midst of a run"]).splitlines()
    assert lines[2] == f"| {case} | images | 3 | 2 | 7 |"
    assert lines[4] == "| all | both | 6 | 4 | 14 |"
    assert lines[-1] == "Not tried, as the rights do not allow it: disk full in the midst of a run."
