"""The vision pipeline's runs: record, repetition, resuming, schedule, evaluation, teachers, precision, bad input."""

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cv_fixtures import column, read_run, same_tensors, save_teacher, short_config, short_run
from torch import nn

import cv.teachers
import cv.trainer
from common import ROOT
from common.run.confusion import read_confusion
from common.run.errors import UserError
from common.svd_loss import DirectionSensitivityLoss
from cv.config import load_config
from cv.data import EpochLoader, ImageSet, load_dataset
from cv.export import load_model
from cv.methods import KD
from cv.teachers import find_teacher, load_teacher
from cv.trainer import evaluate, learning_rate, output_folder, train

JOINED = "SOLVER.EPOCHS 4 DSKD.ENABLED true DSKD.SVD_STEPS 5 DSKD.GRAD_STEPS 3"  # held over the end of an epoch
UPDATE = f"{JOINED} DSKD.BASIS update DSKD.RANK 4"
CONTRAST = "SOLVER.EPOCHS 4 DISTILLER.TYPE crd CRD.NCE_K 16 CRD.EMBED_DIM 8"
RANDOM = f"{JOINED} DSKD.DIRECTION random"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a resnet14 with random weights."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher):
    """Gives an uninterrupted run; each is made once."""
    runs = {}

    def run(overrides: str):
        if overrides not in runs:
            runs[overrides] = short_run(tmp_path_factory.mktemp("whole"), teacher, overrides)
        return runs[overrides]

    return run


@pytest.fixture(scope="module")
def ended(tmp_path_factory, teacher):
    """The folder of a short run."""
    return short_run(tmp_path_factory.mktemp("ended"), teacher).folder


