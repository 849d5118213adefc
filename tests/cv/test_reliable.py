"""Nothing is lost and nothing wrong goes unsaid: output folders, checkpoints, signals, full disks, divergence."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cv_fixtures import SHORT_RUN, column, read_run, same_tensors, save_teacher, short_config, short_run
from PIL import Image

import cv.trainer
from common import ROOT
from common.run.errors import UserError, run_cli
from common.run.lock import check_unlocked
from common.run.record import RunRecord
from common.run.stopping import Stopped
from cv.config import load_config
from cv.data.cifar import CIFAR10, read_parquet
from cv.export import save_model
from cv.models import build_model
from cv.output import WRITTEN, RunFolder
from cv.trainer import train

PLAIN = "DISTILLER.TYPE vanilla"
JOINED = "SOLVER.EPOCHS 4 DSKD.ENABLED true DSKD.SVD_STEPS 5 DSKD.GRAD_STEPS 3"
CONTRAST = "SOLVER.EPOCHS 4 DISTILLER.TYPE crd CRD.NCE_K 16 CRD.EMBED_DIM 8"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of a short run, to be copied."""
    return short_run(tmp_path_factory.mktemp("ended"), None, PLAIN).folder


@pytest.fixture
def earlier(ended, tmp_path):
    """A folder with a run in it."""
    return shutil.copytree(ended, tmp_path / "run")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(cfg, **how) -> str:
    with pytest.raises(UserError) as caught:
        train(cfg, **how)
    return str(caught.value)


# What --overwrite removes


