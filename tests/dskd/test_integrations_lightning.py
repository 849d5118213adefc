"""`DskdCallback` trains as a plain loop, with automatic optimization (a closure inside the step) and manual.

The plain loop brackets its steps with `observe` and adds the gradient by hand. Bracketing Lightning's `optimizer.step`
so, as the former code had to, chooses directions with the gradients of the step before; `observe` refuses it now.
"""

from contextlib import nullcontext

import lightning
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from dskd import DirectionSensitivityLoss, Own
from dskd.integrations.lightning import DskdCallback

# rounding grows in 20 steps with a learning rate of 0.5, to 2e-5 in fp32; in fp64 nothing hides behind it
TOLERANCES = {"64-true": 1e-10, "32-true": 2e-4, "bf16-mixed": 1e-3, "bf16-true": 2e-2}
STEPS, BATCH, WEIGHT, CLIP = 20, 4, 0.1, 0.3
PACKAGES = {"lightning": lightning, "pytorch_lightning": pytorch_lightning}


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def make_loss(student: nn.Module, seed: int = 1, **settings) -> DirectionSensitivityLoss:
    teacher = network(seed)
    pairs = [(name, student.get_submodule(name).weight, teacher.get_submodule(name).weight) for name in ("0", "2", "4")]
    return DirectionSensitivityLoss(pairs, Own(rank=3), svd_steps=3, **settings)


def batches(accumulation: int) -> list:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randn(STEPS * accumulation, BATCH, 9, generator=generator))


def module_of(package, manual: int = 0) -> nn.Module:
    """A LightningModule around the student; `manual`: micro-batches per step of a loop of its own."""

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.student = network(0)
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            loss = mse_loss(self.student(batch[:, :6]), batch[:, 6:])
            if manual:
                self.manual_backward(loss / manual)
                if (batch_idx + 1) % manual == 0:
                    optimizer = self.optimizers()
                    self.clip_gradients(optimizer, CLIP, "norm")
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.student.parameters(), lr=0.5)

    return Module()


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
}


def fit(module, callback, accumulation: int = 1, package=lightning, ckpt_path=None, **settings):
    trainer_class = getattr(package, "Trainer", None) or package.pytorch.Trainer
    callbacks = callback if isinstance(callback, list) else [callback]
    trainer = trainer_class(callbacks=callbacks, **{**QUIET, **settings})
    trainer.fit(module, DataLoader(batches(accumulation), batch_size=None, shuffle=False), ckpt_path=ckpt_path)
    return trainer


def lightning_run(accumulation: int, package=lightning, precision: str = "32-true", **settings):
    module = module_of(package)
    callback = DskdCallback(lambda given: make_loss(given.student), weight=WEIGHT)
    clipping = {"gradient_clip_val": CLIP, "accumulate_grad_batches": accumulation}
    trainer = fit(module, callback, accumulation, package, **{**clipping, "precision": precision, **settings})
    return module.student, callback.dskd, trainer


