"""accelerate, DistributedDataParallel, gradient checkpointing, torch.compile and LoRA: `attach` sees the steps taken.

The former code brackets the loop's `optimizer.step()`, which accelerate calls once a micro-batch and mostly leaves out:
it counted micro-batches as steps (`test_steps_are_those_that_are_taken`).
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from dskd import DirectionSensitivityLoss, Own

STEPS, BATCH, WEIGHT = 12, 4, 0.1
NAMES = ("0", "2", "4")
WAYS = ("weight", "term")


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return nn.Sequential(*sizes).double()  # rounding hides nothing


def make_loss(student: nn.Module) -> DirectionSensitivityLoss:
    teacher = network(1)
    pairs = [(name, student.get_submodule(name).weight, teacher.get_submodule(name).weight) for name in NAMES]
    return DirectionSensitivityLoss(pairs, Own(rank=3), svd_steps=3)


def data(batches: int) -> list:
    return list(torch.randn(batches, BATCH, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64))


def task_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return mse_loss(model(batch[:, :6]), batch[:, 6:])


def plain_run(accumulation: int = 1, model_of=lambda student: student):
    """One process; in every step its batches are taken together."""
    student = network(0)
    model, dskd = model_of(student), make_loss(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    batches = data(STEPS * accumulation)
    for step in range(STEPS):
        micro = batches[step * accumulation : (step + 1) * accumulation]
        optimizer.zero_grad()
        (sum(task_loss(model, batch) for batch in micro) / accumulation + WEIGHT * dskd()).backward()
        with dskd.observe(step / STEPS):
            optimizer.step()
    return student, dskd


def accelerate_run(accumulation: int, way: str, total: int = STEPS, processes: int = 1):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    assert accelerator.num_processes == processes
    student = network(0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loader = DataLoader(data(total * accumulation * processes), batch_size=None)
    dskd = make_loss(student)
    model, optimizer = accelerator.prepare(student, optimizer)
    dskd.attach(optimizer, total, weight=WEIGHT if way == "weight" else None)
    for batch in list(loader)[accelerator.process_index :: processes]:
        with accelerator.accumulate(model):
            loss = task_loss(model, batch)
            accelerator.backward(loss if way == "weight" else loss + WEIGHT * dskd())
            optimizer.step()
            optimizer.zero_grad()
    return student, dskd


def assert_alike(first: nn.Module, second: nn.Module) -> None:
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accelerate_trains_as_a_plain_loop(accumulation, way):
    student, dskd = accelerate_run(accumulation, way)
    plain, expected = plain_run(accumulation)
    assert_alike(student, plain)
    assert dskd.choices == expected.choices


def test_steps_are_those_that_are_taken():
    _, dskd = accelerate_run(4, "weight")
    assert (dskd.steps, dskd.choices) == (STEPS, STEPS // 3)


def test_a_step_that_the_scaler_leaves_out_is_none():
    """accelerate's optimizer with a gradient scaler, and one overflow."""
    Accelerator(cpu=True)
    student = network(0).float()
    dskd = make_loss(student)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(student.parameters(), lr=0.1), False, scaler)
    dskd.attach(optimizer, STEPS, weight=WEIGHT)
    skipped = []
    for step, batch in enumerate(data(STEPS)):
        scaler.scale(task_loss(student, batch.float()) * (float("inf") if step == 2 else 1.0)).backward()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        optimizer.zero_grad()
    assert skipped == [step == 2 for step in range(STEPS)]
    assert (dskd.steps, dskd.choices) == (STEPS - 1, (STEPS - 1) // 3)


def test_gradients_are_unscaled_when_the_term_is_added():
    Accelerator(cpu=True)
    students = []
    for scale in (1.0, 1024.0):
        student = network(0)
        dskd, scaler = make_loss(student), torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = AcceleratedOptimizer(torch.optim.SGD(student.parameters(), lr=0.1), False, scaler)
        dskd.attach(optimizer, STEPS, weight=WEIGHT)
        for batch in data(STEPS):
            scaler.scale(task_loss(student, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        students.append(student)
    assert_alike(*students)
    assert_alike(students[0], plain_run()[0])


class Checkpointed(nn.Module):
    def __init__(self, student: nn.Module, reentrant: bool):
        super().__init__()
        self.student, self.reentrant = student, reentrant

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.requires_grad_() if self.reentrant else inputs
        return checkpoint(self.student, inputs, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    assert_alike(plain_run(2, lambda student: Checkpointed(student, reentrant))[0], plain_run(2)[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_the_student_changes_nothing(backend):
    torch._dynamo.reset()
    student, dskd = plain_run(1, lambda student: torch.compile(student, backend=backend))
    assert_alike(student, plain_run()[0])
    assert dskd.choices == STEPS // 3


def test_a_loss_of_a_compiled_module_has_the_same_weights():
    student = network(0)
    compiled = torch.compile(student, backend="eager")
    assert compiled.get_submodule("2").weight is student[2].weight


def ddp_run(accumulation: int, way: str):
    student = network(0)
    model, dskd = nn.parallel.DistributedDataParallel(student), make_loss(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    dskd.attach(optimizer, STEPS, weight=WEIGHT if way == "weight" else None)
    batches = data(2 * STEPS * accumulation)[dist.get_rank() :: 2]
    for step in range(STEPS):
        optimizer.zero_grad()
        for i, batch in enumerate(batches[step * accumulation : (step + 1) * accumulation]):
            model.require_backward_grad_sync = i == accumulation - 1
            loss = task_loss(model, batch)
            ((loss if way == "weight" else loss + WEIGHT * dskd()) / accumulation).backward()
        optimizer.step()
    return student, dskd


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}  # as a launcher does
    found = {}
    for way in WAYS:
        for accumulation in (1, 2):
            found[f"ddp {way} {accumulation}"] = ddp_run(accumulation, way)
            found[f"accelerate {way} {accumulation}"] = accelerate_run(accumulation, way, processes=2)
    saved = {key: (list(student.state_dict().values()), dskd.choices) for key, (student, dskd) in found.items()}
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", ["ddp", "accelerate"])
def test_two_processes_train_as_one(two_processes, program, way, accumulation):
    plain, dskd = plain_run(2 * accumulation)
    for result in two_processes:
        weights, choices = result[f"{program} {way} {accumulation}"]
        torch.testing.assert_close(weights, list(plain.state_dict().values()), rtol=1e-9, atol=1e-9)
        assert choices == dskd.choices