def test_folders_of_others_are_not_removed(tmp_path):
    for name in ("tracking", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    before = snapshot(tmp_path)
    message = refusal(short_config(tmp_path, None, PLAIN), overwrite=True)
    assert message.startswith(f"--overwrite: OUTPUT_DIR {tmp_path} has student, tracking, but no config.json of a run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"DISTILLER": 3}', '{"model_name_or_path": "bert"}'])
def test_a_config_of_another_program_is_not_a_runs(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    assert refusal(short_config(tmp_path, None, PLAIN), overwrite=True).startswith("--overwrite: OUTPUT_DIR")


def test_an_empty_output_folder_is_the_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(str(ROOT / "configs/demo/base.yaml"), ["OUTPUT_DIR", ""])
    assert cv.trainer.output_folder(cfg) == ROOT / "outputs" / "digits" / "vanilla_resnet20" / "seed1"


# The earlier run


@pytest.mark.parametrize(
    "overrides",
    [
        "DATASET.SUBSET 1",
        "DATASET.SUBSET 2 SOLVER.BATCH_SIZE 2 DATASET.HELD_OUT 1437",
        "DSKD.ENABLED true DISTILLER.TEACHER ''",
        "DISTILLER.TYPE kd DISTILLER.TEACHER resnet14 DISTILLER.TEACHER_CKPT nowhere",
        "CRD.EMBED_DIM 1000000000000000 DISTILLER.TYPE crd",
    ],
)
def test_what_can_be_known_first_costs_no_earlier_run(earlier, teacher, overrides):
    before = snapshot(earlier)
    assert refusal(short_config(earlier, teacher, f"{PLAIN} {overrides}"), overwrite=True)
    assert snapshot(earlier) == before


def test_an_error_before_the_first_checkpoint_costs_no_earlier_run(earlier, capsys):
    before = snapshot(earlier)
    message = refusal(short_config(earlier, None, f"{PLAIN} SOLVER.LR 1e30 SOLVER.EPOCHS 9"), overwrite=True)
    assert "diverged" in message
    assert snapshot(earlier) == before
    assert f"the earlier run in {earlier} stays, as the new one has no checkpoint yet" in capsys.readouterr().out


def test_the_earlier_run_goes_with_the_first_checkpoint_of_the_new_one(earlier, monkeypatch):
    there = []
    save = cv.trainer._Run._save

    def look(self):
        there.append((earlier / ".former_run" / "checkpoint.pt").exists())
        save(self)
        there.append((earlier / ".former_run").exists())

    monkeypatch.setattr(cv.trainer._Run, "_save", look)
    short_run(earlier, None, f"{PLAIN} SOLVER.SEED 2 SOLVER.EPOCHS 2", overwrite=True)
    assert there == [True, False, False, False]
    assert not [path for path in earlier.iterdir() if path.name.startswith(".")]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(1, 40))
def test_a_kill_at_any_place_keeps_a_run_whole(tmp_path, after, monkeypatch):
    """The earlier run or the new one, after a kill behind the n-th change of the file system, and the next start."""
    for name in WRITTEN:
        (tmp_path / name).write_text(f"old {name}")
    output, left = RunFolder(tmp_path), [after]
    real = {name: getattr(os, name) for name in ("replace", "unlink", "mkdir", "rmdir")}

    def counted(name):
        def change(*args, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real[name](*args, **options)

        return change

    def new(*names):
        for name in names:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            (tmp_path / name).write_text(f"new {name}")

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, counted(name))
        try:
            output.set_aside()
            new("config.json", "metrics.jsonl")
            if after % 2:  # the next start comes before the first checkpoint
                output._recover()
            else:
                new("checkpoint.pt")
                output.settle()
        except Killed:
            pass
    output._recover()
    names = {path.name for path in tmp_path.iterdir()}
    words = {path.read_text().split()[0] for path in tmp_path.iterdir()}
    assert (words, names) in [({"old"}, set(WRITTEN)), ({"new"}, {"config.json", "metrics.jsonl", "checkpoint.pt"})]


@pytest.mark.parametrize("flag", [{"resume": True}, {"overwrite": True}])
def test_a_run_without_a_checkpoint_is_started_again_by_either_flag(tmp_path, flag, capsys):
    whole = short_run(tmp_path / "whole", None, PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv.trainer._Run, "_train_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(short_config(tmp_path / "run", None, PLAIN))
    again = short_run(tmp_path / "run", None, PLAIN, **flag)
    assert same_tensors(again.weights, whole.weights)
    assert [line["step"] for line in again.steps] == [1, 2, 3, 4]
    assert ("ended before its first checkpoint" in capsys.readouterr().out) == ("resume" in flag)


def test_leftovers_of_a_killed_write_are_removed(earlier):
    (earlier / ".checkpoint.pt.77.tmp").write_text("half")
    short_run(earlier, None, f"{PLAIN} SOLVER.EPOCHS 2", resume=True)
    assert not (earlier / ".checkpoint.pt.77.tmp").exists()


# Two runs in one folder


def test_a_second_run_in_a_folder_is_refused_with_the_firsts_process(tmp_path):
    hold = "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
    hold += "from cv.output import RunFolder\n"
    hold += "with RunFolder(Path(sys.argv[2])).hold(): print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", hold, str(ROOT), str(tmp_path)]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        message = refusal(short_config(tmp_path, None, PLAIN))
        assert f"OUTPUT_DIR {tmp_path} is in use by another run, process {first.pid}, started " in message
        assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
    finally:
        first.kill()
        first.wait()
    assert short_run(tmp_path, None, PLAIN).result["steps"] == 4


def test_the_folder_is_held_from_the_first_step_to_the_result(tmp_path, monkeypatch):
    refused = []

    def looking(method):
        def looked(*args, **kwargs):
            with pytest.raises(UserError, match="in use by another run"):
                check_unlocked("OUTPUT_DIR", tmp_path)
            refused.append(method.__name__)
            return method(*args, **kwargs)

        return looked

    monkeypatch.setattr(cv.trainer._Run, "_step", looking(cv.trainer._Run._step))
    monkeypatch.setattr(RunRecord, "finish", looking(RunRecord.finish))
    short_run(tmp_path, None, PLAIN)
    assert (refused[0], refused[-1]) == ("_step", "finish")
    check_unlocked("OUTPUT_DIR", tmp_path)


# Other data, other teachers


def test_a_teacher_of_other_classes_is_refused_where_they_are_compared(tmp_path, capsys):
    torch.manual_seed(7)
    names = [f"animal {number}" for number in range(10)]
    save_model(build_model("resnet14", 10), "resnet14", tmp_path / "t", class_names=names, dataset="cifar10")
    message = refusal(short_config(tmp_path / "run", tmp_path / "t"))
    told = f"{tmp_path / 't'}: class 0 of the teacher is 'animal 0', of this data set '0'"
    assert message.startswith(f"{told}, and kd compares the two networks class by class; train a resnet14 on this data")
    short_run(tmp_path / "run", tmp_path / "t", "DISTILLER.TYPE at")
    assert f"note: {told}\n" in capsys.readouterr().out


def test_a_teacher_of_another_data_set_is_noted(tmp_path, capsys):
    torch.manual_seed(7)
    save_model(build_model("resnet14", 10), "resnet14", tmp_path / "t", dataset="cifar10")
    short_run(tmp_path / "run", tmp_path / "t")
    assert (
        f"note: {tmp_path / 't'}: the teacher was trained on cifar10, this run is on digits\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("change", ["labels", "images"])
def test_other_training_data_is_not_resumed_with(earlier, monkeypatch, change):
    load = cv.trainer.load_dataset

    def other(*args, **how):
        data = load(*args, **how)
        if change == "labels":
            data.train.labels[:] = 9 - data.train.labels
        else:
            data.train.images[5, 0, 0, 0] ^= 1
        return data

    monkeypatch.setattr(cv.trainer, "load_dataset", other)
    message = refusal(short_config(earlier, None, f"{PLAIN} SOLVER.EPOCHS 2"), resume=True)
    assert message.startswith(f"--resume: {earlier / 'checkpoint.pt'} was written with other training images or labels")


# Checkpoints


def resealed(path: Path, change) -> None:
    """Change a checkpoint that has no seal, as older ones have none."""
    state = torch.load(path, weights_only=True)
    state.pop("sha256", None)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["weights"]["student.conv1.weight"].zero_(),
        lambda state: state["weights"].pop("student.bn1.weight"),
        lambda state: state["optimizer"]["state"].clear(),
        lambda state: state["progress"].update(step=3),
        lambda state: state.pop("random"),
    ],
    ids=["a weight", "half of the weights", "the optimizer", "the step", "the random numbers"],
)
def test_a_checkpoint_that_is_not_as_it_was_written_is_refused(earlier, change):
    path = earlier / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    message = refusal(short_config(earlier, None, f"{PLAIN} SOLVER.EPOCHS 2"), resume=True)
    told = "is damaged: its contents are not as they were written; start again with --overwrite"
    assert message == f"--resume: {path} {told}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state["weights"].pop("student.bn1.weight"), "its weight student.bn1.weight is missing"),
        (lambda state: state["weights"].update(x=torch.ones(1)), "its weight x is none of this run's networks"),
        (lambda state: state.update(optimizer={}), "is not the checkpoint of this run"),
        (lambda state: state.update(progress={"a": 1}), "is not the checkpoint of this run"),
        (lambda state: state.update(random=torch.ones(2)), "is not the checkpoint of this run"),
        (lambda state: state.pop("weights"), "is not the checkpoint of this run"),
        (lambda state: state.update(config={"SOLVER": [1]}), "was written with"),
    ],
)
def test_a_checkpoint_without_a_seal_must_still_be_whole(earlier, change, told):
    resealed(earlier / "checkpoint.pt", change)
    message = refusal(short_config(earlier, None, f"{PLAIN} SOLVER.EPOCHS 2"), resume=True)
    assert message.startswith(f"--resume: {earlier / 'checkpoint.pt'} ")
    assert told in message


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:-50_000]), Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, teacher, spoil, capsys):
    whole = short_run(tmp_path / "whole", teacher, JOINED)
    shutil.copytree(whole.folder, tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoint.pt")
    capsys.readouterr()
    ours = short_run(tmp_path / "run", teacher, JOINED, resume=True)
    told = f"note: --resume: {tmp_path / 'run' / 'checkpoint.pt'} is "
    assert (told in capsys.readouterr().out) == (spoil is not Path.unlink)
    assert same_tensors(ours.checkpoint["weights"], whole.checkpoint["weights"])
    assert column(ours, "loss") == column(whole, "loss")
    assert ours.epochs == whole.epochs


def test_where_both_checkpoints_are_damaged_the_newest_is_named(tmp_path):
    short_run(tmp_path, None, f"{PLAIN} SOLVER.EPOCHS 2")
    for name in ("checkpoint.pt", "checkpoint_before.pt"):
        (tmp_path / name).write_bytes(b"noise")
    message = refusal(short_config(tmp_path, None, f"{PLAIN} SOLVER.EPOCHS 3"), resume=True)
    assert (
        message
        == f"--resume: {tmp_path / 'checkpoint.pt'} is not the checkpoint of a run; start again with --overwrite"
    )


def test_a_flipped_bit_is_noticed(earlier):
    path = earlier / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["weights"]["student.stages.2.0.bn1.bias"]
    content[content.index(weight.numpy().tobytes()[:64])] ^= 16  # torch.load checks no sums
    path.write_bytes(content)
    assert "start again with --overwrite" in refusal(short_config(earlier, None, PLAIN), resume=True)


def test_a_bad_line_of_the_log_is_named(earlier):
    with (earlier / "metrics.jsonl").open("r+") as file:
        lines = file.readlines()
        lines[1] = "noise\n"
        file.seek(0)
        file.writelines(lines)
    message = refusal(short_config(earlier, None, f"{PLAIN} SOLVER.EPOCHS 2"), resume=True)
    assert message.startswith(f"{earlier / 'metrics.jsonl'} line 2 is not valid JSON")


# Data files

BUFFER = io.BytesIO()
Image.new("RGB", (32, 32)).save(BUFFER, "PNG")
PNG = BUFFER.getvalue()


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"names": "ab"}}}}'])
def test_malformed_metadata_of_parquet_is_passed_over(tmp_path, record):
    table = pa.table({"img": [PNG, PNG], "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": record}), tmp_path / "a.parquet")
    images, classes = read_parquet(CIFAR10, [tmp_path / "a.parquet"])
    assert (len(images), classes) == (2, None)