def plain_run(accumulation: int, precision: str = "32-true", clip: float = CLIP):
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    student = network(0).to(dtype)
    dskd = make_loss(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    data, values = batches(accumulation), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in data[step * accumulation : (step + 1) * accumulation]:
            batch = batch.to(dtype)
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
                loss = mse_loss(student(batch[:, :6]), batch[:, 6:]) / accumulation
            loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(student.parameters(), clip)
        term = dskd()
        (WEIGHT * term).backward()
        values.append(term.item())
        with dskd.observe(step / STEPS):
            optimizer.step()
    return student, dskd, values


def assert_alike(first: nn.Module, second: nn.Module, tolerance: float) -> None:
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_it_trains_as_a_plain_loop(accumulation, precision):
    student, dskd, _ = lightning_run(accumulation, precision=precision)
    plain, expected, _ = plain_run(accumulation, precision)
    assert_alike(student, plain, TOLERANCES[precision])
    assert (dskd.steps, dskd.choices, dskd.attachment) == (STEPS, expected.choices, None)
    assert expected.choices == STEPS // 3


def test_the_directions_are_those_of_the_step_itself():
    """Of every choice: with the gradients of the step before others come out."""
    _, dskd, _ = lightning_run(2)
    _, expected, _ = plain_run(2)
    for name, weights in expected.direction_weights().items():
        torch.testing.assert_close(dskd.direction_weights()[name], weights, rtol=1e-3, atol=1e-4)


def test_clipping_bites():
    student, _, _ = lightning_run(1)
    plain, _, _ = plain_run(1, clip=0)
    assert (student[0].weight - plain[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("name", PACKAGES)
def test_both_packages_take_it(name):
    student, _, _ = lightning_run(2, PACKAGES[name])
    assert_alike(student, plain_run(2)[0], 2e-4)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_manual_optimization_trains_as_a_plain_loop(accumulation):
    module = module_of(lightning, manual=accumulation)
    callback = DskdCallback(make_loss(module.student), WEIGHT, total_steps=STEPS)
    fit(module, callback, accumulation)
    assert_alike(module.student, plain_run(accumulation)[0], 2e-4)
    assert callback.dskd.steps == STEPS


def test_attach_takes_lightnings_wrapper_of_an_optimizer():
    student = network(0)
    wrapper = LightningOptimizer(torch.optim.SGD(student.parameters(), lr=0.5))
    attachment = make_loss(student).attach(wrapper, STEPS)
    assert attachment.follows(wrapper)
    assert not attachment.follows(torch.optim.SGD(student.parameters(), lr=0.5))


def test_the_loss_is_logged():
    _, _, trainer = lightning_run(2)
    _, _, values = plain_run(2)
    assert trainer.callback_metrics["dskd_loss"].item() == pytest.approx(values[-1], rel=1e-4)


def test_a_checkpoint_that_was_validated_is_not_resumed(tmp_path):
    module = module_of(lightning)
    module.validation_step = lambda batch, batch_idx: None
    fit(module, [DskdCallback(make_loss(module.student), WEIGHT), ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    loss = make_loss(module.student)
    trainer = lightning.Trainer(callbacks=[DskdCallback(loss, WEIGHT)], **QUIET)
    data = DataLoader(batches(1), batch_size=None, shuffle=False)
    trainer.validate(module, data, ckpt_path=tmp_path / f"epoch=0-step={STEPS}.ckpt", verbose=False)
    trainer.fit(module, data)
    assert loss.steps == STEPS


def test_a_resumed_training_continues_bit_for_bit(tmp_path):
    """From Lightning's own checkpoint after the first of two epochs, with a gradient that is held over it."""
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)
    modules = [module_of(lightning) for _ in range(2)]
    losses = [make_loss(module.student, grad_steps=6) for module in modules]
    callbacks = [DskdCallback(loss, WEIGHT) for loss in losses]
    fit(modules[0], [callbacks[0], keeper], max_epochs=2, enable_checkpointing=True)
    path = tmp_path / f"epoch=0-step={STEPS}.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["DskdCallback"]
    assert saved["counters"]["steps"] == STEPS
    assert saved["held"] is not None
    fit(modules[1], [callbacks[1]], max_epochs=2, ckpt_path=path)
    assert losses[0].steps == losses[1].steps == 2 * STEPS
    assert all(map(torch.equal, modules[0].parameters(), modules[1].parameters()))


def test_a_function_makes_the_loss_when_the_training_begins():
    module = module_of(lightning)
    callback = DskdCallback(lambda given: make_loss(given.student), WEIGHT)
    assert callback.state_dict() == {}
    fit(module, callback, gradient_clip_val=CLIP)
    assert_alike(module.student, plain_run(1)[0], 2e-4)


def test_a_loss_serves_one_training():
    module = module_of(lightning)
    callback = DskdCallback(make_loss(module.student))
    fit(module, callback)
    with pytest.raises(ValueError, match="the DSKD loss has seen 20 steps of another training; make a new one"):
        fit(module, callback)


def test_steps_that_are_not_planned_are_refused():
    module = module_of(lightning)
    callback = DskdCallback(make_loss(module.student))
    with pytest.raises(ValueError, match="needs to know how many steps are planned"):
        fit(module, callback, max_epochs=-1)


def test_an_exception_leaves_the_optimizer():
    module = module_of(lightning)
    callback = DskdCallback(make_loss(module.student))
    module.on_train_batch_end = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(module, callback)
    assert callback.dskd.attachment is None


def test_a_bracket_around_a_step_with_a_closure_is_refused():
    """The fault of the former code: the gradients that the bracket sees are those of the step before."""
    student = network(0)
    dskd, optimizer = make_loss(student), torch.optim.SGD(student.parameters(), lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = student(torch.randn(4, 6)).square().mean()
        loss.backward()
        return loss

    def train():
        for step in range(3):
            with dskd.observe(step / 3):
                optimizer.step(closure)

    with pytest.raises(RuntimeError, match="a backward pass ran inside"):
        train()
