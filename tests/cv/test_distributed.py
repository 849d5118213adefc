"""Two processes on the CPU, as of two machines: equal students and directions, exact resuming, refused batch sizes."""

import os
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import launched
import pytest
import torch
from cv_fixtures import SHORT_RUN, read_run, same_tensors, save_teacher, short_run

from common import ROOT

# The command line in every process: refused, a whole run, then one that stops behind its first epoch and is resumed.
PROCESS = """
import sys
import time
from contextlib import suppress
sys.path.insert(0, {root!r})
from common.torchvision_repair import repair_torchvision
repair_torchvision()
import torch
from accelerate import Accelerator, PartialState
import cv.trainer
from common.run.errors import UserError
from cv.train_svd import main

class Stop(Exception):
    pass

class Spy(cv.trainer._Run):
    stop_in = None

    def __init__(self, *args):
        super().__init__(*args)
        runs.append(self)
        self.seen = []

    def _train_epoch(self, epoch, *more):
        if epoch == self.stop_in:
            raise Stop
        super()._train_epoch(epoch, *more)

    def _step(self, images, labels, indices):
        self.seen.append(indices.tolist())
        return super()._step(images, labels, indices)

cv.trainer._Run, runs = Spy, []
words = sys.argv[1:]
end_training, Accelerator.end_training = Accelerator.end_training, lambda self: None  # it would part the processes

def run(*more):
    sys.argv = ["train_svd.py", *words, *more]
    main()

refusal = ""
try:
    run("SOLVER.BATCH_SIZE", "33", "OUTPUT_DIR", {folder!r} + "/refused")
except UserError as error:
    refusal = str(error)
run("OUTPUT_DIR", {folder!r} + "/whole")
Spy.stop_in = 2
with suppress(Stop):
    run("OUTPUT_DIR", {folder!r} + "/resumed")
PartialState().wait_for_everyone()
Spy.stop_in, Accelerator.end_training = None, end_training
process = PartialState().process_index
run("OUTPUT_DIR", {folder!r} + "/resumed", "--resume")
whole, _, resumed = runs

def kept(run):
    return {{
        "student": {{name: value.detach() for name, value in run.distiller.student.named_parameters()}},
        "statistics": dict(run.distiller.student.named_buffers()),
        "directions": run.dskd.direction_weights(),
        "held": dict(enumerate(run.dskd.state_dict()["held"]["gradients"])),
        "steps": run.progress.step,
        "seen": run.seen,
    }}

torch.save({{"refusal": refusal, "whole": kept(whole), "resumed": kept(resumed)}}, f"{folder}/process{{process}}.pt")
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes ended with, and the folders of the whole and the resumed run."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "process.py"
    script.write_text(PROCESS.format(root=str(ROOT), folder=str(folder)))
    words = ["--cfg", "configs/demo/base.yaml", *SHORT_RUN.split(), "SOLVER.EPOCHS", "2", "DSKD.ENABLED", "true"]
    words += ["DSKD.SVD_STEPS", "3", "DSKD.GRAD_STEPS", "5"]
    words += ["DISTILLER.TEACHER_CKPT", str(save_teacher(folder / "teacher"))]
    printed = "".join(launched.launch_two_agents(script, words))
    first, second = (torch.load(folder / f"process{number}.pt", weights_only=True) for number in (0, 1))
    return SimpleNamespace(first=first, second=second, folder=folder, words=words, printed=printed)


def test_both_processes_end_with_the_same_student(processes):
    assert processes.first["whole"]["steps"] == processes.second["whole"]["steps"] == 8
    assert same_tensors(processes.first["whole"]["student"], processes.second["whole"]["student"])


def test_both_processes_choose_the_same_directions_and_hold_the_same_gradient(processes):
    first, second = processes.first["whole"], processes.second["whole"]
    assert same_tensors(first["directions"], second["directions"])
    assert same_tensors(first["held"], second["held"])
    weights = first["directions"]["stages.1.0.conv1"]
    assert weights.max() > 2 * weights.mean()  # chosen, no longer uniform


def test_the_processes_share_every_batch_and_no_image_comes_twice(processes):
    first, second = processes.first["whole"]["seen"], processes.second["whole"]["seen"]
    assert {len(batch) for batch in first + second} == {16}
    for epoch in (slice(0, 4), slice(4, 8)):
        assert sorted(i for batch in first[epoch] + second[epoch] for i in batch) == list(range(128))


def test_batch_statistics_are_each_processs_own(processes):
    first, second = processes.first["whole"]["statistics"], processes.second["whole"]["statistics"]
    assert not torch.equal(first["bn1.running_mean"], second["bn1.running_mean"])


def test_only_the_first_process_prints_and_writes(processes):
    assert processes.printed.count("top-1 last") == 2  # the whole run, and the resumed one
    run = read_run(processes.folder / "whole")
    assert [line["step"] for line in run.steps] == list(range(1, 9))
    assert same_tensors(
        {name: run.weights[name] for name in processes.first["whole"]["student"]}, processes.first["whole"]["student"]
    )
    assert torch.equal(run.weights["bn1.running_mean"], processes.first["whole"]["statistics"]["bn1.running_mean"])


def test_the_loss_falls(processes):
    losses = [line["loss_ce"] + line["loss_kd"] for line in read_run(processes.folder / "whole").steps]
    assert sum(losses[4:]) < sum(losses[:4])


def test_a_resumed_run_ends_with_the_bits_of_the_whole_one(processes):
    for process in (processes.first, processes.second):
        assert same_tensors(process["resumed"]["student"], process["whole"]["student"])
        assert same_tensors(process["resumed"]["directions"], process["whole"]["directions"])
    whole, resumed = (read_run(processes.folder / name) for name in ("whole", "resumed"))
    assert same_tensors(resumed.weights, whole.weights)  # batch statistics, too


def test_a_batch_size_that_the_processes_cannot_share_is_refused(processes):
    assert (
        processes.first["refusal"]
        == processes.second["refusal"]
        == "SOLVER.BATCH_SIZE 33 does not divide into 2 processes"
    )
    assert not (processes.folder / "refused").exists()


# The statistics of all processes together


def words_of(settings: str | list[str]) -> list[str]:
    more = settings.split() if isinstance(settings, str) else settings
    return ["--cfg", "configs/demo/base.yaml", *SHORT_RUN.split(), *more]


def launch(settings: list[str]) -> subprocess.CompletedProcess:
    """The command line in two processes."""
    return launched.launch(launched.VISION, words_of(settings))


def test_two_processes_with_common_statistics_train_as_one(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    settings = f"DISTILLER.TYPE fitnet SOLVER.EPOCHS 2 SOLVER.LR 0.005 DISTILLER.TEACHER_CKPT {teacher}".split()
    settings += ["DSKD.ENABLED", "true", "DSKD.SVD_STEPS", "4", "DSKD.GRAD_STEPS", "2"]
    runs = {"one": short_run(tmp_path / "one", None, shlex.join([*settings, "SOLVER.SYNC_BN", "true"])).weights}
    for name, sync in (("synced", "true"), ("apart", "false")):
        done = launch([*settings, "OUTPUT_DIR", str(tmp_path / name), "SOLVER.SYNC_BN", sync])
        assert done.returncode == 0, done.stderr[-2000:]
        runs[name] = read_run(tmp_path / name).weights

    def distance(name: str) -> float:
        """The largest of all tensors', in units of how far training has moved it or of its size."""
        pairs = [(runs[name][key].double(), value.double()) for key, value in runs["one"].items()]
        return max(float((ours - theirs).norm() / theirs.norm().clamp(min=1e-3)) for ours, theirs in pairs)

    assert distance("synced") < 1e-4
    assert distance("apart") > 0.05