def test_damaged_parquet_is_one_line(tmp_path):
    table = pa.table({"img": [PNG, PNG], "label": [0, 1]})
    pq.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        broken = bytearray(whole)
        for place in torch.randint(len(whole) - 900, len(whole), (3,), generator=generator).tolist():
            broken[place] = int(torch.randint(256, (1,), generator=generator))
        (tmp_path / "a.parquet").write_bytes(broken)
        try:
            read_parquet(CIFAR10, [tmp_path / "a.parquet"])
        except UserError as error:
            told = str(error)
            assert told.startswith(str(tmp_path / "a.parquet"))


# Memory and disk


def test_a_size_that_no_memory_holds_is_one_line(tmp_path, teacher):
    overrides = "DISTILLER.TYPE crd CRD.EMBED_DIM 100000000000000"
    message = refusal(short_config(tmp_path, teacher, overrides))
    assert message.startswith("not enough memory (")
    assert "\n" not in message


def test_too_little_room_is_told_before_the_training(earlier, monkeypatch):
    before = snapshot(earlier)
    usage = shutil.disk_usage(earlier)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    message = refusal(short_config(earlier, None, PLAIN), overwrite=True)
    assert message.startswith(f"OUTPUT_DIR {earlier}: 100.0 kB are free there, two checkpoints of this run take ")
    assert snapshot(earlier) == before


