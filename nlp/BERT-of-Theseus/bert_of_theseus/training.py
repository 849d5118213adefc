"""The transformers Trainer with the DSKD loss added; callbacks that follow the optimizer and keep the record."""

import copy
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from bert_of_theseus.distillation import DistilledModel
from bert_of_theseus.metrics import compute, decide
from bert_of_theseus.modeling import TheseusModel, encoder_layers
from bert_of_theseus.sampling import LengthGrouped
from bert_of_theseus.tasks import Task
from common.run.choices import ChoiceLog
from common.run.confusion import Confusion, confused, write_confusion
from common.run.disk import writing
from common.run.errors import UserError
from common.run.files import name_aside, readable, write_aside
from common.run.manifest import MANIFEST, last_whole, write_manifest
from common.run.reading import read_tensors, reading
from common.run.record import RunRecord, check_circumstances
from common.run.stopping import Request
from common.svd_loss import DirectionSensitivityLoss
from dskd.attach import Attachment

METHOD_STATE = "method_state.pt"
# what asks the Trainer for batches of similar length: before transformers 5, and since
_BY_LENGTH = ("group_by_length", True)
if hasattr(TrainingArguments, "train_sampling_strategy"):
    _BY_LENGTH = ("train_sampling_strategy", "group_by_length")


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in an output folder, by the manifests that are written when all else has been."""
    return find_checkpoint(folder)[0]


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """(the last whole checkpoint, what is to be said of those passed over).

    Raises:
        UserError: none of the checkpoints is whole any more.
    """
    manifests = [path / MANIFEST for path in reversed(_checkpoints(folder))]
    found, passed = last_whole(manifests, "--overwrite_output_dir")
    return found and found.parent, passed


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


class NotFiniteAtStart(FloatingPointError):
    """A loss that was not finite before any update, in which the learning rate has no part."""


class DistillationTrainer(Trainer):
    """Trainer whose training loss is the task's plus `lambda_size` times DSKD's; logs both parts.

    Args:
        dskd: the loss, or None.
        lambda_size: its weight.
        trainer_arguments: those of `transformers.Trainer`.
    """

    def __init__(self, *, dskd: DirectionSensitivityLoss | None = None, lambda_size: float = 0.0, **trainer_arguments):
        super().__init__(**trainer_arguments)
        self.model_accepts_loss_kwargs = False  # losses are means over the batch: divide them when accumulating
        self.dskd, self.lambda_size = dskd, lambda_size
        # over all sessions of a resumed run
        self.totals = {"examples": 0, "seconds": 0.0, "evaluation_seconds": 0.0, "loss": 0.0, "batches": 0}
        self._sums: dict[str, torch.Tensor] = {}  # since the last log line
        self._summed = 0
        self._last_logged: tuple[int, float] | None = None  # examples, seconds without evaluations

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_):
        if model.training and self._last_logged is None:
            self._last_logged = self._clock()
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training:
            parts = {"task_loss": loss.detach()}
            if self.dskd is not None:
                alignment = self.dskd()
                loss = loss + self.lambda_size * alignment
                parts["dskd_loss"] = alignment.detach()
            parts["loss"] = loss.detach()
            for name, value in parts.items():  # summed on the device, read when logged
                self._sums[name] = self._sums.get(name, 0) + value
            self._summed += 1
            self.totals["examples"] += len(inputs["input_ids"]) * self.args.world_size
            if self.state.global_step == 0:
                self._check_finite(self._reduced_sums())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._summed:
            # the Trainer's own sum would leave out the steps between a checkpoint and its log line after a resume
            means = {name: value / self._summed for name, value in self._reduced_sums().items()}
            self.totals["loss"] += means["loss"] * self._summed
            self.totals["batches"] += self._summed
            logs.update(means)
            self._sums, self._summed = {}, 0
            logs["examples_per_second"] = self._examples_per_second()
            if self.dskd is not None:
                effective = self.dskd.effective_directions().values()
                logs["effective_directions"] = sum(effective) / len(effective)
            if isinstance(self.model, TheseusModel):
                logs["replacing_probability"] = self.model.replacing_probability
        elif "train_loss" in logs:  # of all sessions, where the Trainer knows this one alone
            loss = self.totals["loss"] + self._reduced_sums().get("loss", 0.0)
            seconds = max(self.totals["seconds"], 1e-9)
            logs["train_loss"] = loss / max(self.totals["batches"] + self._summed, 1)
            logs["train_runtime"] = round(seconds, 4)
            logs["train_samples_per_second"] = round(self.totals["examples"] / seconds, 3)
            logs["train_steps_per_second"] = round(self.state.global_step / seconds, 3)
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            self._check_finite(logs)

    def _reduced_sums(self) -> dict[str, float]:
        """Of the losses since the last log line, the mean over the processes."""
        return {name: self.accelerator.reduce(value, reduction="mean").item() for name, value in self._sums.items()}

    def _check_finite(self, losses: dict[str, float]) -> None:
        """Stop a run whose loss is lost, before it is saved over the last good state (FloatingPointError)."""
        for name in ("task_loss", "dskd_loss", "loss"):  # the part that is the cause comes first
            if not math.isfinite(losses.get(name, 0.0)):
                if self.state.global_step == 0:
                    raise NotFiniteAtStart(f"the {name} is {losses[name]}")
                raise FloatingPointError(f"the {name} at step {self.state.global_step} is {losses[name]}")

    def window(self) -> dict:
        """What was summed since the last log line, for a checkpoint to keep; all processes must call it."""
        return {"sums": self._reduced_sums(), "summed": self._summed}

    def restore_window(self, window: dict) -> None:
        device = self.args.device
        self._sums = {name: torch.tensor(value, device=device) for name, value in window["sums"].items()}
        self._summed = window["summed"]

    def take_up_ended(self, checkpoint: Path, patience: "PatienceCallback | None" = None) -> bool:
        """Whether training had ended with a checkpoint; its weights and log are taken up then.

        `train` would go on by a step where the end is in the midst of an epoch.
        """
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps and not (patience and patience.exhausted(state.log_history)):
            return False
        self.state = self.callback_handler.state = state
        self._load_from_checkpoint(str(checkpoint))
        summary = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        self.log({**dict.fromkeys(summary, 0.0), "total_flos": state.total_flos, "train_loss": 0.0})
        return True

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self._check_finite(self._reduced_sums())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise FloatingPointError(f"{name} is not finite at step {self.state.global_step}")
        with writing(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)

    def _examples_per_second(self) -> float:
        """Since the last log line, time of evaluations left out."""
        now = self._clock()
        examples, seconds = (new - old for new, old in zip(now, self._last_logged, strict=True))
        self._last_logged = now
        return examples / max(seconds, 1e-9)

    def _clock(self) -> tuple[int, float]:
        return self.totals["examples"], time.perf_counter() - self.totals["evaluation_seconds"]

    def _get_train_sampler(self, *args) -> Sampler | None:
        name, value = _BY_LENGTH
        if getattr(self.args, name) != value:
            return super()._get_train_sampler(*args)
        return LengthGrouped(
            self.train_dataset.lengths.tolist(),
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            self.args.seed,
            epoch=lambda: int(self.state.epoch),  # has a fraction within an epoch
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        # the Trainer would group by length here, too, and return predictions in another order than the file's
        return SequentialSampler(eval_dataset)

    def _evaluate(self, *args, **kwargs):  # evaluations in the midst of training, all sets together
        start = time.perf_counter()
        try:
            return super()._evaluate(*args, **kwargs)
        finally:
            self.totals["evaluation_seconds"] += time.perf_counter() - start

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # what is frozen comes from the predecessor again; from_pretrained's format is for the exported student
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state = {name: value for name, value in self.model.state_dict().items() if name in trained}
        super()._save(output_dir, state_dict=state)

    def _issue_warnings_after_load(self, load_result) -> None:
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        wrong = sorted(trained & set(load_result.missing_keys)) + load_result.unexpected_keys
        if wrong:
            raise UserError(f"the checkpoint is of another model: {wrong[0]} does not match")


class FollowOptimizerCallback(TrainerCallback):
    """Lets DSKD follow the Trainer's optimizer, and tells it which layers of a Theseus model had no part in a step."""

    def __init__(self, dskd: DirectionSensitivityLoss | None, theseus: TheseusModel | None):
        self.dskd, self.theseus = dskd, theseus
        self._attachment: Attachment | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        if self.dskd is not None:
            skip = self.theseus.unsampled_pairs if self.theseus is not None else None
            self._attachment = self.dskd.attach(optimizer, state.max_steps, skip=skip)

    def on_train_end(self, args, state, control, **_):
        if self._attachment is not None:
            self._attachment.detach()

    def on_step_begin(self, args, state, control, **_):
        if self.theseus is not None:
            self.theseus.sampled.clear()