def files_of(folder: Path) -> dict[str, str]:
    """Content of every file below a folder, as digests."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def unsealed(state: dict) -> dict:
    """A checkpoint that was changed, as from before there were seals."""
    return {key: value for key, value in state.items() if key != "sha256"}


def refusal(cfg, **how) -> str:
    with pytest.raises(UserError) as caught:
        train(cfg, **how)
    return str(caught.value)


# The command line


def command_line(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_help_takes_less_than_two_seconds_of_processor_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command_line("train_svd.py", "--help", cwd=ROOT / "cv")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "--resume" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.fixture(scope="module")
def shell_run(tmp_path_factory, teacher):
    """`cd cv && python train_svd.py --cfg ...` on a few digits: what it printed and what it wrote."""
    folder = tmp_path_factory.mktemp("shell")
    words = shlex.split(
        "SOLVER.EPOCHS 2 DATASET.SUBSET 100 SOLVER.BATCH_SIZE 64 DISTILLER.TEACHER resnet14 DSKD.RANK 3"
    )
    words += ["OUTPUT_DIR", str(folder), "DISTILLER.TEACHER_CKPT", str(teacher)]
    done = command_line("train_svd.py", "--cfg", "configs/demo/kd_dskd.yaml", *words, cwd=ROOT / "cv")
    assert done.returncode == 0, done.stderr
    return done, read_run(folder)


def test_the_command_runs_from_cv_and_names_the_teacher_with_its_accuracy(shell_run):
    done, run = shell_run
    assert re.search(r"resnet8 from resnet14 of \S+, top-1 10\.00 by kd", done.stdout)
    assert "stages.2.0.conv2 <- stages.2.0.conv2" in done.stdout
    assert f"top-1 last {run.result['last']:.2f}" in done.stdout


def test_the_command_runs_from_the_root(tmp_path):
    words = ["SOLVER.EPOCHS", "1", "DATASET.SUBSET", "64", "OUTPUT_DIR", str(tmp_path)]
    done = command_line("cv/train_svd.py", "--cfg", "configs/demo/vanilla.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert read_run(tmp_path).result["method"] == "vanilla"


def test_the_result_has_every_field_that_tables_read(shell_run):
    result = shell_run[1].result
    assert {key: result[key] for key in ("task", "method", "seed", "metric", "steps", "epochs")} == {
        "task": "digits",
        "method": "kd",
        "seed": 1,
        "metric": "top1",
        "steps": 4,
        "epochs": 2,
    }
    assert result["dskd"]["LAMBDA"] == 0.2
    assert result["throughput_unit"] == "images/s"
    assert result["throughput"] > 0
    assert 0 < result["wall_seconds"] < 600
    assert result["peak_memory_bytes"] > 10**7
    assert set(result["versions"]) >= {"python", "torch", "accelerate"}
    assert result["device"]
    assert result["git_revision"]
    assert "train_svd.py --cfg configs/demo/kd_dskd.yaml SOLVER.EPOCHS 2" in result["command"]


def test_last_and_best_are_those_of_the_logged_epochs(shell_run):
    result, epochs = shell_run[1].result, shell_run[1].epochs
    assert [line["epoch"] for line in epochs] == [1, 2]
    accuracies = [line["test_top1"] for line in epochs]
    assert (result["last"], result["best"]) == (accuracies[-1], max(accuracies))
    assert result["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert result["last_top5"] == epochs[-1]["test_top5"]


def test_the_resolved_settings_are_kept(shell_run):
    config = shell_run[1].config
    assert (config["DATASET"]["SUBSET"], config["DSKD"]["RANK"], config["KD"]["T"]) == (100, 3, 4.0)


def test_tensorboard_events_are_written(shell_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (shell_run[1].folder / "tracking").rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    assert [event.step for event in reader.Scalars("test_top1")] == [2, 4]
    assert {"loss_kd", "dskd_loss"} <= set(reader.Tags()["scalars"])


@pytest.mark.parametrize(("name", "accuracy"), [("student", "last"), ("student_best", "best")])
def test_the_exported_student_has_the_reported_accuracy(shell_run, name, accuracy):
    run = shell_run[1]
    model, info = load_model(run.folder / name)
    data = load_dataset("digits", "")
    loader = EpochLoader(
        data.test, 360, augment=None, mean=info["mean"], std=info["std"], device="cpu", seed=0, shuffle=False
    )
    assert evaluate(model, loader)[0]["top1"] == run.result[accuracy] == info["accuracy"]
    assert (info["dataset"], info["image_size"], info["class_names"]) == ("digits", 8, list("0123456789"))


# Repetition and resuming


def test_the_same_seed_gives_the_same_bits(tmp_path, teacher, whole):
    again = short_run(tmp_path, teacher, JOINED)
    assert same_tensors(again.weights, whole(JOINED).weights)
    assert column(again, "loss") == column(whole(JOINED), "loss")


def watched_steps(monkeypatch) -> list[SimpleNamespace]:
    """What every later optimizer step starts from: weights of the stem, image indices, the epoch that methods read."""
    seen = []
    step = cv.trainer._Run._step

    def look(self, images, labels, indices):
        stem = self.distiller.student.conv1.weight.detach().clone()
        seen.append(SimpleNamespace(stem=stem, indices=indices.tolist(), epoch=self.distiller.epoch.item()))
        return step(self, images, labels, indices)

    monkeypatch.setattr(cv.trainer._Run, "_step", look)
    return seen


def test_another_seed_gives_other_weights_and_another_order(tmp_path, teacher, monkeypatch):
    seen = watched_steps(monkeypatch)
    for seed in (1, 2):
        short_run(tmp_path / str(seed), teacher, f"SOLVER.SEED {seed}")
    assert not torch.equal(seen[0].stem, seen[4].stem)
    assert seen[0].indices != seen[4].indices


def test_a_student_starts_alike_with_and_without_a_teacher(tmp_path, teacher, monkeypatch):
    seen = watched_steps(monkeypatch)
    for method in ("vanilla", "crd"):
        short_run(tmp_path / method, teacher, f"DISTILLER.TYPE {method}")
    assert torch.equal(seen[0].stem, seen[4].stem)
    assert seen[0].indices == seen[4].indices


def test_methods_are_told_the_epoch(tmp_path, teacher, monkeypatch):
    seen = watched_steps(monkeypatch)
    short_run(tmp_path, teacher, "SOLVER.EPOCHS 3")
    assert [step.epoch for step in seen] == [1] * 4 + [2] * 4 + [3] * 4


def test_dskd_is_told_the_share_of_the_planned_steps(tmp_path, teacher, monkeypatch):
    told = []
    begin = DirectionSensitivityLoss.begin_step
    monkeypatch.setattr(
        DirectionSensitivityLoss, "begin_step", lambda self, at, skip: told.append(at) or begin(self, at, skip)
    )
    short_run(tmp_path, teacher, "SOLVER.EPOCHS 2 DSKD.ENABLED true")
    assert told == [step / 8 for step in range(8)]


class Stop(Exception):
    pass


def interrupt(monkeypatch, *, after_epoch: int | None = None, before_step: int | None = None):
    """Make the next run stop at the end of an epoch, behind its checkpoint, or within one."""
    save, step = cv.trainer._Run._save, cv.trainer._Run._step

    def save_then_stop(self):
        save(self)
        if self.progress.epoch == after_epoch:
            raise Stop

    def stop_or_step(self, *batch):
        if self.progress.step + 1 == before_step:
            raise Stop
        return step(self, *batch)

    monkeypatch.setattr(cv.trainer._Run, "_save", save_then_stop)
    monkeypatch.setattr(cv.trainer._Run, "_step", stop_or_step)


def interrupted(folder: Path, teacher: Path, overrides: str, *, resume: bool = False, **where) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, **where)
        with pytest.raises(Stop):
            train(short_config(folder, teacher, overrides), resume=resume)


def without_times(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.mark.parametrize(
    "overrides", [JOINED, UPDATE, RANDOM, CONTRAST], ids=["kd+DSKD", "kd+DSKD update", "kd+random arm", "crd"]
)
def test_a_resumed_run_ends_with_the_bits_of_the_whole_one(tmp_path, teacher, whole, overrides):
    interrupted(tmp_path, teacher, overrides, after_epoch=2)
    torch.manual_seed(99)  # a new process starts from other random numbers
    ours, theirs = short_run(tmp_path, teacher, overrides, resume=True), whole(overrides)
    assert same_tensors(ours.weights, theirs.weights)
    assert same_tensors(ours.checkpoint["weights"], theirs.checkpoint["weights"])  # banks and embeddings, too
    assert without_times(ours.steps) == without_times(theirs.steps)
    assert ours.epochs == theirs.epochs
    assert len(ours.steps) == 16
    assert (ours.result["best_epoch"], ours.result["steps"]) == (theirs.result["best_epoch"], 16)


def test_resuming_goes_on_and_does_not_start_over(tmp_path, teacher, monkeypatch):
    interrupted(tmp_path, teacher, JOINED, after_epoch=2)
    trained = []
    epoch_of = cv.trainer._Run._train_epoch
    monkeypatch.setattr(
        cv.trainer._Run, "_train_epoch", lambda self, epoch, *how: trained.append(epoch) or epoch_of(self, epoch, *how)
    )
    train(short_config(tmp_path, teacher, JOINED), resume=True)
    assert trained == [3, 4]


def test_a_run_that_stops_within_an_epoch_repeats_that_epoch(tmp_path, teacher, whole):
    interrupted(tmp_path, teacher, JOINED, before_step=11)  # the checkpoint is of step 8
    ours = short_run(tmp_path, teacher, JOINED, resume=True)
    assert same_tensors(ours.weights, whole(JOINED).weights)
    assert [line["step"] for line in ours.steps] == list(range(1, 17))


def test_the_time_of_a_resumed_run_counts_all_parts(tmp_path, teacher):
    interrupted(tmp_path, teacher, JOINED, after_epoch=2)
    checkpoint = tmp_path / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    state["progress"]["wall_seconds"] += 1000
    torch.save(unsealed(state), checkpoint)
    assert 1000 < short_run(tmp_path, teacher, JOINED, resume=True).result["wall_seconds"] < 1600


def test_a_finished_run_can_be_resumed_for_more_epochs(tmp_path, teacher):
    short_run(tmp_path, teacher)
    longer = short_run(tmp_path, teacher, "SOLVER.EPOCHS 2", resume=True)
    assert [line["epoch"] for line in longer.epochs] == [1, 2]


def test_resuming_with_other_settings_names_the_first_that_differs(tmp_path, teacher):
    short_run(tmp_path, teacher)
    message = refusal(short_config(tmp_path, teacher, "KD.T 2"), resume=True)
    assert message == (f"--resume: {tmp_path / 'checkpoint.pt'} was written with KD.T = 4.0, and 2.0 is asked for now")


def test_resuming_with_another_teacher_is_refused(tmp_path, teacher):
    interrupted(tmp_path / "run", teacher, JOINED, after_epoch=2)
    other = save_teacher(tmp_path / "other", seed=8)
    message = refusal(short_config(tmp_path / "run", other, JOINED), resume=True)
    assert message.endswith("was written with another resnet14 as teacher; give its folder as DISTILLER.TEACHER_CKPT")
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    assert short_run(tmp_path / "run", moved, JOINED, resume=True).result["steps"] == 16


@pytest.mark.parametrize(("name", "before"), [("processes", 2), ("training images", 129), ("classes", 11)])
def test_resuming_where_the_steps_would_be_others_is_refused(tmp_path, teacher, name, before):
    checkpoint = short_run(tmp_path, teacher).folder / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    now = state["circumstances"][name]
    state["circumstances"][name] = before
    torch.save(unsealed(state), checkpoint)
    message = refusal(short_config(tmp_path, teacher, "SOLVER.EPOCHS 2"), resume=True)
    assert message == f"--resume: {checkpoint} was written with {before} {name}, now there are {now}"


def test_a_run_from_before_a_setting_was_there_resumes_with_its_default(tmp_path, teacher):
    checkpoint = short_run(tmp_path, teacher).folder / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    del state["config"]["DATASET"]["HELD_OUT"], state["circumstances"], state["data_sha256"]
    torch.save(unsealed(state), checkpoint)
    assert short_run(tmp_path, teacher, "SOLVER.EPOCHS 2", resume=True).result["steps"] == 8


def test_a_run_that_is_resumed_has_no_result_until_it_ends(tmp_path, teacher):
    short_run(tmp_path, teacher)
    interrupted(tmp_path, teacher, "SOLVER.EPOCHS 3", resume=True, after_epoch=2)
    assert not (tmp_path / "result.json").exists()


def test_resuming_without_a_checkpoint_is_refused(tmp_path, teacher):
    assert refusal(short_config(tmp_path, teacher), resume=True).startswith("--resume: there is no checkpoint.pt in")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("junk"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: torch.save({"weights": {}}, path),
        lambda path: torch.save([1], path),
    ],
    ids=["text", "empty", "cut off", "other keys", "no keys"],
)
def test_resuming_from_a_broken_checkpoint_is_refused(tmp_path, teacher, ended, write):
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / "checkpoint.pt"
    write(checkpoint)
    message = refusal(short_config(tmp_path, teacher), resume=True)
    assert message == f"--resume: {checkpoint} is not the checkpoint of a run; start again with --overwrite"
    assert (tmp_path / "result.json").exists()


# Schedule, evaluation, record


def test_the_rate_falls_after_the_epochs_that_are_named():
    solver = load_config("configs/cifar100/vanilla/resnet20.yaml").SOLVER
    rates = {epoch: learning_rate(solver, epoch) for epoch in (1, 150, 151, 180, 181, 210, 211, 240)}
    expected = {1: 0.05, 150: 0.05, 151: 5e-3, 180: 5e-3, 181: 5e-4, 210: 5e-4, 211: 5e-5, 240: 5e-5}
    assert rates == pytest.approx(expected)


def test_the_optimizer_follows_the_schedule(tmp_path, teacher):
    one = short_run(tmp_path / "one", teacher)
    stages = "SOLVER.EPOCHS 3 SOLVER.LR_DECAY_STAGES [1] SOLVER.LR_DECAY_RATE 1e-30"
    three = short_run(tmp_path / "three", teacher, stages)
    assert column(three, "learning_rate") == pytest.approx([0.05] * 4 + [0.05e-30] * 8)
    learned = [name for name, _ in load_model(one.folder / "student")[0].named_parameters()]
    assert all(torch.equal(one.weights[name], three.weights[name]) for name in learned)


def test_a_step_is_that_of_sgd_with_momentum_and_weight_decay(tmp_path, teacher, monkeypatch):
    states = []
    step = cv.trainer._Run._step

    def look(self, *batch):
        weight = self.distiller.student.conv1.weight
        before = weight.detach().double()
        result = step(self, *batch)
        states.append((before, weight.grad.double(), weight.detach().double()))
        return result

    monkeypatch.setattr(cv.trainer._Run, "_step", look)
    short_run(tmp_path, teacher, "SOLVER.LR 0.02 SOLVER.MOMENTUM 0.5 SOLVER.WEIGHT_DECAY 0.1")
    velocity = torch.zeros_like(states[0][0])
    for before, gradient, after in states:
        velocity = 0.5 * velocity + gradient + 0.1 * before
        torch.testing.assert_close(after, before - 0.02 * velocity, rtol=1e-5, atol=1e-7)


def test_a_late_stage_is_noted(tmp_path, teacher, capsys):
    short_run(tmp_path, teacher, "SOLVER.LR_DECAY_STAGES '[1, 5]'")
    assert "warning: LR_DECAY_STAGES [1, 5] lie behind the last epoch, 1" in capsys.readouterr().out


class Table(nn.Module):
    """Answers image i, a single grey level i, with row i of a table of logits."""

    def __init__(self, rows: list[list[float]]):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, images):
        assert not self.training
        return self.rows[(images[:, 0, 0, 0] * 255).round().long()]


def score(rows: list[list[float]], labels: list[int]) -> dict[str, float]:
    pixels = torch.arange(len(rows), dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 2, 2)
    images = ImageSet(pixels, torch.tensor(labels), len(rows[0]))
    loader = EpochLoader(images, 2, augment=None, mean=(0.0,), std=(1.0,), device="cpu", seed=0, shuffle=False)
    return evaluate(Table(rows), loader)[0]


def test_evaluation_counts_hits_among_the_first_and_the_first_five():
    falling = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]  # ranks: class 0 first, class 6 last
    # labels at rank 1, 5, 6, 1 and 7: two top-1 hits and three top-5 hits of five; the last batch is not full
    assert score([falling] * 5, [0, 4, 5, 0, 6]) == {"top1": 40.0, "top5": 60.0}


def test_the_record_has_the_confusion_matrix_of_the_last_evaluation(shell_run):
    result, found = shell_run[1].result, read_confusion(shell_run[1].folder)
    assert (found.classes, found.step, found.evaluated_on) == (tuple("0123456789"), result["steps"], "test images")
    assert found.examples.sum() == 360
    assert 100 * found.hits.sum() / 360 == pytest.approx(result["last"])
    assert 100 * found.scores()["macro_f1"] == pytest.approx(result["last_macro_f1"])
    assert 100 * found.scores()["balanced_accuracy"] == pytest.approx(result["last_balanced_accuracy"])


def test_top_five_of_three_classes_counts_all():
    assert score([[3.0, 2.0, 1.0]] * 4, [0, 0, 0, 2]) == {"top1": 75.0, "top5": 100.0}


def test_the_best_student_is_the_first_of_equals(tmp_path, teacher, monkeypatch):
    scores = iter([10.0, 30.0, 20.0, 30.0])
    monkeypatch.setattr(
        cv.trainer, "evaluate", lambda *_: ({"top1": next(scores), "top5": 50.0}, np.array([[0, 0, 1]]))
    )
    run = short_run(tmp_path, teacher, "SOLVER.EPOCHS 4")
    _, info = load_model(tmp_path / "student_best")
    assert (run.result["best"], run.result["best_epoch"], run.result["last"]) == (30.0, 2, 30.0)
    assert (info["epoch"], info["accuracy"]) == (2, 30.0)
    assert load_model(tmp_path / "student")[1]["epoch"] == 4


def test_evaluations_come_every_few_epochs_and_after_the_last(tmp_path, teacher, monkeypatch):
    scores = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(
        cv.trainer, "evaluate", lambda *_: ({"top1": next(scores), "top5": 50.0}, np.array([[0, 0, 1]]))
    )
    run = short_run(tmp_path, teacher, "SOLVER.EPOCHS 5 SOLVER.EVAL_EPOCHS 2")
    assert [line["epoch"] for line in run.epochs] == [2, 4, 5]
    assert (run.result["best_epoch"], run.result["last"], run.result["steps"]) == (4, 20.0, 20)
    assert (load_model(tmp_path / "student_best")[1]["epoch"], load_model(tmp_path / "student")[1]["epoch"]) == (4, 5)


def test_the_subset_may_follow_the_seed_of_the_run(tmp_path, teacher, monkeypatch):
    seen = []
    monkeypatch.setattr(cv.trainer, "load_dataset", lambda *_, subset_seed, **__: seen.append(subset_seed) or 1 / 0)
    for overrides in ("", "DATASET.SUBSET_SEED 3", "DATASET.SUBSET_SEED -1"):
        with pytest.raises(ZeroDivisionError):
            short_run(tmp_path, teacher, f"SOLVER.SEED 7 {overrides}")
    assert seen == [0, 3, 7]


@pytest.mark.parametrize(
    ("overrides", "count", "what"), [("", 360, "test images"), ("DATASET.HELD_OUT 30", 30, "held-out training images")]
)
def test_a_run_says_what_it_was_tested_on(tmp_path, capsys, overrides, count, what):
    run = short_run(tmp_path, None, f"DISTILLER.TYPE vanilla {overrides}")
    assert run.result["tested_on"] == what
    correct = run.result["last"] * count / 100
    assert correct == pytest.approx(round(correct))
    assert f"digits: 128 training and {count} {what}, 10 classes" in capsys.readouterr().out


def test_a_teacher_that_has_seen_the_held_out_images_is_refused(tmp_path, teacher):
    message = refusal(short_config(tmp_path, teacher, "DATASET.HELD_OUT 30"))
    assert message.startswith(f"DATASET.HELD_OUT 30: {teacher} was trained with 0, so that it has seen images")
    assert message.endswith("train a resnet14 with DATASET.HELD_OUT 30, and give it as DISTILLER.TEACHER_CKPT")


def test_a_teacher_that_has_held_out_the_same_images_is_taken(tmp_path, capsys):
    held_out = "DATASET.HELD_OUT 30 DISTILLER.TEACHER resnet8"
    short_run(tmp_path / "teacher", None, f"DISTILLER.TYPE vanilla {held_out}")
    run = short_run(tmp_path / "student", tmp_path / "teacher" / "student", held_out)
    assert run.result["tested_on"] == "held-out training images"
    assert re.search(r"top-1 \d+\.\d\d on held-out images by kd", capsys.readouterr().out)


def test_throughput_counts_images_not_full_batches(tmp_path, teacher, monkeypatch):
    # one full batch of 100 images and one of 28
    run = short_run(tmp_path, teacher, "SOLVER.BATCH_SIZE 100 SOLVER.EPOCHS 2")
    assert run.result["throughput"] * run.checkpoint["progress"]["seconds"] == pytest.approx(256)
    assert run.result["train_images"] == 128


def test_lines_come_at_the_interval_and_at_the_end_of_an_epoch(tmp_path, teacher):
    run = short_run(tmp_path, teacher, "SOLVER.EPOCHS 2 LOG.INTERVAL 3")
    assert [line["step"] for line in run.steps] == [3, 4, 6, 8]


def test_onnx_is_written_of_the_saved_student_on_request(tmp_path, teacher, monkeypatch):
    calls = []
    monkeypatch.setattr(cv.trainer, "export_onnx", lambda *args: calls.append(args))
    run = short_run(tmp_path, teacher, "LOG.ONNX true")
    [(model, folder, shape)] = calls
    assert (folder, shape) == (tmp_path / "student", (3, 8, 8))
    assert same_tensors(model.state_dict(), run.weights)


def test_an_export_that_fails_leaves_the_result(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(cv.trainer, "export_onnx", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        short_run(tmp_path, teacher, "LOG.ONNX true")
    assert read_run(tmp_path).result["steps"] == 4


def test_packages_that_the_export_needs_are_looked_for_before_the_training(tmp_path, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert refusal(short_config(tmp_path, teacher, "LOG.ONNX true")).startswith("exporting to ONNX needs onnxscript")
    assert not (tmp_path / "config.json").exists()


# Where a run is written


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("", "kd_resnet14_resnet8/seed1"),
        ("DSKD.ENABLED true SOLVER.SEED 3", "kd_resnet14_resnet8_dskd/seed3"),
        ("DISTILLER.TYPE vanilla", "vanilla_resnet8/seed1"),
        ("DISTILLER.TYPE vanilla DSKD.ENABLED true", "vanilla_resnet14_resnet8_dskd/seed1"),
        ("DSKD.ENABLED true DISTILLER.START teacher", "kd_resnet14_resnet8_dskd_from_teacher/seed1"),
    ],
)
def test_the_default_folder_names_the_run(overrides, name):
    cfg = short_config(Path("unused"), None, overrides)
    cfg.OUTPUT_DIR = ""
    assert output_folder(cfg) == ROOT / "outputs" / "digits" / name


def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path, teacher):
    short_run(tmp_path, teacher)
    before = files_of(tmp_path)
    message = refusal(short_config(tmp_path, teacher, "SOLVER.SEED 2"))
    assert message == f"OUTPUT_DIR {tmp_path} holds a run; give --resume, --overwrite or another OUTPUT_DIR"
    assert files_of(tmp_path) == before


def test_overwriting_replaces_the_run_and_nothing_else(tmp_path, teacher):
    short_run(tmp_path, teacher, "SOLVER.EPOCHS 2 LOG.TRACKERS [tensorboard]")
    (tmp_path / "notes.txt").write_text("mine")
    run = short_run(tmp_path, teacher, "SOLVER.SEED 2", overwrite=True)
    assert (len(run.epochs), run.result["seed"]) == (1, 2)
    assert not (tmp_path / "tracking").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwriting_does_not_cost_the_teacher(tmp_path, teacher):
    short_run(tmp_path, None, "DISTILLER.TYPE vanilla DISTILLER.STUDENT resnet14")
    message = refusal(short_config(tmp_path, tmp_path / "student"), overwrite=True)
    assert message == f"--overwrite would remove the teacher, {tmp_path / 'student'}; give another OUTPUT_DIR"
    assert load_model(tmp_path / "student")[1]["architecture"] == "resnet14"


def test_a_mistake_found_before_training_does_not_cost_the_former_run(tmp_path, teacher):
    short_run(tmp_path, teacher)
    before = files_of(tmp_path)
    assert refusal(short_config(tmp_path, teacher, "DISTILLER.STUDENT resnet88"), overwrite=True)
    assert files_of(tmp_path) == before


def test_a_file_in_the_folders_place_is_refused(tmp_path, teacher):
    (tmp_path / "out").write_text("")
    assert refusal(short_config(tmp_path / "out", teacher)) == f"OUTPUT_DIR {tmp_path / 'out'} is a file"
    below = tmp_path / "out" / "run"
    assert refusal(short_config(below, teacher)) == f"OUTPUT_DIR {below}: {tmp_path / 'out'} is a file"


def test_a_checkpoint_that_cannot_be_read_is_not_called_broken(tmp_path, teacher):
    (tmp_path / "checkpoint.pt").mkdir()
    message = refusal(short_config(tmp_path, teacher), resume=True)
    assert message.startswith(f"--resume: {tmp_path / 'checkpoint.pt'} cannot be read: ")
    assert "--overwrite" not in message


def test_a_folder_that_cannot_be_made_is_refused(teacher):
    message = refusal(short_config(Path("/proc/no/such/run"), teacher))
    assert message.startswith("OUTPUT_DIR /proc/no/such/run cannot be written to: ")


# Teachers


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty repository root, as far as teachers are concerned."""
    monkeypatch.setattr(cv.teachers, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def distilling(overrides: str = ""):
    return short_config(Path("unused"), None, f"DISTILLER.TEACHER resnet8 {overrides}")


def test_a_teacher_is_looked_for_in_the_given_folder_then_among_the_trained_then_the_shipped(home):
    shipped = save_teacher(home / "resources/teachers/digits/resnet8", "resnet8")
    assert find_teacher(distilling()) == shipped
    trained = save_teacher(home / "outputs/digits/teacher_resnet8/seed1/student", "resnet8")
    assert find_teacher(distilling()) == trained
    given = save_teacher(home / "mine", "resnet8")
    assert find_teacher(distilling("DISTILLER.TEACHER_CKPT mine")).resolve() == given


def test_a_teacher_of_another_data_set_does_not_count(home):
    save_teacher(home / "resources/teachers/cifar10/resnet8", "resnet8")
    with pytest.raises(UserError, match="no trained resnet8 for digits"):
        find_teacher(distilling())


def test_a_given_folder_that_is_not_there_is_named_and_not_replaced(home):
    save_teacher(home / "resources/teachers/digits/resnet8", "resnet8")
    with pytest.raises(UserError, match="nowhere"):
        load_teacher(distilling("DISTILLER.TEACHER_CKPT nowhere"), 10, 3)


def test_a_missing_teacher_of_a_shipped_recipe_is_told_its_command(home):
    config = home / "configs/cifar100/teacher/resnet56.yaml"
    config.parent.mkdir(parents=True)
    config.touch()
    with pytest.raises(UserError) as caught:
        find_teacher(load_config("configs/cifar100/kd/res56_res20.yaml"))
    assert "`python cv/train_svd.py --cfg configs/cifar100/teacher/resnet56.yaml`" in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    ["DISTILLER.TEACHER wrn_16_2", "DISTILLER.TEACHER vgg8 DATASET.NAME folder DATASET.ROOT 'my data'"],
)
def test_the_command_for_any_other_teacher_trains_it_where_it_is_then_found(home, overrides):
    wanted = distilling(overrides)
    with pytest.raises(UserError) as caught:
        find_teacher(wanted)
    command = shlex.split(str(caught.value).split("`")[1])
    assert command[:3] == ["python", "cv/train_svd.py", "--cfg"]
    cfg = load_config(str(ROOT / command[3]), command[4:])
    assert cfg.DISTILLER.TYPE == "vanilla"
    assert (cfg.DATASET.NAME, cfg.DATASET.ROOT) == (wanted.DATASET.NAME, wanted.DATASET.ROOT)
    student = home / output_folder(cfg) / "student"
    save_teacher(student, cfg.DISTILLER.STUDENT)
    assert find_teacher(wanted) == student
    teacher = load_teacher(wanted, 10, 3)
    assert teacher.network.classifier.out_features == 10
    assert str(student) in teacher.line


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, teacher):
    message = refusal(short_config(tmp_path, teacher, "DISTILLER.TEACHER resnet20"))
    assert message == f"{teacher}: the checkpoint's architecture is 'resnet14', this run needs 'resnet20'"


