"""The pieces that keep a run whole: lock, manifest, disk, signals, bounded reading, leftovers."""

import errno
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from common import ROOT
from common.run import disk, manifest, stopping
from common.run.disk import check_space, is_full
from common.run.errors import UserError, run_cli
from common.run.files import remove_leftovers, write_aside, write_json
from common.run.lock import LOCK, check_unlocked, locked
from common.run.manifest import last_whole, write_manifest
from common.run.reading import parse_json, read_json, read_json_lines, read_safetensors, read_tensors, read_yaml
from common.run.step_log import StepLog
from common.run.stopping import Stopped, resume_command, stop_requests


def python(code, **others):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **others)


# lock

HOLD = "from common.run.lock import locked; from pathlib import Path; import sys, time\n"
HOLD += "with locked('--output_dir', Path({!r})): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `run`."""
    process = python(HOLD.format(str(tmp_path / "run")), stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_with_the_firsts_process_and_start(tmp_path, holder):
    told = rf"--output_dir {tmp_path}/run is in use by another run, process {holder.pid}, started \d{{4}}-\d\d-\d\d "
    with pytest.raises(UserError, match=told), locked("--output_dir", tmp_path / "run"):
        pass
    with pytest.raises(UserError, match=told):
        check_unlocked("--output_dir", tmp_path / "run")


def test_the_lock_of_a_killed_run_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked("--output_dir", tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    check_unlocked("--output_dir", tmp_path / "run")


def test_a_lock_leaves_nothing_behind(tmp_path):
    with locked("--output_dir", tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_flock_a_file_that_is_there_is_a_lock(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    told = rf"process {os.getpid()}, started .* \(remove {tmp_path}/{LOCK} if it is no longer there\)"
    with locked("--output_dir", tmp_path), pytest.raises(UserError, match=told), locked("--output_dir", tmp_path):
        pass
    with locked("--output_dir", tmp_path):
        pass


def test_both_programs_run_without_fcntl_and_resource(tmp_path):
    run = f"""
import sys
from common.torchvision_repair import repair_torchvision
repair_torchvision()
import accelerate, datasets, filelock, psutil, tensorboard, torch, transformers  # what they import here is their matter
sys.modules.update(fcntl=None, resource=None)
sys.path[:0] = {[str(ROOT / "tests/helpers"), str(ROOT / "nlp/BERT-of-Theseus")]}
from pathlib import Path
from types import SimpleNamespace
from cv_fixtures import save_teacher, short_run
from nlp_fixtures import execute, flags, write_model, write_rte
folder = Path({str(tmp_path)!r})
places = SimpleNamespace(model=write_model(folder / "model"), data=write_rte(folder / "data"))
execute(flags(places, folder / "nlp", "--max_steps", "1"))
short_run(folder / "cv", save_teacher(folder / "teacher"), "SOLVER.EPOCHS 1")
"""
    assert python(run).wait() == 0
    assert all((tmp_path / name / "result.json").is_file() for name in ("nlp", "cv"))


# manifest


@pytest.fixture
def checkpoints(tmp_path):
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"w" * 100)
        (folder / "optimizer").write_bytes(b"o" * 50)
        write_manifest(folder / manifest.MANIFEST, [folder / "weights", folder / "optimizer"])
    return [tmp_path / f"checkpoint-{step}" / manifest.MANIFEST for step in (4, 2)]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "optimizer").unlink(), "optimizer is missing"),
        (lambda folder: (folder / "weights").write_bytes(b"w" * 50), "weights has 50 bytes instead of 100"),
        (lambda folder: (folder / "weights").write_bytes(b"v" * 100), "weights is not as it was written"),
        (lambda folder: (folder / manifest.MANIFEST).write_text("{"), "manifest.json is not valid JSON"),
        (lambda folder: (folder / manifest.MANIFEST).write_text("{}"), "manifest.json is not as it was written"),
        (lambda folder: (folder / manifest.MANIFEST).unlink(), "it was not written to its end"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it_with_the_reason(checkpoints, spoil, told):
    newest, before = checkpoints
    assert last_whole(checkpoints, "--overwrite") == (newest, [])
    spoil(newest.parent)
    found, [said] = last_whole(checkpoints, "--overwrite")
    assert found == before
    assert said.startswith(f"{newest.parent} is passed over: ")
    assert told in said


def test_where_every_checkpoint_is_damaged_a_run_does_not_start_over_by_itself(checkpoints):
    for each in checkpoints:
        (each.parent / "weights").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no checkpoint is whole .*weights has 0 bytes.*; start again with --overwrite"
    ):
        last_whole(checkpoints, "--overwrite")


def test_a_run_killed_in_its_first_checkpoint_starts_over(checkpoints):
    checkpoints[0].unlink()
    found, [said] = last_whole(checkpoints[:1], "--overwrite")
    assert found is None
    assert "was not written to its end" in said


# disk


def test_too_little_space_is_told_before_training(tmp_path):
    check_space("--output_dir", tmp_path / "new" / "run", 1)
    with pytest.raises(UserError, match=r"--output_dir .*/run: .* are free there, two checkpoints .* take 1000.0 TB"):
        check_space("--output_dir", tmp_path / "new" / "run", 10**15)


def full(cause):
    try:
        raise cause
    except Exception as error:
        raise ValueError("a library's own words") from error


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.ENOSPC, "No space left on device", "/out/weights"),
        RuntimeError("PytorchStreamWriter failed writing"),
    ],
)
def test_a_full_disk_is_one_line_with_the_place_and_the_way_on(cause, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--cfg", "a b.yaml", "--overwrite"])
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: full(cause))
    assert caught.value.code == 2
    where = ": /out/weights cannot be written" if isinstance(cause, OSError) else ""
    expected = f"error: disk full{where}; make room, then go on with: python train.py --resume --cfg 'a b.yaml'\n"
    assert capsys.readouterr().err == expected