def test_a_users_error_is_said_once(tmp_path):
    done = launch(["OUTPUT_DIR", str(tmp_path), "DATASET.NAME", "mnist"])
    assert done.returncode != 0
    assert done.stderr.count("error: DATASET.NAME 'mnist': unknown") == 1
    assert "stopped by" not in done.stderr


def test_an_error_that_one_process_has_is_said(monkeypatch):
    from common.run.processes import _first_to_say

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert [_first_to_say(message) for message in ("a", "a", "b")] == [True, False, True]
    monkeypatch.setenv("MASTER_PORT", "1")
    assert _first_to_say("a")


def test_a_signal_stops_both_processes_at_one_step_and_is_said_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "cv" / "train_svd.py"), "--cfg", "configs/demo/base.yaml", *SHORT_RUN.split()]
    command += f"DISTILLER.TYPE vanilla SOLVER.EPOCHS 9999 SOLVER.EVAL_EPOCHS 9999 OUTPUT_DIR {tmp_path}".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "metrics.jsonl"
    while run.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    run.terminate()
    _, errors = run.communicate(timeout=120)
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"]
    told = f"stopped by SIGTERM, {tmp_path / 'checkpoint.pt'} is of step {step} (2 processes: by torchrun again); to go"
    assert errors.count(told) == errors.count("stopped by") == 1
    more = (
        f"DISTILLER.TYPE vanilla SOLVER.EPOCHS {step // 4 + 1} SOLVER.EVAL_EPOCHS 9999 OUTPUT_DIR {tmp_path} --resume"
    )
    done = launch(more.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["step"] for line in read_run(tmp_path).steps] == list(range(1, 4 * (step // 4 + 1) + 1))


def test_a_process_that_is_killed_is_started_again_and_resumed_to_the_same_bits(tmp_path, processes):
    words = [*processes.words, "OUTPUT_DIR", str(tmp_path / "run")]
    done = launched.launch_killed(launched.VISION, words, 7, tmp_path / "process.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"started again by torchrun, the run in {tmp_path / 'run'} is resumed") == 1
    ours, theirs = read_run(tmp_path / "run"), read_run(processes.folder / "whole")
    assert same_tensors(ours.weights, theirs.weights)
    assert [line["step"] for line in ours.steps] == list(range(1, 9))