def test_a_checkpoint_for_other_classes_is_refused(tmp_path):
    folder = save_teacher(tmp_path / "teacher", "resnet14", num_classes=7)
    message = refusal(short_config(tmp_path / "out", folder))
    assert message == f"{folder}: the checkpoint's num_classes is 7, this run needs 10"


def test_images_too_small_for_the_network_are_refused(tmp_path):
    overrides = "DISTILLER.TYPE vanilla DISTILLER.STUDENT vgg8 DATASET.IMAGE_SIZE 4"
    message = refusal(short_config(tmp_path, None, overrides))
    assert message == "vgg8 cannot take images of 4x4 pixels; set a larger DATASET.IMAGE_SIZE"


@pytest.mark.parametrize("overrides", ["", "DISTILLER.TYPE vanilla DSKD.ENABLED true"])
def test_a_run_that_needs_a_teacher_asks_for_its_name(tmp_path, overrides):
    assert "needs DISTILLER.TEACHER" in refusal(short_config(tmp_path, None, f"{overrides} DISTILLER.TEACHER ''"))


def test_plain_training_needs_no_teacher(tmp_path):
    run = short_run(tmp_path, None, "DISTILLER.TYPE vanilla DISTILLER.TEACHER ''")
    assert (run.result["teacher"], run.result["dskd"]) == (None, None)


