"""Short runs of both recipes with DSKD, observed by `HeldGradient` or what has its methods."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
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
    MethodStateCallback,
    ReplacingCallback,
    collator,
    training_arguments,
)
from common.svd_loss import DirectionSensitivityLoss
from cv.config import load_config
from cv.data import EpochLoader, load_dataset
from cv.dskd import build_dskd, layer_pairs
from cv.methods import build_distiller
from cv.models import build_model
from cv.teachers import load_teacher
from scripts.study.held_gradient import HeldGradient, Pairs

Observer = TypeVar("Observer")


@dataclass(frozen=True)
class Plan:
    """How long a run is, and where it is looked at.

    stages: by name, the steps whose exact gradient is kept; svd_steps must divide all of them. ages: when it is
    compared. decays: steps after which the learning rate of the vision recipe is divided by 10. tuning_steps: of a
    predecessor that is not fine-tuned yet.
    """

    steps: int
    batch: int
    svd_steps: int
    ages: Sequence[int]
    stages: dict[str, Sequence[int]]
    decays: Sequence[int] = ()
    tuning_steps: int = 0

    def held_gradient(self, pairs: Pairs, dskd: DirectionSensitivityLoss) -> HeldGradient:
        """The observer of a run by this plan."""
        return HeldGradient(pairs, dskd, self.stages, self.ages, self.steps)


def observe_cv(
    plan: Plan, cifar100: str, random_teacher: bool, observer: Callable[[Pairs, DirectionSensitivityLoss], Observer]
) -> tuple[Observer, dict[str, str]]:
    """ResNet56 -> ResNet20 by KD with DSKD, the recipe of configs/cifar100 in fewer steps; (measurements, case)."""
    words = f"DSKD.ENABLED true DSKD.RANK 0 DSKD.SVD_STEPS {plan.svd_steps} SOLVER.BATCH_SIZE {plan.batch}"
    cfg = load_config("configs/cifar100/kd/res56_res20.yaml", words.split())
    solver, device = cfg.SOLVER, "cuda" if torch.cuda.is_available() else "cpu"
    data = load_dataset("cifar100", cifar100)
    classes, (channels, *_) = len(data.classes), data.train.images.shape[1:]
    set_seed(solver.SEED)
    student = build_model(cfg.DISTILLER.STUDENT, classes, channels)
    if random_teacher:
        teacher = build_model(cfg.DISTILLER.TEACHER, classes, channels)
    else:
        teacher = load_teacher(cfg, classes, channels).network
    kd = build_distiller(
        "kd", student, teacher, cfg.KD, num_classes=classes, image_shape=(3, 32, 32), num_train=len(data.train)
    ).to(device, memory_format=torch.channels_last)
    look = {"mean": data.mean, "std": data.std, "device": device, "seed": solver.SEED, "channels_last": True}
    loader = EpochLoader(data.train, plan.batch, augment=data.augment, shuffle=True, **look)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=solver.LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY
    )
    dskd = build_dskd(student, teacher, cfg.DSKD)
    held = observer(layer_pairs(student, teacher, cfg.DSKD), dskd)
    kd.train()
    step = epoch = 0
    while step < plan.steps:
        epoch += 1
        for batch in loader.epoch(epoch):
            optimizer.param_groups[0]["lr"] = solver.LR * solver.LR_DECAY_RATE ** sum(step >= at for at in plan.decays)
            optimizer.zero_grad(set_to_none=True)
            (sum(kd(*batch)[1].values()) + cfg.DSKD.LAMBDA * dskd()).backward()
            held.before_step(step + 1)
            with dskd.observe(step / plan.steps):
                optimizer.step()
            step += 1
            held.after_step(step)
            if step == plan.steps:
                break
    dskd_words = f"lambda {cfg.DSKD.LAMBDA}, all directions, chosen every {plan.svd_steps} steps"
    case = {
        "case": f"CIFAR-100, KD, ResNet56 -> ResNet20, batch {plan.batch}, fp32, {plan.steps} steps",
        "dskd": f"{dskd_words}, gradient held for {dskd.grad_steps}",
        "teacher": "random weights" if random_teacher else "trained",
    }
    return held, case


def observe_nlp(plan: Plan, glue: str, model_name: str) -> tuple[HeldGradient, dict[str, str]]:
    """Module replacing on RTE to half of the layers with DSKD, as the training script does it; (measurements, case)."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    words = "--do_train --task_name RTE --max_seq_length 128 --bf16 --report_to none --disable_tqdm --output_dir ."
    words += f" --learning_rate 2e-5 --max_steps {plan.steps} --per_gpu_train_batch_size {plan.batch}"
    words += f" --replacing_rate 0.3 --scheduler_linear_k 0.0003 --ifsvd --rank_size 32 --svd_steps {plan.svd_steps}"
    words += " --finetune_predecessor"  # a model that is not fine-tuned yet is no reason for a warning
    args = parse_arguments([*words.split(), "--model_name_or_path", model_name, "--data_dir", f"{glue}/RTE"])
    set_seed(args.seed)
    sets, task = load_data(args)
    tokenizer, model = load_model(args, task)
    train = tokenize(sets["train"], tokenizer, max_length(args, model))
    tuned = any(name.endswith("ForSequenceClassification") for name in model.config.architectures or ())

    def trainer(model, folder: str, **settings) -> DistillationTrainer:
        changes = {name: settings.pop(name) for name in ("max_steps",) if name in settings}
        setup = training_arguments(args, Path(folder), save_strategy="no", logging_strategy="no", **changes)
        trainer = DistillationTrainer(
            model=model.to(setup.device), args=setup, train_dataset=train, data_collator=collator(tokenizer), **settings
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        if not tuned:
            trainer(model, folder, max_steps=plan.tuning_steps).train()
        layers = len(encoder_layers(model))
        theseus = TheseusModel(model, layers // 2, seed=args.seed)
        dskd = DirectionSensitivityLoss(theseus.pairs(), args.rank_size, args.svd_steps)
        run = trainer(theseus, folder, dskd=dskd, lambda_size=args.lambda_size)
        held = plan.held_gradient(theseus.pairs(), dskd)
        run.add_callback(MethodStateCallback(dskd, theseus, run.totals))
        schedule = replacing_schedule("linear", args.replacing_rate, args.scheduler_linear_k, 0)
        run.add_callback(ReplacingCallback(theseus, schedule))
        run.add_callback(_Observer(held))
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
    """Comes after `MethodStateCallback`, which closes DSKD's own bracket."""

    def __init__(self, held: HeldGradient):
        self.held = held

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.held.before_step(state.global_step + 1)

    def on_step_end(self, args, state, control, **_):
        self.held.after_step(state.global_step)
