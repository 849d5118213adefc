"""The record of a run: what it holds, what resuming keeps of it, and files that are never seen half-written."""

import json
import math
import subprocess
import sys

import pytest

from common.run import record
from common.run.files import write_aside, write_json, write_text
from common.run.record import RunRecord, git_revision, peak_memory_bytes, versions

MEASURED = {"peak_memory_bytes", "git_revision", "versions", "device", "command"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_resolved_config_is_written_at_once(tmp_path):
    RunRecord(tmp_path / "new", {"seed": 3})
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"seed": 3}


@pytest.mark.parametrize(("mps", "cuda", "told"), [(True, False, True), (True, True, False), (False, False, False)])
def test_a_gpu_that_is_not_used_is_named(tmp_path, capsys, monkeypatch, mps, cuda, told):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    RunRecord(tmp_path, {})
    assert ("the GPU of this Mac (MPS) is not used" in capsys.readouterr().out) == told


def test_every_log_is_one_line_with_its_step(tmp_path):
    run = RunRecord(tmp_path, {})
    run.log(1, loss=0.5)
    run.log(2, loss=0.25, note="x")
    assert lines_of(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "note": "x"}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_logged_as_valid_json(tmp_path, value):
    RunRecord(tmp_path, {}).log(1, loss=value)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": str(value)}


def test_a_new_run_starts_an_empty_log(tmp_path):
    RunRecord(tmp_path, {}).log(1, loss=0.5)
    RunRecord(tmp_path, {})
    assert lines_of(tmp_path) == []


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_a_torn_one(tmp_path):
    run = RunRecord(tmp_path, {})
    for step in (1, 2, 3):
        run.log(step, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    RunRecord(tmp_path, {}, resume_step=2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_the_result_says_where_with_what_and_by_which_command_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "two words"])
    returned = RunRecord(tmp_path, {}).finish(task="RTE", last=0.5)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == returned
    assert written.keys() == {"task", "last"} | MEASURED
    assert written["command"] == "python train.py --name 'two words'"


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_result_with_a_number_that_is_not_finite_is_not_written(tmp_path, wrong):
    with pytest.raises(FloatingPointError, match="dev_pearson of the result is not a finite number"):
        RunRecord(tmp_path, {}).finish(task="RTE", last_evaluation={"dev_loss": 0.5, "dev_pearson": wrong})
    assert not (tmp_path / "result.json").exists()


def test_versions_name_python_and_the_libraries_that_shape_a_result():
    assert {"python", "torch", "transformers", "numpy"} <= versions().keys()


def test_a_library_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(record, "LIBRARIES", ("no-such-library", "torch"))
    assert versions().keys() == {"python", "torch"}


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory_bytes() < 2**40  # a process with torch in it: more than 50 MiB


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A git repository with record.py in its place."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "record.py").write_text("")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_the_revision_is_the_commit(source):
    assert git_revision() == git(source, "rev-parse", "HEAD").strip()


def test_changed_sources_mark_the_revision_as_dirty(source):
    (source / "common" / "record.py").write_text("changed")
    assert git_revision() == git(source, "rev-parse", "HEAD").strip() + "-dirty"


def test_rendered_results_are_no_change_of_the_sources(source):
    (source / "results").mkdir()
    (source / "results" / "table.md").write_text("")
    git(source, "add", ".")
    git(source, "commit", "-q", "-m", "results")
    (source / "results" / "table.md").write_text("a row more")
    assert git_revision() == git(source, "rev-parse", "HEAD").strip()
    (source / "common" / "record.py").write_text("changed")
    assert git_revision().endswith("-dirty")


def test_outside_of_git_the_revision_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() == "unknown"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def torn(aside):
        aside.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_aside(path, torn)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_makes_the_folders_that_it_needs(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": [1]})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [1]}
