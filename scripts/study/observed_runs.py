"""Short runs of both recipes with DSKD, observed by `HeldGradient`."""

import tempfile
from pathlib import Path

from accelerate.utils import set_seed
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from bert_of_theseus.arguments import parse_arguments
from bert_of_theseus.data import tokenize
from bert_of_theseus.loading import load_data, load_model, max_length
from bert_of_theseus.modeling import TheseusModel, encoder_layers
from bert_of_theseus.schedules import replacing_schedule
from bert_of_theseus.training import (
    DistillationTrainer,
    FollowOptimizerCallback,
    ReplacingCallback,
    collator,
    training_arguments,
)
from cv.config import load_config
from cv.data import load_dataset
from cv.dskd import build_dskd, layer_pairs
from cv.models import build_model
from cv.teachers import load_teacher
from dskd import DirectionSensitivityLoss, Own
from scripts.lib.benchmark.loops import RECIPE, OurLoop
from scripts.study.held_gradient import HeldGradient, Plan

LENGTH = 128  # tokens of an example at most


def observe_cv(plan: Plan, cifar100: str, random_teacher: bool) -> tuple[HeldGradient, dict[str, str]]:
    """ResNet56 -> ResNet20 by KD with DSKD, the recipe of configs/cifar100 in fewer steps; (measurements, case)."""
    cfg = load_config(RECIPE, f"DSKD.ENABLED true DSKD.RANK 0 DSKD.SVD_STEPS {plan.svd_steps}".split())
    data, solver = load_dataset("cifar100", cifar100), cfg.SOLVER
    set_seed(solver.SEED)
    student = build_model(cfg.DISTILLER.STUDENT, 100)
    teacher = build_model(cfg.DISTILLER.TEACHER, 100) if random_teacher else load_teacher(cfg, 100, 3).network
    loop = OurLoop(student, teacher, data, plan.batch)
    pairs = layer_pairs(student, teacher, cfg.DSKD)
    dskd = build_dskd(pairs, cfg.DSKD, solver.SEED)
    dskd.attach(loop.optimizer, plan.steps)
    held = HeldGradient(pairs, dskd, plan.stages, plan.steps)
    for step in range(plan.steps):
        loop.optimizer.param_groups[0]["lr"] = solver.LR * solver.LR_DECAY_RATE ** sum(step >= at for at in plan.decays)
        loop.optimizer.zero_grad()
        (loop.loss() + cfg.DSKD.LAMBDA * dskd()).backward()
        held.before_step(step + 1)
        loop.optimizer.step()
        held.after_step(step + 1)
    case = {
        "case": f"CIFAR-100, KD, ResNet56 -> ResNet20, batch {plan.batch}, fp32, {plan.steps} steps",
        "dskd": f"lambda {cfg.DSKD.LAMBDA}, all directions, chosen every {plan.svd_steps} steps, gradient held for "
        f"{dskd.grad_steps}",
        "teacher": "random weights" if random_teacher else "trained",
    }
    return held, case


def observe_nlp(plan: Plan, glue: str, model_name: str) -> tuple[HeldGradient, dict[str, str]]:
    """Module replacing on RTE to half of the layers with DSKD, as the training script does it; (measurements, case)."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    words = "--do_train --task_name RTE --bf16 --report_to none --disable_tqdm --output_dir ."
    words += f" --learning_rate 2e-5 --max_steps {plan.steps} --per_gpu_train_batch_size {plan.batch}"
    words += f" --replacing_rate 0.3 --scheduler_linear_k 0.0003 --ifsvd --rank_size 32 --svd_steps {plan.svd_steps}"
    words += f" --max_seq_length {LENGTH}"
    words += " --finetune_predecessor"  # a model that is not fine-tuned yet is no reason for a warning
    args = parse_arguments([*words.split(), "--model_name_or_path", model_name, "--data_dir", f"{glue}/RTE"])
    set_seed(args.seed)
    sets, task = load_data(args)
    tokenizer, model = load_model(args, task)
    train = tokenize(sets["train"], tokenizer, max_length(args, model))
    tuned = any(name.endswith("ForSequenceClassification") for name in model.config.architectures or ())

    def trainer(model, folder: str, steps: int, **settings) -> DistillationTrainer:
        setup = training_arguments(args, Path(folder), save_strategy="no", logging_strategy="no", max_steps=steps)
        settings |= {"train_dataset": train, "data_collator": collator(tokenizer)}
        trainer = DistillationTrainer(model=model.to(setup.device), args=setup, **settings)
        trainer.remove_callback(PrinterCallback)
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        if not tuned:
            trainer(model, folder, plan.tuning_steps).train()
        layers = len(encoder_layers(model))
        theseus = TheseusModel(model, layers // 2, seed=args.seed)
        dskd = DirectionSensitivityLoss(theseus.pairs(), Own(args.rank_size), args.svd_steps)
        run = trainer(theseus, folder, plan.steps, dskd=dskd, lambda_size=args.lambda_size)
        held = HeldGradient(theseus.pairs(), dskd, plan.stages, plan.steps)
        schedule = replacing_schedule("linear", args.replacing_rate, args.scheduler_linear_k, 0)
        callbacks = FollowOptimizerCallback(dskd, theseus), ReplacingCallback(theseus, schedule), _Observer(held)
        for callback in callbacks:
            run.add_callback(callback)
        run.train()
    case = {
        "case": f"RTE, module replacing, {layers} -> {layers // 2} layers of {Path(model_name).name}, batch "
        f"{plan.batch}, bf16, {plan.steps} steps, learning rate {args.learning_rate:g} falling to 0",
        "dskd": f"lambda {args.lambda_size}, rank {args.rank_size}, chosen every {plan.svd_steps} steps, gradient held "
        f"for {dskd.grad_steps}",
        "teacher": "as given, fine-tuned" if tuned else f"fine-tuned for {plan.tuning_steps} steps",
    }
    return held, case


class _Observer(TrainerCallback):
    """Tells the measurements of the Trainer's steps."""

    def __init__(self, held: HeldGradient):
        self.held = held

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.held.before_step(state.global_step + 1)

    def on_step_end(self, args, state, control, **_):
        self.held.after_step(state.global_step)