# What cannot go well, and precision


@pytest.mark.filterwarnings("ignore:DSKD. a gradient or update is not finite")
@pytest.mark.parametrize(
    "overrides", ["DISTILLER.TYPE vanilla", "SOLVER.BATCH_SIZE 8 DSKD.ENABLED true DSKD.RANK 2 DSKD.GRAD_STEPS 1"]
)
def test_a_run_that_diverges_ends_with_one_line(tmp_path, teacher, overrides):
    message = refusal(short_config(tmp_path, teacher, f"SOLVER.LR 1e6 SOLVER.EPOCHS 20 LOG.INTERVAL 100 {overrides}"))
    assert message.startswith("the run diverged in step ")
    assert message.endswith("; lower SOLVER.LR")
    assert "\n" not in message


def test_a_student_that_breaks_in_the_last_update_is_not_kept(tmp_path):
    overrides = "DISTILLER.TYPE vanilla DATASET.SUBSET 20 SOLVER.LR 3e38 SOLVER.WEIGHT_DECAY 1000"  # one step
    message = refusal(short_config(tmp_path, None, overrides))
    assert message == "the run diverged in step 1: the student's weights are not finite; lower SOLVER.LR"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}
    assert "test_top1" not in (tmp_path / "metrics.jsonl").read_text()


