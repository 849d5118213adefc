"""One run from data to result: train a student by a method and DSKD, evaluate, checkpoint, export."""

import importlib.util
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from common import ROOT
from common.run.choices import ChoiceLog
from common.run.confusion import Confusion, confused, write_confusion
from common.run.disk import check_space
from common.run.errors import UserError
from common.run.files import write_aside, write_json
from common.run.record import RunRecord
from common.run.restarts import start_group
from common.run.stopping import Request, Stopped, stop_requests
from cv import checkpoint
from cv.assembly import Built, build, tested_on
from cv.compiling import run_eagerly
from cv.config import as_dict, repository_path
from cv.data import DataSets, EpochLoader, load_dataset
from cv.data.cache import DECODED
from cv.data.memory import memory_errors
from cv.determinism import kernels
from cv.dskd import build_dskd
from cv.export import check_onnx_packages, export_onnx, load_model, save_model
from cv.normalisation import Normalisation
from cv.output import BEFORE, CHECKPOINT, WRITTEN, RunFolder
from cv.regularisers import StartingPoint
from cv.reporting import baseline, cost, next_steps, summary
from cv.teachers import each_teacher, find_teacher, names_of_teachers

EVALUATION_BATCH = 500
# a signal that stops several processes is seen by one of them first: so many steps lie between their agreements
_AGREE_STEPS = 10


def train(cfg: CfgNode, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Train as `cfg` says (cv/config.py) and return the contents of result.json (None on processes other than 0).

    Raises:
        UserError: bad settings, missing data or teacher, an output folder in use, a loss or student that is not finite.
        Stopped: SIGTERM or SIGINT, after the step has been finished and saved.
    """
    solver = cfg.SOLVER
    cpu = not torch.cuda.is_available()
    if solver.PRECISION == "fp16" and cpu:
        raise UserError("SOLVER.PRECISION fp16 needs a GPU; use bf16 or fp32 here")
    if "wandb" in cfg.LOG.TRACKERS and importlib.util.find_spec("wandb") is None:
        raise UserError("LOG.TRACKERS wandb needs that package: pip install wandb")
    if cfg.LOG.ONNX:
        check_onnx_packages()
    folder = output_folder(cfg)
    start_group()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(solver.PRECISION, solver.PRECISION),
        log_with=cfg.LOG.TRACKERS or None,
        project_dir=folder / "tracking",
        # every process has its own batch statistics and contrast memories; the first one's are evaluated and saved
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    output = RunFolder(folder, main=accelerator.is_main_process)
    with output.hold(), memory_errors(), kernels(solver.DETERMINISTIC):
        accelerator.wait_for_everyone()
        return _train(cfg, output, accelerator, resume=resume, overwrite=overwrite)


def _train(
    cfg: CfgNode, output: RunFolder, accelerator: Accelerator, *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Read and build everything, so that what is wrong with it costs no earlier run; then train."""
    solver = cfg.SOLVER
    resume = output.check(resume=resume, overwrite=overwrite)
    if solver.BATCH_SIZE % accelerator.num_processes:
        raise UserError(
            f"SOLVER.BATCH_SIZE {solver.BATCH_SIZE} does not divide into {accelerator.num_processes} processes"
        )
    data = load_dataset(
        cfg.DATASET.NAME,
        repository_path(cfg.DATASET.ROOT),
        image_size=cfg.DATASET.IMAGE_SIZE or None,
        subset=cfg.DATASET.SUBSET or None,
        subset_seed=solver.SEED if cfg.DATASET.SUBSET_SEED == -1 else cfg.DATASET.SUBSET_SEED,
        held_out=cfg.DATASET.HELD_OUT,
        crop=cfg.DATASET.CROP,
        cache=output.path.parent / DECODED,
    )
    set_seed(solver.SEED)
    built = build(cfg, data, accelerator)
    if overwrite and built.teachers:
        for each in each_teacher(cfg):
            _check_teacher_stays(find_teacher(each), output.path)
    run = _Run(cfg, output, accelerator, data, built)
    check_space("OUTPUT_DIR", output.path, 2 * run.checkpoint_bytes())
    accelerator.wait_for_everyone()
    if not resume:
        output.set_aside()
    return run.train(resume)


def output_folder(cfg: CfgNode) -> Path:
    """`OUTPUT_DIR`, or outputs/<dataset>/<run name>/seed<seed> in the repository."""
    if cfg.OUTPUT_DIR:
        return Path(cfg.OUTPUT_DIR)
    distiller = cfg.DISTILLER
    if distiller.TYPE == "vanilla" and not cfg.DSKD.ENABLED:
        name = f"vanilla_{distiller.STUDENT}"
    else:
        name = f"{distiller.TYPE}_{names_of_teachers(cfg, '+')}_{distiller.STUDENT}" + (
            "_dskd" if cfg.DSKD.ENABLED else ""
        )
    name += "_from_teacher" if distiller.START == "teacher" else ""
    return ROOT / "outputs" / cfg.DATASET.NAME / name / f"seed{cfg.SOLVER.SEED}"


def evaluate(model: nn.Module, loader: EpochLoader) -> tuple[dict[str, float], np.ndarray]:
    """(top-1 and top-5 accuracy in percent, the cells of a `Confusion`).

    Top-5 of fewer than 5 classes counts all of them.
    """
    model.eval()
    fifth = torch.zeros((), device=loader.device, dtype=torch.int64)
    pairs = []
    with torch.inference_mode():
        for images, labels, _ in loader.epoch(0):
            logits = model(images)
            highest = logits.topk(min(5, logits.shape[1]), dim=1).indices
            pairs.append(torch.stack([labels, highest[:, 0]]))
            fifth = fifth + (highest == labels[:, None]).sum()
    labels, predictions = torch.cat(pairs, dim=1).cpu().numpy()
    count = len(loader.image_set)
    top1, top5 = (labels == predictions).sum().item(), fifth.item()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}, confused(labels, predictions)