class MethodStateCallback(TrainerCallback):
    """Lets the state of DSKD travel with every checkpoint, as do draws and totals; removes old checkpoints.

    Args:
        dskd, theseus: whose state is kept, or None.
        totals: the trainer's; this adds the seconds of training.
        circumstances: what the steps depend on besides the settings, by name; a resumed run needs the same.
        keep: checkpoints to leave; older ones are removed when a new one is complete (None: all).
        trainer: whose sums since the last log line are kept, or None.
        complete: called when a checkpoint is complete.

    Attributes:
        record: the run's, whose number of log lines is kept; None on other processes than the first.
    """

    def __init__(
        self,
        dskd: DirectionSensitivityLoss | None,
        theseus: TheseusModel | None,
        totals: dict[str, float],
        *,
        circumstances: Mapping[str, int | str] | None = None,
        keep: int | None = None,
        trainer: DistillationTrainer | None = None,
        complete: Callable[[], None] = lambda: None,
    ):
        self.dskd, self.theseus, self.totals = dskd, theseus, totals
        self.circumstances, self.keep = dict(circumstances or {}), keep
        self.trainer, self.complete = trainer, complete
        self.record: RunRecord | None = None
        self._since = time.perf_counter()

    def on_train_begin(self, args, state, control, **_):
        self._since = time.perf_counter()

    def on_train_end(self, args, state, control, **_):
        self._count_seconds()

    def on_save(self, args, state, control, **_):
        self._count_seconds()
        window = self.trainer and self.trainer.window()
        if dist.is_initialized():
            dist.barrier()  # every process has written its random state
        if state.is_world_process_zero:
            saved = {
                "dskd": self.dskd and self.dskd.state_dict(),
                "draws": self.theseus and self.theseus.generator.get_state(),
                "totals": self.totals,
                "circumstances": self.circumstances,
                "window": window,
                "log_lines": self.record and self.record.lines,
            }
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            write_aside(checkpoint / METHOD_STATE, lambda aside: torch.save(saved, aside))
            files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST]
            write_manifest(checkpoint / MANIFEST, files)
            self.complete()
            for old in _checkpoints(folder)[: -self.keep] if self.keep else ():
                shutil.rmtree(old)

    def load(self, checkpoint: Path) -> int | None:
        """Continue from the state in a checkpoint folder; a UserError where circumstances have changed.

        Returns the number of log lines at that time, None if the checkpoint is older than that.
        """
        path = checkpoint / METHOD_STATE
        saved = read_tensors(path)
        with reading(path, "the state of a run"):
            check_circumstances(checkpoint, saved.get("circumstances", {}), self.circumstances)
            if self.dskd is not None:
                self.dskd.load_state_dict(saved["dskd"])
            if self.theseus is not None:
                self.theseus.generator.set_state(saved["draws"])
            self.totals.update(saved["totals"])
            if self.trainer is not None and saved.get("window"):
                self.trainer.restore_window(saved["window"])
            return saved.get("log_lines")

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.totals["seconds"] += now - self._since
        self._since = now