def test_batch_statistics_that_break_are_not_kept(tmp_path, teacher, monkeypatch):
    step = cv.trainer._Run._step

    def spoil_last(self, *batch):
        result = step(self, *batch)
        if self.progress.step + 1 == 8:
            self.distiller.student.bn1.running_var[0] = float("inf")
        return result

    monkeypatch.setattr(cv.trainer._Run, "_step", spoil_last)
    assert refusal(short_config(tmp_path, teacher, "SOLVER.EPOCHS 3")).startswith("the run diverged in step 8: ")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["epoch"] == 1
    assert not (tmp_path / "student").exists()


def test_fp16_without_a_gpu_is_refused(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(short_config(tmp_path, teacher, "SOLVER.PRECISION fp16"))
    assert message == "SOLVER.PRECISION fp16 needs a GPU; use bf16 or fp32 here"
    assert not any(tmp_path.iterdir())


@pytest.mark.gpu
def test_bf16_computes_in_bf16_and_keeps_weights_in_float32(tmp_path, teacher, fresh_accelerator, monkeypatch):
    seen = []
    losses = KD.losses
    monkeypatch.setattr(
        KD,
        "losses",
        lambda self, student, teacher, *rest: (
            seen.append((student.logits.dtype, teacher.logits.dtype)) or losses(self, student, teacher, *rest)
        ),
    )
    run = short_run(tmp_path, teacher, "SOLVER.PRECISION bf16 DSKD.ENABLED true DSKD.SVD_STEPS 2")
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert run.weights["conv1.weight"].dtype == torch.float32
    assert all(map(torch.isfinite, torch.tensor(column(run, "loss"))))


def test_an_impossible_data_set_is_one_line(tmp_path, teacher):
    assert refusal(short_config(tmp_path, teacher, "DATASET.NAME mnist")).startswith("DATASET.NAME 'mnist': unknown")
    message = refusal(short_config(tmp_path, teacher, "DATASET.SUBSET 5000"))
    assert message == "DATASET.SUBSET 5000: expected 1 to 1437, the training images of this data set"


@pytest.mark.gpu
def test_compiling_takes_both_networks_and_trains_alike(tmp_path, teacher, monkeypatch):
    compiled, captures = [], torch.cuda.is_available()
    original = torch.compile

    def compile_eagerly(function, mode, dynamic):
        compiled.append(function.__self__)
        assert not dynamic
        assert mode == ("reduce-overhead" if captures else "default")
        how = {"mode": mode} if captures else {"backend": "eager"}  # traced for real; C++ would take too long
        return original(function, dynamic=dynamic, **how)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    dskd = "DSKD.ENABLED true DSKD.SVD_STEPS 2"
    ours = short_run(tmp_path / "compiled", teacher, f"SOLVER.COMPILE true {dskd}")
    theirs = short_run(tmp_path / "plain", teacher, dskd)
    assert [len(list(network.stages[0])) for network in compiled] == [1, 2]  # resnet8 and resnet14
    if captures:
        assert column(ours, "loss") == pytest.approx(column(theirs, "loss"), rel=1e-2)
    else:
        assert same_tensors(ours.weights, theirs.weights)


def test_settings_of_the_data_reach_the_batches(tmp_path, teacher):
    resized = short_run(tmp_path / "resized", teacher, "DATASET.IMAGE_SIZE 12")
    assert json.loads((resized.folder / "student" / "model.json").read_text())["image_size"] == 12
    plain, still = (
        short_run(tmp_path / name, teacher, more) for name, more in (("a", ""), ("b", "DATASET.AUGMENT false"))
    )
    assert column(plain, "loss")[0] != column(still, "loss")[0]
    assert plain.result["train_images"] == 128


@pytest.mark.gpu
def test_memory_layout_is_as_asked_for(tmp_path, teacher, monkeypatch):
    layouts = []
    step = cv.trainer._Run._step

    def look(self, images, *rest):
        weight = self.distiller.student.stages[1][0].conv1.weight
        layouts.append([t.is_contiguous(memory_format=torch.channels_last) for t in (images, weight)])
        return step(self, images, *rest)

    monkeypatch.setattr(cv.trainer._Run, "_step", look)
    for asked in ("true", "false"):
        layouts.clear()
        short_run(tmp_path / asked, teacher, f"SOLVER.CHANNELS_LAST {asked}")
        assert layouts == [[asked == "true"] * 2] * 4


def test_dkd_on_two_classes_says_once_that_a_part_is_zero(tmp_path, capsys):
    from cv.data.augment import Augment
    from cv.data.image_set import DataSets

    images = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    two = ImageSet(images, torch.arange(32) % 2, 2)
    data = DataSets(two, two, None, (0.5,) * 3, (0.25,) * 3, Augment(1, flip=False), ("2 files left out",))
    folder = save_teacher(tmp_path / "teacher", num_classes=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cv.trainer, "load_dataset", lambda *_, **__: data)
        run = short_run(tmp_path / "run", folder, "DISTILLER.TYPE dkd SOLVER.EPOCHS 2")
    assert set(column(run, "loss_nckd")) == {0.0}
    printed = capsys.readouterr().out
    assert printed.count("note: DKD on two classes: beside the target there is one class, so that") == 1
    assert "note: 2 files left out\n" in printed