def test_a_full_disk_that_torch_tells_in_its_own_words_has_the_place(tmp_path):
    def write(_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7680 vs 7572")

    with pytest.raises(OSError, match="No space left") as caught:
        write_aside(tmp_path / "state.pt", write)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "state.pt"))


def test_an_error_that_quotes_megabytes_is_cut(capsys):
    def main():
        raise UserError("no column 'label'; its header is " + "x" * 10**6)

    with pytest.raises(SystemExit):
        run_cli(main)
    assert len(capsys.readouterr().err) < 2100


def test_another_error_keeps_its_traceback():
    with pytest.raises(ValueError, match="own words"):
        run_cli(lambda: full(RuntimeError("something else")))
    assert not is_full(OSError(errno.EACCES, "Permission denied"))


def test_bytes_are_written_in_words():
    assert [disk.in_bytes(count) for count in (5, 2500, 10**15)] == ["5 bytes", "2.5 kB", "1000.0 TB"]


# signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_step_and_a_second_one_does_not(signum):
    with stop_requests() as request:
        assert not request
        os.kill(os.getpid(), signum)
        assert request.signum == signum
        with pytest.raises(Stopped):
            signal.raise_signal(signum)


def test_a_stopped_run_says_how_to_go_on_and_ends_with_its_signals_code(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--overwrite_output_dir", "--output_dir", "my run"])

    def main():
        raise Stopped(signal.SIGTERM, "checkpoint-7 is saved")

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 143
    message = "stopped by SIGTERM, checkpoint-7 is saved; to go on: python run.py --resume --output_dir 'my run'\n"
    assert capsys.readouterr().err == message
    assert resume_command(["p", "--resume"]) == "python p --resume"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_ends_at_once_without_a_traceback(signum, code):
    lines = ["import time", "from common.run.errors import run_cli"]
    lines += ["run_cli(lambda: (print('up', flush=True), time.sleep(60)))"]
    process = python("\n".join(lines), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors.count("\n") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_a_signal_that_a_library_takes_for_an_error_of_its_own_stays_a_signal(capsys, monkeypatch, signum, error):
    monkeypatch.setattr(stopping, "_ended_by", [])

    def main():
        try:
            signal.raise_signal(signum)
        except BaseException:
            raise error("the file is damaged") from None

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 128 + signum
    assert capsys.readouterr().err == f"stopped by {signal.Signals(signum).name}\n"


def test_a_signal_that_ended_a_program_is_not_the_next_ones(capsys):
    with pytest.raises(SystemExit):
        run_cli(lambda: signal.raise_signal(signal.SIGTERM))

    def refused():
        raise UserError("--seeds 0: a whole number of at least 1")

    with pytest.raises(SystemExit) as caught:
        run_cli(refused)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: --seeds 0: a whole number of at least 1\n")


# leftovers


def test_what_killed_writes_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ".student.12.tmp").mkdir()
    for name in (".result.json.123.tmp", "checkpoint-2/.state.pt.9.tmp", "notes.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"checkpoint-2", "notes.tmp", ".mine.tmp"}


# reading

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 20)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("a.json", b"{", read_json),
        ("a.json", b"[]", read_json),
        ("a.json", b"\xff", read_json),
        ("a.json", b"[" * 100_000, read_json),
        ("a.json", b'{"size": 1' + b"0" * 30 + b"}", read_json),
        ("a.json", b'{"size": 1e999}', read_json),
        ("a.json", b'{"size": NaN}', read_json),
        ("a.jsonl", b'{"a": 1}\n{"a"\n{}\n', read_json_lines),
        ("a.yaml", b"[" * 5_000, read_yaml),
        ("a.yaml", b"- " * 5_000, read_yaml),
        ("a.yaml", BOMB.encode(), read_yaml),
        ("a.yaml", b"a: 1\na: 2\n", read_yaml),
        ("a.yaml", b"a: 2021-99-99\n", read_yaml),
        ("a.pt", b"PK\x03\x04", read_tensors),
        ("a.pt", b"", read_tensors),
        ("a.safetensors", b"\xff" * 40, read_safetensors),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path, name, content, read):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("read", [read_json, read_yaml, read_tensors, read_safetensors])
def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path, read):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read(path)


def test_whole_files_are_read_as_they_are(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    write_json(tmp_path / "a.json", {"n": 12, "x": 0.5, "list": [None, True]})
    assert torch.equal(read_tensors(tmp_path / "a.pt")["a"], torch.ones(2))
    assert read_json(tmp_path / "a.json") == {"n": 12, "x": 0.5, "list": [None, True]}
    assert parse_json("[1]", "here", list) == [1]
    assert math.isnan(parse_json('{"x": NaN}', "here", finite=False)["x"])


def test_a_resumed_log_with_a_bad_line_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnoise\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not valid JSON"):
        StepLog(tmp_path / "metrics.jsonl", resume_step=2)


def test_a_resumed_log_keeps_the_lines_that_its_checkpoint_had(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl")
    log.append(1, loss=1.0)
    kept = log.lines
    log.append(1, summary=1.0)
    assert StepLog(tmp_path / "metrics.jsonl", resume_step=1, resume_lines=kept).lines == 1