def learning_rate(solver: CfgNode, epoch: int) -> float:
    """Rate in an epoch (from 1): LR times LR_DECAY_RATE for every stage behind it, or on a cosine from LR towards 0."""
    if solver.SCHEDULE == "cosine":
        return solver.LR * (1 + math.cos(math.pi * (epoch - 1) / solver.EPOCHS)) / 2
    return solver.LR * solver.LR_DECAY_RATE ** sum(epoch > stage for stage in solver.LR_DECAY_STAGES)


@dataclass
class _Progress:
    """What a checkpoint keeps beside the weights."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, evaluation not counted
    wall_seconds: float = 0.0  # of everything, the earlier parts of a resumed run included
    history: list[dict[str, float]] = field(default_factory=list)  # evaluations, with their epoch from 1

    @property
    def best(self) -> dict[str, float]:
        """The first evaluation with the highest top-1."""
        return max(self.history, key=lambda scores: scores["top1"])


class _Run:
    def __init__(self, cfg: CfgNode, output: RunFolder, accelerator: Accelerator, data: DataSets, built: Built):
        self.cfg, self.output, self.folder, self.accelerator, self.data = cfg, output, output.path, accelerator, data
        self.distiller, self.pairs, self.teachers, self.normalisation = built
        distiller, pairs = self.distiller, self.pairs
        self.teacher_sha256 = ", ".join(each.sha256 for each in self.teachers) or None
        solver = cfg.SOLVER
        self.student = distiller.average.module if solver.EMA else distiller.student  # that is evaluated and saved
        self.l2sp = StartingPoint(distiller.student, solver.L2SP) if solver.L2SP else None
        self.dskd = build_dskd(pairs, cfg.DSKD, solver.SEED) if cfg.DSKD.ENABLED else None
        common = {
            "mean": self.normalisation.mean,
            "std": self.normalisation.std,
            "device": accelerator.device,
            "seed": solver.SEED,
            "channels_last": solver.CHANNELS_LAST,
        }
        self.loader = EpochLoader(
            data.train,
            solver.BATCH_SIZE // accelerator.num_processes,
            augment=data.augment if cfg.DATASET.AUGMENT else None,
            shuffle=True,
            # batch norm cannot train on a single image
            drop_last=self._images_of_last_batch() == 1,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            **common,
        )
        self.test_loader = EpochLoader(data.test, EVALUATION_BATCH, augment=None, shuffle=False, **common)
        settings = {"lr": solver.LR, "weight_decay": solver.WEIGHT_DECAY}
        if solver.OPTIMIZER == "adamw":
            optimizer = torch.optim.AdamW(distiller.trainable_parameters(), **settings)
        else:
            optimizer = torch.optim.SGD(distiller.trainable_parameters(), momentum=solver.MOMENTUM, **settings)
        self.model, self.optimizer = accelerator.prepare(distiller, optimizer)
        self.progress = _Progress()
        self.total_steps = solver.EPOCHS * len(self.loader)
        if self.dskd is not None:
            self.dskd.attach(self.optimizer, self.total_steps)

    def _images_of_last_batch(self) -> int:
        processes = self.accelerator.num_processes
        return -(-len(self.data.train) // processes) % (self.cfg.SOLVER.BATCH_SIZE // processes)

    def train(self, resume: bool) -> dict[str, Any] | None:
        if resume:
            self._load()
        cfg, progress, main = self.cfg, self.progress, self.accelerator.is_main_process
        if main and progress.epoch < cfg.SOLVER.EPOCHS:
            (self.folder / "result.json").unlink(missing_ok=True)  # of the run that is resumed: no longer its result
        resume_step = progress.step if resume else None
        if main:  # before any other file: it tells whose the folder is
            write_json(self.folder / "config.json", as_dict(cfg))
        self.record = RunRecord(self.folder, as_dict(cfg), resume_step) if main else None
        self.directions = None
        if main and self.dskd is not None:
            self.directions = ChoiceLog(self.folder, self.dskd, self.pairs, resume_step)
        self.accelerator.init_trackers("run")
        bar = tqdm(total=self.total_steps, initial=progress.step, unit="step", disable=not (main and cfg.LOG.PROGRESS))
        self.start = time.perf_counter() - progress.wall_seconds
        first, done = divmod(progress.step, len(self.loader))  # a signal may have stopped the run within an epoch
        with bar, stop_requests() as request:
            for epoch in range(first + 1, cfg.SOLVER.EPOCHS + 1):
                self._train_epoch(epoch, bar, request, done if epoch == first + 1 else 0)
                self._check_student()  # the loss tells nothing of the last update
                evaluated = epoch % cfg.SOLVER.EVAL_EPOCHS == 0 or epoch == cfg.SOLVER.EPOCHS
                if main and evaluated:
                    scores = self._evaluate()
                    progress.history.append({"epoch": epoch, **scores})
                    self._log(epoch=epoch, **{f"test_{name}": value for name, value in scores.items()})
                    bar.set_postfix_str(f"epoch {epoch}{self._reached()}")
                    if progress.best["epoch"] == epoch:
                        self._export("student_best", progress.best)
                    progress.epoch = epoch
                    self._save()
                if epoch < cfg.SOLVER.EPOCHS:
                    self._stop_if_asked(request, saved=evaluated)
        self.accelerator.wait_for_everyone()  # no process closes its connections while another still reads
        self.accelerator.end_training()
        return self._finish(time.perf_counter() - self.start) if main else None

    def _evaluate(self) -> dict[str, float]:
        """The scores in percent; which classes are mixed up is written beside the record."""
        scores, cells = evaluate(self.student, self.test_loader)
        names = self.data.classes or [str(i) for i in range(self.data.test.num_classes)]
        confusion = Confusion(tuple(names), cells, self.progress.step, tested_on(self.cfg))
        write_confusion(self.folder, confusion)
        return scores | {name: 100 * value for name, value in confusion.scores().items()}

    def _train_epoch(self, epoch: int, bar: tqdm, request: Request, done: int) -> None:
        """The steps of an epoch after the first `done`."""
        solver, progress = self.cfg.SOLVER, self.progress
        rate = learning_rate(solver, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.distiller.epoch.fill_(epoch)
        start, first_step, before = time.perf_counter(), progress.step, progress.seconds
        last_step = epoch * len(self.loader)
        for images, labels, indices in self.loader.epoch(epoch, done):
            logged = (progress.step + 1) % self.cfg.LOG.INTERVAL == 0 or progress.step + 1 == last_step
            # before the step, which may choose new directions: the loss of this step is along these
            concentration = self._concentration() if logged else {}
            try:
                losses, correct = self._step(images, labels, indices)
            except torch.linalg.LinAlgError as error:  # DSKD decomposes weights that are no longer finite
                raise self._diverged(progress.step + 1, str(error)) from error
            progress.step += 1
            if self.directions is not None:
                self.directions.follow(progress.step)
            bar.update()
            if logged or progress.step == 1:  # the first one comes before any update: its cause is another
                values = {name: value.item() for name, value in losses.items()}
                if not all(abs(value) < float("inf") for value in values.values()):
                    raise self._diverged(progress.step, str(values))
            if logged:
                seconds = time.perf_counter() - start
                images_done = min((progress.step - first_step) * solver.BATCH_SIZE, len(self.data.train))
                values |= {"train_top1": 100 * correct.item() / len(labels), "learning_rate": rate}
                values |= {"images_per_second": images_done / seconds}
                self._log(**values, **concentration)
                bar.set_postfix_str(f"epoch {epoch}, loss {values['loss']:.3f}{self._reached()}", refresh=False)
            progress.seconds = before + time.perf_counter() - start
            if progress.step < last_step and (self.accelerator.num_processes == 1 or progress.step % _AGREE_STEPS == 0):
                self._stop_if_asked(request, saved=False)

    def _reached(self) -> str:
        """The last evaluation, for the progress bar."""
        return f", top-1 {self.progress.history[-1]['top1']:.2f}" if self.progress.history else ""

    def _stop_if_asked(self, request: Request, *, saved: bool) -> None:
        """End the run where a signal has asked one of the processes to; `saved`: the checkpoint is of this step.

        Raises:
            Stopped: it has.
        """
        signum = request.signum or 0
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(signum, device=self.accelerator.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            signum = int(asked)
        if not signum:
            return
        if not saved:
            self._check_student()
            if self.accelerator.is_main_process:
                self._save()
        self.accelerator.wait_for_everyone()
        count = self.accelerator.num_processes
        again = f" ({count} processes: by torchrun again)" if count > 1 else ""
        raise Stopped(signum, f"{self.folder / CHECKPOINT} is of step {self.progress.step}{again}")

    def _check_student(self) -> None:
        state = self.distiller.student.state_dict()
        if not torch.stack([value.isfinite().all() for value in state.values()]).all():
            raise self._diverged(self.progress.step, "the student's weights are not finite")

    def _diverged(self, step: int, found: str) -> UserError:
        """What is to be said of numbers that are not finite; in the loss of step 1 the learning rate has no part."""
        if step == 1 and "weights" not in found:
            return UserError(
                f"the loss is not finite in step 1, before any update: {found}; look at the weights of its parts "
                f"({self.cfg.DISTILLER.TYPE.upper()}.*, DSKD.LAMBDA), the teacher and SOLVER.PRECISION"
            )
        advice = "lower SOLVER.LR" + (", or take bf16" if self.cfg.SOLVER.PRECISION == "fp16" else "")
        return UserError(f"the run diverged in step {step}: {found}; {advice}")

    def _concentration(self) -> dict[str, float]:
        if self.dskd is None:
            return {}
        effective = self.dskd.effective_directions().values()
        return {"effective_directions": sum(effective) / len(effective)}

    def _step(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; (losses by name, number of correct predictions), left on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        logits, losses = self.model(images, labels, indices)
        loss = sum(losses.values())
        parts = {f"loss_{name}": value.detach() for name, value in losses.items()}
        if self.dskd is not None:
            alignment = self.dskd()
            loss = loss + self.cfg.DSKD.LAMBDA * alignment
            parts["dskd_loss"] = alignment.detach()
        if self.l2sp is not None:
            penalty = self.l2sp()
            loss = loss + penalty
            parts["l2sp_loss"] = penalty.detach()
        self.accelerator.backward(loss)
        self.optimizer.step()
        if self.cfg.SOLVER.EMA:
            self.distiller.average.update_parameters(self.distiller.student)
        return {"loss": loss.detach(), **parts}, (logits.detach().argmax(1) == labels).sum()

    def _log(self, **values: float) -> None:
        if self.record is not None:
            self.record.log(self.progress.step, **values)
            self.accelerator.log(values, step=self.progress.step)

    def _export(self, name: str, scores: dict[str, float]) -> None:
        height, width = self.data.test.images.shape[-2:]
        save_model(
            self.student,
            self.cfg.DISTILLER.STUDENT,
            self.folder / name,
            image_size=height if height == width else [height, width],
            mean=list(self.normalisation.mean),
            std=list(self.normalisation.std),
            class_names=self.data.classes,
            dataset=self.cfg.DATASET.NAME,
            accuracy=scores["top1"],
            held_out=self.cfg.DATASET.HELD_OUT,
            epoch=scores["epoch"],
            seed=self.cfg.SOLVER.SEED,
        )

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "weights": checkpoint.weights(self.distiller),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "dskd": None if self.dskd is None else self.dskd.state_dict(),
            "progress": vars(self.progress),
            "config": as_dict(self.cfg),
            "teacher_sha256": self.teacher_sha256,
            "data_sha256": self.data_sha256,
            "circumstances": self._circumstances(),
            "normalisation": list(self.normalisation),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }

    def _save(self) -> None:
        self.progress.wall_seconds = time.perf_counter() - self.start
        state = checkpoint.sealed(self._state())
        self.output.keep_checkpoint()
        write_aside(self.folder / CHECKPOINT, lambda path: torch.save(state, path))
        self.output.settle()

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint with the student beside it, to see whether there is room."""
        weights = sum(value.nbytes for value in checkpoint.weights(self.distiller).values())
        learned = sum(parameter.nbytes for parameter in self.distiller.trainable_parameters())
        held = sum(weight.nbytes for _, weight, _ in self.pairs)  # the gradient that DSKD holds
        return 2 * weights + learned + held

    @cached_property
    def data_sha256(self) -> str:
        """Of the images and labels that are trained on."""
        return checkpoint.fingerprint(self.data.train)

    def _circumstances(self) -> dict[str, int]:
        """What steps and batches depend on besides the settings."""
        train, processes = self.data.train, self.accelerator.num_processes
        return {"processes": processes, "training images": len(train), "classes": train.num_classes}

    def _load(self) -> None:
        path, state, passed = checkpoint.read_whole([self.folder / CHECKPOINT, self.folder / BEFORE])
        for line in passed if self.accelerator.is_main_process else ():
            print(f"note: {line}", flush=True)
        checkpoint.check(path, state, self.cfg, self._circumstances(), self.teacher_sha256, lambda: self.data_sha256)
        earlier = Normalisation(*state.get("normalisation", self.normalisation))
        if not earlier.is_close(self.normalisation):
            raise UserError(
                f"--resume: {path} was written with images normalised by {earlier}, and now it is "
                f"{self.normalisation}; give DISTILLER.STUDENT_CKPT as it was"
            )
        with checkpoint.restoring(path):
            checkpoint.load_weights(self.distiller, state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if self.dskd is not None:
                self.dskd.load_state_dict(state["dskd"])
            self.progress = _Progress(**state["progress"])
            torch.set_rng_state(state["random"])
            if state["random_cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["random_cuda"])
        if self.progress.epoch > self.cfg.SOLVER.EPOCHS:
            raise UserError(
                f"--resume: {self.progress.epoch} epochs are done already, and SOLVER.EPOCHS is "
                f"{self.cfg.SOLVER.EPOCHS}"
            )

    def _finish(self, wall_seconds: float) -> dict[str, Any]:
        cfg, progress = self.cfg, self.progress
        run_eagerly(self.distiller.student)
        last, best = progress.history[-1], progress.best
        self._export("student", last)
        result = self.record.finish(
            task=cfg.DATASET.NAME,
            method=cfg.DISTILLER.TYPE,
            dskd=as_dict(cfg.DSKD) if cfg.DSKD.ENABLED else None,
            teacher=names_of_teachers(cfg, ", ") or None,
            teacher_sha256=self.teacher_sha256,
            student=cfg.DISTILLER.STUDENT,
            seed=cfg.SOLVER.SEED,
            metric="top1",
            tested_on=tested_on(cfg),
            last=last["top1"],
            best=best["top1"],
            last_top5=last["top5"],
            last_balanced_accuracy=last.get("balanced_accuracy"),  # unknown to older checkpoints
            last_macro_f1=last.get("macro_f1"),
            best_epoch=best["epoch"],
            epochs=cfg.SOLVER.EPOCHS,
            train_images=len(self.data.train),
            parameters=sum(p.numel() for p in self.distiller.student.parameters()),
            steps=progress.step,
            wall_seconds=wall_seconds,
            throughput=progress.epoch * len(self.data.train) / progress.seconds,
            throughput_unit="images/s",
        )
        if cfg.LOG.ONNX:
            student, _ = load_model(self.folder / "student")  # as saved: not compiled
            export_onnx(student, self.folder / "student", tuple(self.data.test.images.shape[1:]))
        print(f"top-1 last {last['top1']:.2f}, best {best['top1']:.2f} (epoch {result['best_epoch']})")
        self._summarise(last["top1"], best["top1"])
        return result

    def _summarise(self, last: float, best: float) -> None:
        shape = tuple(self.data.test.images.shape[1:])
        rows = [("teacher", each.accuracy, cost(each.network, shape)) for each in self.teachers]
        rows += [(*baseline(self.data), None), ("student, last", last, cost(self.distiller.student, shape))]
        print(summary([*rows, ("student, best", best, None)]))
        if self.dskd is not None and not self.dskd.choices:
            print("warning: no directions were chosen in the whole run: lower DSKD.SVD_STEPS")
        print(next_steps(self.folder), flush=True)


def _check_teacher_stays(teacher: Path, folder: Path) -> None:
    if any(teacher.resolve().is_relative_to((folder / name).resolve()) for name in WRITTEN):
        raise UserError(f"--overwrite would remove the teacher, {teacher}; give another OUTPUT_DIR")
