"""scripts/gpu_check.sh on the CPU: its cheapest step really runs, the others are commands that parse."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common import ROOT
from scripts import benchmark, reproduce

STEPS = ["doctor", "tests", "method", "curvature", "cv", "compiled", "table"]


@pytest.fixture
def check(tmp_path):
    """Runs it with OUT and PYTHON set; (exit code, lines of its output)."""

    def run(**environment: str) -> tuple[int, list[str]]:
        variables = {**os.environ, "OUT": str(tmp_path / "gpu"), "PYTHON": sys.executable, **environment}
        done = subprocess.run(
            ["bash", ROOT / "scripts/gpu_check.sh"], env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    return run


def stub(folder: Path, body: str) -> str:
    """A program in Python's place, which does what `body` says for the words that it is given."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\ncase "$*" in\n{body}\nesac\n')
    program.chmod(0o755)
    return str(program)


def report(lines: list[str]) -> dict[str, tuple[str, str]]:
    """By step its exit code and state."""
    start = next(i for i, line in enumerate(lines) if line.split() == ["step", "exit", "seconds", "state"])
    cells = [line.split(maxsplit=3) for line in lines[start + 1 :]]
    return {name: (code, state) for name, code, _, state in cells}


def test_a_step_writes_its_figures_and_its_log(check, tmp_path):
    code, lines = check(STEPS="curvature", QUICK="1")
    assert (code, report(lines)) == (0, {"curvature": ("0", "ok")})
    assert (tmp_path / "gpu" / "curvature.json").is_file()
    assert "| factors | renewed |" in (tmp_path / "gpu" / "curvature.log").read_text()
    assert (tmp_path / "gpu" / "report.txt").read_text().splitlines() == lines[-2:]


def test_a_failing_step_stops_no_other(check, tmp_path):
    code, lines = check(PYTHON=stub(tmp_path, "*' method '*) exit 3 ;;"), DATA="images")
    assert code == 1
    assert list(report(lines)) == STEPS
    assert {name: code for name, (code, _) in report(lines).items() if code != "0"} == {"method": "3"}
    assert report(lines)["method"][1].endswith("method.log")


def test_a_step_ends_with_the_budget_and_none_begins_after_it(check, tmp_path):
    code, lines = check(PYTHON=stub(tmp_path, "*' method '*) exec sleep 50 ;;"), DATA="images", BUDGET="24")
    found = report(lines)
    assert code == 1
    assert found["method"] == ("124", "out of time")
    assert found["cv"] == found["compiled"] == ("-", "no time left")
    assert found["table"] == ("-", "a second call goes on")


def test_a_table_that_takes_longer_is_no_failure(check, tmp_path):
    code, lines = check(PYTHON=stub(tmp_path, "*reproduce*) exec sleep 50 ;;"), DATA="images", BUDGET="24")
    assert (code, report(lines)["table"]) == (0, ("124", "a second call goes on"))


def test_its_commands_parse(check):
    code, lines = check(DRY_RUN="1", DATA="images", QUICK="1")
    commands = {name: shlex.split(words)[1:] for name, _, words in (line.partition(": ") for line in lines)}
    assert (code, list(commands)) == (0, STEPS)
    for name in ("method", "curvature", "cv", "compiled"):
        assert benchmark.build_parser().parse_args(commands[name][1:]).quick
    args = reproduce.build_parser().parse_args(commands["table"][1:])
    assert (args.table, args.tasks, args.values) == ("cifar100", ["res56_res20"], [("data", "images")])


def test_without_data_images_are_random_and_no_row_is_run(check):
    _, lines = check(DRY_RUN="1")
    assert [line.partition(":")[0] for line in lines] == STEPS[:-1]
    assert "--cifar100 random" in lines[-2]


def test_every_test_that_is_marked_is_in_a_file_that_it_runs(check):
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu\n" in path.read_text()}
    _, lines = check(DRY_RUN="1", STEPS="tests")
    assert {ROOT / word for word in lines[0].split() if word.endswith(".py")} == marked