def test_a_full_disk_is_one_line_with_the_way_on(earlier, monkeypatch, capsys):
    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3")

    before = (earlier / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(sys, "argv", ["cv/train_svd.py", "--resume", "--cfg", "a.yaml"])
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: train(short_config(earlier, None, f"{PLAIN} SOLVER.EPOCHS 2"), resume=True))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: disk full")
    assert error.endswith("make room, then go on with: python cv/train_svd.py --resume --cfg a.yaml\n")
    assert (earlier / "checkpoint.pt").read_bytes() == before
    assert not list(earlier.glob(".*.tmp"))


# Numbers that are not finite


def test_a_teacher_that_is_not_finite_is_no_matter_of_the_learning_rate(tmp_path):
    torch.manual_seed(7)
    network = build_model("resnet14", 10)
    network.conv1.weight.data[0] = float("nan")
    save_model(network, "resnet14", tmp_path / "t")
    message = refusal(short_config(tmp_path / "run", tmp_path / "t"))
    assert message.startswith(
        f"{tmp_path / 't' / 'model.safetensors'}: conv1.weight is not finite; the file is damaged"
    )
    assert "LR" not in message


def test_a_loss_that_is_not_finite_before_any_update_is_no_matter_of_the_learning_rate(tmp_path, teacher):
    message = refusal(short_config(tmp_path, teacher, "KD.T 1e-38 LOG.INTERVAL 100"))
    assert message.startswith("the loss is not finite in step 1, before any update: ")
    assert "SOLVER.LR" not in message


# Signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("overrides", "step"), [(JOINED, 6), (JOINED, 7), (JOINED, 8), (CONTRAST, 9), (JOINED, 2)])
def test_a_run_that_a_signal_stops_is_resumed_to_the_bits_of_the_whole_one(tmp_path, teacher, overrides, step, signum):
    take = cv.trainer._Run._step

    def signalled(self, *batch):
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), signum)
        return take(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv.trainer._Run, "_step", signalled)
        with pytest.raises(Stopped) as caught:
            train(short_config(tmp_path / "run", teacher, overrides))
    assert caught.value.code == 128 + signum
    assert caught.value.saved == f"{tmp_path / 'run' / 'checkpoint.pt'} is of step {step}"
    torch.manual_seed(99)
    ours = short_run(tmp_path / "run", teacher, overrides, resume=True)
    theirs = short_run(tmp_path / "whole", teacher, overrides)
    assert same_tensors(ours.checkpoint["weights"], theirs.checkpoint["weights"])
    assert column(ours, "loss") == column(theirs, "loss")
    assert ours.epochs == theirs.epochs
    assert [line["step"] for line in ours.steps] == list(range(1, 17))


def test_a_signal_in_an_epoch_without_an_evaluation_is_resumed_alike(tmp_path):
    overrides = f"{PLAIN} SOLVER.EPOCHS 5 SOLVER.EVAL_EPOCHS 3"
    whole = short_run(tmp_path / "whole", None, overrides)
    take = cv.trainer._Run._step
    for step in (4, 6, 18):

        def signalled(self, *batch, step=step):
            if self.progress.step + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(self, *batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cv.trainer._Run, "_step", signalled)
            with pytest.raises(Stopped):
                train(short_config(tmp_path / "run", None, overrides), resume=step > 4)
    ours = short_run(tmp_path / "run", None, overrides, resume=True)
    assert same_tensors(ours.checkpoint["weights"], whole.checkpoint["weights"])
    assert ours.epochs == whole.epochs


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_that_a_signal_stops_says_how_to_go_on(tmp_path, signum, code):
    settings = f"{SHORT_RUN} {PLAIN} SOLVER.EPOCHS 1000 OUTPUT_DIR".split()
    words = [sys.executable, "cv/train_svd.py", "--cfg", "configs/demo/base.yaml", *settings, str(tmp_path / "a b")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while run.poll() is None and not (tmp_path / "a b" / "checkpoint.pt").exists():
        time.sleep(0.05)
    run.send_signal(signum)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code
    [line] = [line for line in errors.splitlines() if "stopped" in line]
    assert line.startswith(
        f"stopped by {signal.Signals(signum).name}, {tmp_path / 'a b' / 'checkpoint.pt'} is of step "
    )
    command = shlex.split(line.split("to go on: ")[1])
    assert command[:3] == ["python", "cv/train_svd.py", "--resume"]
    step = torch.load(tmp_path / "a b" / "checkpoint.pt", weights_only=True)["progress"]["step"]
    more = subprocess.run(
        [sys.executable, *command[1:], "SOLVER.EPOCHS", str(step // 4 + 1)],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True},
    )
    assert more.returncode == 0, more.stderr
    assert read_run(tmp_path / "a b").result["steps"] == 4 * (step // 4 + 1)
    assert json.loads((tmp_path / "a b" / "config.json").read_text())["SOLVER"]["EPOCHS"] == step // 4 + 1