class StopCallback(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint of it; on all processes alike.

    Attributes:
        signum: of the signal that ended the training, or None.
    """

    def __init__(self, request: Request):
        self.request = request
        self.signum: int | None = None

    def on_step_end(self, args, state, control, **_):
        self._follow(args, control)

    def on_evaluate(self, args, state, control, **_):
        self._follow(args, control)  # it may take long, and the step is not saved yet

    def _follow(self, args, control) -> None:
        signum = self.request.signum or 0
        if args.world_size > 1:
            agreed = torch.tensor(signum, device=args.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
            signum = int(agreed)
        if signum:
            self.signum = signum
            control.should_save = control.should_training_stop = True


class PatienceCallback(TrainerCallback):
    """Ends training after some evaluations without a better one, with a checkpoint.

    Args:
        metric: key of the evaluation's metrics, as for `BestStudentCallback`.
        patience: how many evaluations to wait for a better one.
    """

    def __init__(self, metric: str, patience: int):
        self.metric, self.patience = metric, patience

    def exhausted(self, history: list[dict]) -> bool:
        """Whether the evaluations in a log were enough; the same after a resume."""
        values = {line["step"]: line[self.metric] for line in history if self.metric in line}
        ordered = [values[step] for step in sorted(values)]
        return len(ordered) - 1 - ordered.index(max(ordered)) >= self.patience if ordered else False

    def on_evaluate(self, args, state, control, metrics=None, **_):
        if metrics and self.metric in metrics and self.exhausted(state.log_history):
            control.should_save = control.should_training_stop = True


class ReplacingCallback(TrainerCallback):
    """Sets the replacing probability at the start of every step.

    Args:
        theseus: whose probability it is.
        schedule: optimizer steps done -> probability.
        plan: instead of it, all steps of the training -> schedule.
    """

    def __init__(
        self,
        theseus: TheseusModel,
        schedule: Callable[[int], float] | None = None,
        plan: Callable[[int], Callable[[int], float]] | None = None,
    ):
        self.theseus, self.schedule, self.plan = theseus, schedule, plan

    def on_train_begin(self, args, state, control, **_):
        if self.plan is not None:
            self.schedule = self.plan(state.max_steps)

    def on_step_begin(self, args, state, control, **_):
        self.theseus.replacing_probability = self.schedule(state.global_step)

    def last(self, state: TrainerState) -> float:
        """The probability in the last step."""
        return (self.schedule or self.plan(state.max_steps))(max(state.global_step - 1, 0))


class RecordCallback(TrainerCallback):
    """Copies every log line of the Trainer into the run record, and DSKD's choices into theirs."""

    def __init__(self, record: RunRecord, directions: ChoiceLog | None):
        self.record, self.directions = record, directions

    def on_step_end(self, args, state, control, **_):
        if self.directions is not None:
            self.directions.follow(state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and logs:
            self.record.log(state.global_step, **logs)


class ConfusionCallback(TrainerCallback):
    """Writes which classes of the (first) dev set are mixed up, at every evaluation of it.

    Args:
        folder: the run's output folder.
        task: a classification.
        metrics: the Trainer's, of `metrics_function`.
    """

    def __init__(self, folder: Path, task: Task, metrics: Callable):
        self.folder, self.task, self.metrics = folder, task, metrics

    def on_evaluate(self, args, state, control, metrics=None, **_):
        name = self.task.dev_sets[0]
        if state.is_world_process_zero and f"eval_{name}_{self.task.primary}" in (metrics or {}):
            confusion = Confusion(self.task.labels, self.metrics.cells, state.global_step, name.replace("_", " "))
            write_confusion(self.folder, confusion)


class BestStudentCallback(TrainerCallback):
    """Keeps the student of the best evaluation so far.

    Args:
        metric: key of the evaluation's metrics to maximise, such as "eval_dev_accuracy".
        save: called with the metrics when this one has improved.
    """

    def __init__(self, metric: str, save: Callable[[dict], None]):
        self.metric, self.save = metric, save

    def on_evaluate(self, args, state, control, metrics=None, **_):
        if not metrics or self.metric not in metrics:
            return
        earlier = [
            line[self.metric] for line in state.log_history if self.metric in line and line["step"] < state.global_step
        ]
        if state.is_world_process_zero and metrics[self.metric] > max(earlier, default=float("-inf")):
            self.save(metrics)


def training_arguments(args, output_dir: Path, **overrides) -> TrainingArguments:
    """Settings of the Trainer from the command line; `overrides` replace some of them."""
    use_cpu = not torch.cuda.is_available()
    evaluate = args.do_train and args.evaluate_during_training
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": args.per_gpu_train_batch_size,
        "per_device_eval_batch_size": args.per_gpu_eval_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "adam_epsilon": args.adam_epsilon,
        "max_grad_norm": args.max_grad_norm,
        "warmup_steps": args.warmup_steps,
        "num_train_epochs": args.num_train_epochs,
        "max_steps": args.max_steps or -1,
        "seed": args.seed,
        "fp16": args.fp16,
        "bf16": args.bf16,
        "use_cpu": use_cpu,
        "ddp_backend": "gloo" if use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "ddp_find_unused_parameters": False,
        "logging_steps": args.logging_steps,
        "logging_nan_inf_filter": False,  # a loss that is not finite is shown as such
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": args.eval_steps if evaluate else None,
        "save_steps": args.save_steps,
        "report_to": [] if args.report_to == "none" else [args.report_to],
        "disable_tqdm": args.disable_tqdm,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": not use_cpu,
    }
    if not args.pad_to_max_length:
        settings.update([_BY_LENGTH])
    arguments = TrainingArguments(**{**settings, **overrides})
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are for torchrun: in DataParallel every replica would draw for itself
    return arguments


def collator(tokenizer) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Pads a batch to its longest example."""
    return DataCollatorWithPadding(tokenizer)


def metrics_function(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of the Trainer for a task.

    `cells` are those of the last set's `Confusion`, `classes` the number that the set was predicted as; both are None
    for a regression.
    """

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = first_output(prediction.predictions)
        found = compute(task, logits, prediction.label_ids)
        if not task.regression:
            metrics.cells = confused(prediction.label_ids, decide(task, logits))
            metrics.classes = len(np.unique(metrics.cells[:, 1]))
        return found

    metrics.classes = metrics.cells = None
    return metrics


def first_output(predictions):
    """The logits: models may return more beside them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def compile_layers(model: nn.Module) -> None:
    """Compile every encoder layer by itself: the random choice among layers stays outside of the compiled code."""
    if isinstance(model, TheseusModel):
        layers = [layer for module in model.theseus_modules for layer in (*module.predecessors, module.successor)]
    elif isinstance(model, DistilledModel):
        layers = [*encoder_layers(model.student), *encoder_layers(model.teacher)]
    else:
        layers = encoder_layers(model)
    for layer in layers:
        layer.compile(dynamic=True)


def save_student(student: nn.Module, tokenizer, folder: Path, card: str) -> None:
    """Write a plain transformers checkpoint with tokenizer and model card, aside and then renamed into place.

    Raises:
        FloatingPointError: weights that are not finite.
    """
    if not all(parameter.isfinite().all() for parameter in student.parameters()):
        raise FloatingPointError(f"the weights of {folder.name} are not finite")
    aside, gone = name_aside(folder), name_aside(folder.with_name(f"{folder.name}.old"))
    for path in (aside, gone):
        shutil.rmtree(path, ignore_errors=True)
    try:
        with writing(folder):
            copy.deepcopy(student).to("cpu", torch.float32).save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            (aside / "README.md").write_text(card, encoding="utf-8")
        readable(aside)
        if folder.exists():
            os.replace(folder, gone)
        os.replace(aside, folder)
    finally:
        for path in (aside, gone):
            shutil.rmtree(path, ignore_errors=True)


def weigh_classes(model: nn.Module, weights: torch.Tensor) -> None:
    """Weigh the cross-entropy of a transformers model's classes while it trains; evaluation's loss stays as it is.

    weights: (classes,).
    """

    def weigh(module: nn.Module, _, inputs: dict, output):
        if module.training and inputs.get("labels") is not None:
            logits, labels = output["logits"].float(), inputs["labels"]
            output["loss"] = F.cross_entropy(logits, labels, weights.to(logits.device))
        return output

    model.register_forward_hook(weigh, with_kwargs=True)


def state_bytes(model: nn.Module) -> int:
    """The size of a checkpoint: what trains, its two moments in AdamW, and an exported student."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 4 * (3 * trained + sum(parameter.numel() for parameter in model.parameters()))


def weights_sha256(model: nn.Module) -> str:
    """The hash of a model's weights, for a checkpoint to be told from one of another predecessor."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        value = value.detach().cpu().contiguous()
        digest.update(value.view(torch.uint8).numpy() if value.dim() else str(value).encode())
    return digest.hexdigest()
