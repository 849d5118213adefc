"""`DskdTrainer` trains as a plain loop with the term in its loss, whatever the accumulation; its logs, its checkpoints.

The strength of the term is checked on a model that divides by `num_items_in_batch` itself: added in `compute_loss`, it
is 4 times too strong there with an accumulation of 4 (`test_the_fault_that_this_replaces`).
"""

import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from common import ROOT
from dskd import DirectionSensitivityLoss, Own
from dskd.integrations.transformers import STATE, DskdTrainer, DskdTrainerMixin

IN_ORDER = "train_sampling_strategy"
if IN_ORDER not in vars(TrainingArguments):  # before transformers 5
    Trainer._get_train_sampler = lambda self, *_: SequentialSampler(self.train_dataset)

STEPS, BATCH, LENGTH, VOCABULARY, WEIGHT, CLIP = 20, 2, 6, 20, 0.1, 0.5
LAYERS = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture(autouse=True)
def _precision_of_ones_own(monkeypatch):
    """Before transformers 5 the arguments of a training in bf16 put later ones into bf16, too, by the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


class Plain(nn.Module):
    """A model that knows nothing of `num_items_in_batch`: the Trainer divides its loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)
        self.second, self.head = nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids, labels):
        logits = self.head(torch.tanh(self.second(torch.tanh(self.first(self.embedding(input_ids))))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


class Tokens(Dataset):
    """Sequences of which a part of the labels is left out, so that batches differ in their number of labels."""

    def __init__(self, batches: int):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(VOCABULARY, (batches * BATCH, LENGTH), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: 1 + i % 4] = -100  # no prediction of the first, which old Trainers count as one
        return {"input_ids": self.ids[i], "labels": labels}


def llama(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes))


def networks(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    if kind == "llama":
        return llama(1, 0).to(dtype), llama(2, 1)
    torch.manual_seed(0)
    return Plain().to(dtype), Plain()


def make_loss(student: nn.Module, teacher: nn.Module, **settings) -> DirectionSensitivityLoss:
    names = [("first", "first"), ("second", "second")]
    if isinstance(student, LlamaForCausalLM):
        names = [(f"model.layers.0.{name}", f"model.layers.1.{name}") for name in LAYERS]
    pairs = [(a, student.get_submodule(a).weight, teacher.get_submodule(b).weight) for a, b in names]
    return DirectionSensitivityLoss(pairs, Own(rank=4), svd_steps=3, **settings)


def arguments(folder, accumulation: int = 1, **settings) -> TrainingArguments:
    standard = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": CLIP,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "average_tokens_across_devices": True,  # the default is another before transformers 5
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if IN_ORDER in vars(TrainingArguments):
        standard[IN_ORDER] = "sequential"
    return TrainingArguments(**{**standard, **settings})


def trainer_run(folder, kind: str, accumulation: int, dtype=torch.float32, make=None, batches=0, **settings):
    student, teacher = networks(kind, dtype)
    trainer = (make or DskdTrainer)(
        model=student,
        args=arguments(folder, accumulation, **settings),
        train_dataset=Tokens(STEPS * (batches or accumulation)),
        dskd=make_loss(student, teacher),
        dskd_weight=WEIGHT,
    )
    trainer.train()
    return student, trainer


def plain_run(kind: str, accumulation: int, dtype=torch.float32, autocast: bool = False, clip: float = CLIP):
    """The same batches in a loop of one's own, with the term in the loss; the weights, and the parts of the loss."""
    student, teacher = networks(kind, dtype)
    dskd = make_loss(student, teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    dskd.attach(optimizer, STEPS)
    data, parts = Tokens(STEPS * accumulation), []
    for step in range(STEPS):
        optimizer.zero_grad()
        micro = [
            {key: torch.stack([data[i * BATCH + j][key] for j in range(BATCH)]) for key in ("input_ids", "labels")}
            for i in range(step * accumulation, (step + 1) * accumulation)
        ]
        shifted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro)
        task = 0.0
        for batch in micro:
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                if kind == "llama":
                    loss = student(**batch, num_items_in_batch=shifted).loss
                else:
                    loss = student(**batch)["loss"] / accumulation
            (loss + WEIGHT * dskd() / accumulation).backward()
            task += loss.item()
        parts.append((task, dskd().item()))
        if clip:
            nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
    return student, parts


def assert_alike(first: nn.Module, second: nn.Module, tolerance: float) -> None:
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def far_apart(first: nn.Module, second: nn.Module) -> bool:
    return any((a - b).abs().max() > 1e-3 for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", ["llama", "plain"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_it_trains_as_a_plain_loop(tmp_path, kind, accumulation, autocast):
    student, trainer = trainer_run(tmp_path, kind, accumulation, bf16=autocast)
    assert trainer.model_accepts_loss_kwargs == (kind == "llama")
    assert (trainer.dskd.steps, trainer.dskd.choices, trainer.dskd.attachment) == (STEPS, STEPS // 3, None)
    plain, _ = plain_run(kind, accumulation, autocast=autocast)
    assert_alike(student, plain, 1e-5)


def test_it_trains_as_a_plain_loop_in_weights_of_bfloat16(tmp_path):
    student, _ = trainer_run(tmp_path, "plain", 2, torch.bfloat16)
    plain, _ = plain_run("plain", 2, torch.bfloat16)
    assert_alike(student, plain, 2e-2)


def test_it_trains_as_a_plain_loop_under_a_gradient_scaler(tmp_path):
    """The scaler of fp16, which accelerate makes on a GPU alone, put in by hand."""

    class Scaled(DskdTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    student, trainer = trainer_run(tmp_path, "llama", 2, make=Scaled, max_grad_norm=0.0)
    assert trainer.accelerator.scaler.get_scale() == 1024.0
    assert_alike(student, plain_run("llama", 2, clip=0)[0], 1e-5)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for kind in ("llama", "plain"):
        student, trainer = trainer_run(f"{folder}/{kind}", kind, 2, batches=4, save_strategy="steps", save_steps=20)
        assert trainer.args.world_size == 2
        torch.save(student.state_dict(), f"{folder}/{kind}{rank}.pt")
    dist.barrier()
    os._exit(0)  # what the Trainer still holds of gloo can abort an orderly exit ("terminate called", seen once)


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Two batches each in every step; the first process saves the state."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT / "tests/environment"), str(ROOT))))
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for kind in ("llama", "plain"):
        expected = dict(plain_run(kind, 4)[0].named_parameters())
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True)
            for name, W in expected.items():
                torch.testing.assert_close(found[name], W.detach(), rtol=1e-4, atol=1e-5)
        assert torch.load(tmp_path / kind / "checkpoint-20" / STATE, weights_only=True)["counters"]["steps"] == 20


def test_clipping_covers_the_term(tmp_path):
    """It bites here: without it the weights differ."""
    student, _ = trainer_run(tmp_path, "llama", 2)
    assert far_apart(student, plain_run("llama", 2, clip=0)[0])


def test_without_clipping_it_trains_as_a_plain_loop(tmp_path):
    student, _ = trainer_run(tmp_path, "llama", 2, max_grad_norm=0.0)
    assert_alike(student, plain_run("llama", 2, clip=0)[0], 1e-5)


def test_the_fault_that_this_replaces(tmp_path):
    """The term in `compute_loss`, as trainers of distillation add it: too strong by the number of batches."""

    class Naive(Trainer):
        def __init__(self, *args, dskd, dskd_weight, **kwargs):
            super().__init__(*args, **kwargs)
            self.dskd = dskd

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss + WEIGHT * self.dskd()

        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer()
            self.dskd.attach(optimizer, STEPS)
            return optimizer

    student, _ = trainer_run(tmp_path, "llama", 4, make=Naive, max_grad_norm=0.0)
    assert far_apart(student, plain_run("llama", 4, clip=0)[0])
    student, _ = trainer_run(tmp_path, "llama", 1, make=Naive, max_grad_norm=0.0)
    assert_alike(student, plain_run("llama", 1, clip=0)[0], 1e-5)


def test_both_parts_of_the_loss_are_logged(tmp_path):
    _, trainer = trainer_run(tmp_path, "llama", 2)
    _, parts = plain_run("llama", 2)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for i, line in enumerate(lines):
        task, value = (sum(column) / 5 for column in zip(*parts[5 * i : 5 * i + 5], strict=True))
        assert line["task_loss"] == pytest.approx(task, rel=1e-4)
        assert line["dskd_loss"] == pytest.approx(value, rel=1e-4)
        assert line["loss"] == pytest.approx(task + WEIGHT * value, rel=1e-4)


def test_evaluation_is_of_the_task(tmp_path):
    student, trainer = trainer_run(tmp_path, "plain", 1)
    data = Tokens(1)
    batch = {key: torch.stack([data[j][key] for j in range(BATCH)]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(student(**batch)["loss"].item(), rel=1e-5)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 10


def new_trainer(folder, make=None, **settings):
    student, teacher = networks("llama")
    dskd = make(student, teacher) if make else make_loss(student, teacher, grad_steps=4)
    saved = {"save_strategy": "steps", "save_steps": 10, **settings}
    data = Tokens(2 * STEPS)
    return DskdTrainer(student, arguments(folder, 2, **saved), train_dataset=data, dskd=dskd, dskd_weight=WEIGHT)


def test_a_resumed_training_continues_bit_for_bit(tmp_path):
    unbroken = new_trainer(tmp_path / "unbroken")
    unbroken.train()
    stopped = new_trainer(tmp_path / "stopped")
    stopped.add_callback(Stop())
    stopped.train()
    folder = tmp_path / "stopped" / "checkpoint-10"
    assert torch.load(folder / STATE, weights_only=True)["counters"]["steps"] == 10
    assert not list(folder.glob("*.part"))
    resumed = new_trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.dskd.steps == STEPS
    assert all(map(torch.equal, unbroken.model.parameters(), resumed.model.parameters()))


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    trainer = new_trainer(tmp_path, max_steps=10)
    trainer.train()
    (tmp_path / "checkpoint-10" / STATE).unlink()
    with pytest.raises(ValueError, match=r"dskd_state\.pt is not there: the checkpoint is of a training without DSKD"):
        new_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_loss_serves_one_training(tmp_path):
    trainer = new_trainer(tmp_path, max_steps=3, save_strategy="no")
    trainer.train()
    with pytest.raises(ValueError, match="the DSKD loss has seen 3 steps of another training; make a new one"):
        trainer.train()


def test_a_function_makes_the_loss_when_the_training_begins(tmp_path):
    seen = []

    def make(student: nn.Module) -> DirectionSensitivityLoss:
        seen.append(student)
        return make_loss(student, networks("llama")[1])

    trainer = new_trainer(tmp_path, lambda student, teacher: make, max_steps=3, save_strategy="no")
    assert trainer.dskd is None
    trainer.train()
    trainer.train()
    assert seen == [trainer.model] * 2
    assert trainer.dskd.steps == 3


def test_an_interrupted_training_leaves_the_optimizer(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = new_trainer(tmp_path)
    trainer.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.dskd.attachment is None


def test_it_mixes_into_a_trainer_of_ones_own(tmp_path):
    class Own(Trainer):
        pass

    class Both(DskdTrainerMixin, Own):
        pass

    student, _ = trainer_run(tmp_path, "llama", 2, make=Both)
    assert_alike(student, plain_run("llama", 2)[0], 1e-5)


def test_a_weight_out_of_range_is_refused():
    with pytest.raises(ValueError, match="dskd_weight must be 0 or a positive number, got -1"):
        DskdTrainer(dskd=None, dskd_weight=-1)


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match="dskd must be a DSKD loss or a function that makes it, got a list"):
        DskdTrainer(dskd=[])


def test_other_weights_than_those_of_the_optimizer_are_refused(tmp_path):
    trainer = new_trainer(tmp_path, lambda student, teacher: make_loss(llama(1, 0), teacher))
    with pytest.raises(ValueError, match=r"pair model\.layers\.0\.self_attn\.q_proj: .* no parameter group"):
        trainer.train()


def test_a_decoupled_loss_pulls_beside_the_step(tmp_path):
    trained, _ = trainer_run(tmp_path, "plain", 1, make=lambda **how: DskdTrainer(dskd_decoupled=True, **how))
    student, teacher = networks("plain")
    dskd, optimizer = make_loss(student, teacher), torch.optim.SGD(student.parameters(), lr=0.1)
    dskd.attach(optimizer, STEPS, WEIGHT, decoupled=True)
    data = Tokens(STEPS)
    for step in range(STEPS):
        rows = [data[step * BATCH + i] for i in range(BATCH)]
        optimizer.zero_grad()
        student(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]})["loss"].backward()
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
    for ours, theirs in zip(trained.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
