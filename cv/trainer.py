"""One run from data to result: train a student by a method and DSKD, evaluate, checkpoint, export."""

import importlib.util
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from common import ROOT
from common.run.choices import ChoiceLog
from common.run.errors import UserError, user_errors
from common.run.files import check_writable, write_aside
from common.run.record import RunRecord, check_circumstances
from cv.blocks import copy_from_teacher
from cv.config import as_dict, defaults, leaves, repository_path
from cv.data import DataSets, EpochLoader, load_dataset
from cv.dskd import build_dskd, layer_map, layer_pairs
from cv.export import check_onnx_packages, export_onnx, load_model, save_model
from cv.methods import METHODS, Distiller, build_distiller
from cv.models import build_model
from cv.teachers import find_teacher, load_teacher
from dskd.groups import Pairs

EVALUATION_BATCH = 500
CHECKPOINT = "checkpoint.pt"
# what a resumed run may change; LOG.*, too
_FREE_ON_RESUME = ("OUTPUT_DIR", "DATASET.ROOT", "DISTILLER.TEACHER_CKPT", "SOLVER.EPOCHS", "SOLVER.COMPILE")
_WRITTEN = (CHECKPOINT, "student", "student_best", "tracking", "config.json", "metrics.jsonl", "directions.jsonl")
_WRITTEN += ("result.json",)


def train(cfg: CfgNode, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Train as `cfg` says (cv/config.py) and return the contents of result.json (None on ranks other than 0).

    Raises:
        UserError: bad settings, missing data or teacher, an output folder in use, a loss or student that is not finite.
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
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(solver.PRECISION, solver.PRECISION),
        log_with=cfg.LOG.TRACKERS or None,
        project_dir=folder / "tracking",
        # every rank keeps its own batch statistics and contrast memories; rank 0's are evaluated and saved
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    _check_folder(folder, resume=resume, overwrite=overwrite)
    if solver.BATCH_SIZE % accelerator.num_processes:
        raise UserError(f"SOLVER.BATCH_SIZE {solver.BATCH_SIZE} does not divide into {accelerator.num_processes} ranks")
    data = load_dataset(
        cfg.DATASET.NAME,
        repository_path(cfg.DATASET.ROOT),
        image_size=cfg.DATASET.IMAGE_SIZE or None,
        subset=cfg.DATASET.SUBSET or None,
        subset_seed=solver.SEED if cfg.DATASET.SUBSET_SEED == -1 else cfg.DATASET.SUBSET_SEED,
        held_out=cfg.DATASET.HELD_OUT,
    )
    set_seed(solver.SEED)
    distiller, pairs, teacher_sha256 = _build(cfg, data, accelerator)
    if overwrite and teacher_sha256 is not None:
        _check_teacher_stays(find_teacher(cfg), folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not resume:
        for name in _WRITTEN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    run = _Run(cfg, folder, accelerator, data, distiller, pairs, teacher_sha256)
    return run.train(resume)


def output_folder(cfg: CfgNode) -> Path:
    """`OUTPUT_DIR`, or outputs/<dataset>/<run name>/seed<seed> in the repository."""
    if cfg.OUTPUT_DIR:
        return Path(cfg.OUTPUT_DIR)
    distiller = cfg.DISTILLER
    if distiller.TYPE == "vanilla" and not cfg.DSKD.ENABLED:
        name = f"vanilla_{distiller.STUDENT}"
    else:
        name = f"{distiller.TYPE}_{distiller.TEACHER}_{distiller.STUDENT}" + ("_dskd" if cfg.DSKD.ENABLED else "")
    name += "_from_teacher" if distiller.START == "teacher" else ""
    return ROOT / "outputs" / cfg.DATASET.NAME / name / f"seed{cfg.SOLVER.SEED}"


def evaluate(model: nn.Module, loader: EpochLoader) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent (top-5 of fewer than 5 classes counts all of them)."""
    model.eval()
    first = fifth = torch.zeros((), device=loader.device, dtype=torch.int64)
    with torch.inference_mode():
        for images, labels, _ in loader.epoch(0):
            logits = model(images)
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            first, fifth = first + hits[:, 0].sum(), fifth + hits.sum()
    count = len(loader.image_set)
    return {"top1": 100 * first.item() / count, "top5": 100 * fifth.item() / count}


def learning_rate(solver: CfgNode, epoch: int) -> float:
    """Rate in an epoch (from 1): LR times LR_DECAY_RATE for every stage that lies behind it."""
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
    def __init__(
        self,
        cfg: CfgNode,
        folder: Path,
        accelerator: Accelerator,
        data: DataSets,
        distiller: Distiller,
        pairs: Pairs,
        teacher_sha256: str | None,
    ):
        self.cfg, self.folder, self.accelerator, self.data = cfg, folder, accelerator, data
        self.distiller, self.pairs, self.teacher_sha256 = distiller, pairs, teacher_sha256
        solver = cfg.SOLVER
        self.dskd = build_dskd(pairs, cfg.DSKD, solver.SEED) if cfg.DSKD.ENABLED else None
        common = {
            "mean": data.mean,
            "std": data.std,
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
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            **common,
        )
        self.test_loader = EpochLoader(data.test, EVALUATION_BATCH, augment=None, shuffle=False, **common)
        optimizer = torch.optim.SGD(
            distiller.trainable_parameters(),
            lr=solver.LR,
            momentum=solver.MOMENTUM,
            weight_decay=solver.WEIGHT_DECAY,
        )
        self.model, self.optimizer = accelerator.prepare(distiller, optimizer)
        self.progress = _Progress()
        self.total_steps = solver.EPOCHS * len(self.loader)
        if self.dskd is not None:
            self.dskd.attach(self.optimizer, self.total_steps)

    def _images_of_last_batch(self) -> int:
        ranks = self.accelerator.num_processes
        return -(-len(self.data.train) // ranks) % (self.cfg.SOLVER.BATCH_SIZE // ranks)

    def train(self, resume: bool) -> dict[str, Any] | None:
        if resume:
            self._load()
        cfg, progress, main = self.cfg, self.progress, self.accelerator.is_main_process
        if main and progress.epoch < cfg.SOLVER.EPOCHS:
            (self.folder / "result.json").unlink(missing_ok=True)  # of the run that is resumed: no longer its result
        resume_step = progress.step if resume else None
        self.record = RunRecord(self.folder, as_dict(cfg), resume_step) if main else None
        self.directions = None
        if main and self.dskd is not None:
            self.directions = ChoiceLog(self.folder, self.dskd, self.pairs, resume_step)
        self.accelerator.init_trackers("run")
        bar = tqdm(total=self.total_steps, initial=progress.step, unit="step", disable=not (main and cfg.LOG.PROGRESS))
        start = time.perf_counter() - progress.wall_seconds
        with bar:
            for epoch in range(progress.epoch + 1, cfg.SOLVER.EPOCHS + 1):
                self._train_epoch(epoch, bar)
                self._check_student()  # the loss tells nothing of the last update
                evaluated = epoch % cfg.SOLVER.EVAL_EPOCHS == 0 or epoch == cfg.SOLVER.EPOCHS
                if main and evaluated:
                    scores = evaluate(self.distiller.student, self.test_loader)
                    progress.history.append({"epoch": epoch, **scores})
                    self._log(epoch=epoch, **{f"test_{name}": value for name, value in scores.items()})
                    bar.set_postfix_str(f"epoch {epoch}, top-1 {scores['top1']:.2f}")
                    if progress.best["epoch"] == epoch:
                        self._export("student_best", progress.best)
                    progress.epoch, progress.wall_seconds = epoch, time.perf_counter() - start
                    self._save()
        self.accelerator.wait_for_everyone()  # no rank closes its connections while another still reads
        self.accelerator.end_training()
        return self._finish(time.perf_counter() - start) if main else None

    def _train_epoch(self, epoch: int, bar: tqdm) -> None:
        solver, progress = self.cfg.SOLVER, self.progress
        rate = learning_rate(solver, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.distiller.epoch.fill_(epoch)
        start, first_step = time.perf_counter(), progress.step
        for images, labels, indices in self.loader.epoch(epoch):
            logged = (progress.step + 1) % self.cfg.LOG.INTERVAL == 0
            logged = logged or progress.step + 1 == first_step + len(self.loader)
            # before the step, which may choose new directions: the loss of this step is along these
            concentration = self._concentration() if logged else {}
            try:
                losses, correct = self._step(images, labels, indices)
            except torch.linalg.LinAlgError as error:  # DSKD decomposes weights that are no longer finite
                raise UserError(f"the run diverged in step {progress.step + 1}: {error}; lower SOLVER.LR") from error
            progress.step += 1
            if self.directions is not None:
                self.directions.follow(progress.step)
            bar.update()
            if logged:
                values = {name: value.item() for name, value in losses.items()}
                if not all(abs(value) < float("inf") for value in values.values()):
                    raise UserError(f"the run diverged in step {progress.step}: {values}; lower SOLVER.LR")
                seconds = time.perf_counter() - start
                images_done = min((progress.step - first_step) * solver.BATCH_SIZE, len(self.data.train))
                values |= {"train_top1": 100 * correct.item() / len(labels), "learning_rate": rate}
                values |= {"images_per_second": images_done / seconds}
                self._log(**values, **concentration)
        progress.seconds += time.perf_counter() - start

    def _check_student(self) -> None:
        state = self.distiller.student.state_dict()
        if not torch.stack([value.isfinite().all() for value in state.values()]).all():
            raise UserError(
                f"the run diverged in step {self.progress.step}: the student's weights are not finite; lower SOLVER.LR"
            )

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
        self.accelerator.backward(loss)
        self.optimizer.step()
        return {"loss": loss.detach(), **parts}, (logits.detach().argmax(1) == labels).sum()

    def _log(self, **values: float) -> None:
        if self.record is not None:
            self.record.log(self.progress.step, **values)
            self.accelerator.log(values, step=self.progress.step)

    def _export(self, name: str, scores: dict[str, float]) -> None:
        height, width = self.data.test.images.shape[-2:]
        save_model(
            self.distiller.student,
            self.cfg.DISTILLER.STUDENT,
            self.folder / name,
            image_size=height if height == width else [height, width],
            mean=list(self.data.mean),
            std=list(self.data.std),
            class_names=self.data.classes,
            dataset=self.cfg.DATASET.NAME,
            accuracy=scores["top1"],
            held_out=self.cfg.DATASET.HELD_OUT,
            epoch=scores["epoch"],
            seed=self.cfg.SOLVER.SEED,
        )

    def _save(self) -> None:
        # the teacher comes from its own checkpoint again
        weights = {k: v for k, v in self.distiller.state_dict().items() if not k.startswith("teacher.")}
        scaler = self.accelerator.scaler
        state = {
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "dskd": None if self.dskd is None else self.dskd.state_dict(),
            "progress": vars(self.progress),
            "config": as_dict(self.cfg),
            "teacher_sha256": self.teacher_sha256,
            "circumstances": self._circumstances(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        write_aside(self.folder / CHECKPOINT, lambda path: torch.save(state, path))

    def _circumstances(self) -> dict[str, int]:
        """What steps and batches depend on besides the settings."""
        train, processes = self.data.train, self.accelerator.num_processes
        return {"processes": processes, "training images": len(train), "classes": train.num_classes}

    def _load(self) -> None:
        state = _read_checkpoint(self.folder / CHECKPOINT)
        before = leaves(defaults()) | leaves(CfgNode(state["config"]))  # a setting that is new since: its default
        for key, value in leaves(self.cfg).items():
            if value != before[key] and key not in _FREE_ON_RESUME and not key.startswith("LOG."):
                raise UserError(
                    f"--resume: {self.folder / CHECKPOINT} was written with {key} = {before[key]!r}, "
                    f"and {value!r} is asked for now"
                )
        check_circumstances(self.folder / CHECKPOINT, state.get("circumstances", {}), self._circumstances())
        if state.get("teacher_sha256", self.teacher_sha256) != self.teacher_sha256:
            raise UserError(
                f"--resume: {self.folder / CHECKPOINT} was written with another {self.cfg.DISTILLER.TEACHER} "
                "as teacher; give its folder as DISTILLER.TEACHER_CKPT"
            )
        self.distiller.load_state_dict(state["weights"], strict=False)  # all but the teacher
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.dskd is not None:
            with user_errors():
                self.dskd.load_state_dict(state["dskd"])
        self.progress = _Progress(**state["progress"])
        if self.progress.epoch > self.cfg.SOLVER.EPOCHS:
            raise UserError(
                f"--resume: {self.progress.epoch} epochs are done already, and SOLVER.EPOCHS is "
                f"{self.cfg.SOLVER.EPOCHS}"
            )
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random_cuda"])

    def _finish(self, wall_seconds: float) -> dict[str, Any]:
        cfg, progress = self.cfg, self.progress
        last, best = progress.history[-1], progress.best
        self._export("student", last)
        result = self.record.finish(
            task=cfg.DATASET.NAME,
            method=cfg.DISTILLER.TYPE,
            dskd=as_dict(cfg.DSKD) if cfg.DSKD.ENABLED else None,
            teacher=cfg.DISTILLER.TEACHER or None,
            teacher_sha256=self.teacher_sha256,
            student=cfg.DISTILLER.STUDENT,
            seed=cfg.SOLVER.SEED,
            metric="top1",
            tested_on=_tested_on(cfg),
            last=last["top1"],
            best=best["top1"],
            last_top5=last["top5"],
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
        print(f"the student: {self.folder / 'student'} (load it with cv.export.load_model)")
        return result


def _check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    check_writable("OUTPUT_DIR", folder)
    if resume and not (folder / CHECKPOINT).exists():
        raise UserError(f"--resume: there is no {CHECKPOINT} in {folder}")
    if not (resume or overwrite) and folder.exists() and any((folder / name).exists() for name in _WRITTEN):
        raise UserError(f"OUTPUT_DIR {folder} holds a run; give --resume, --overwrite or another OUTPUT_DIR")


def _check_teacher_stays(teacher: Path, folder: Path) -> None:
    if any(teacher.resolve().is_relative_to((folder / name).resolve()) for name in _WRITTEN):
        raise UserError(f"--overwrite would remove the teacher, {teacher}; give another OUTPUT_DIR")


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:  # nothing is known about the run: no advice to replace it
        raise UserError(f"--resume: {path} cannot be read: {error.strerror or error}") from error
    except Exception:  # of a file that is no checkpoint torch raises whatever its bytes lead to
        state = None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise UserError(f"--resume: {path} is not the checkpoint of a run; start again with --overwrite")
    return state


def _build(cfg: CfgNode, data: DataSets, accelerator: Accelerator) -> tuple[Distiller, Pairs, str | None]:
    """The method with its networks on the device, DSKD's pairs, the teacher's hash; prints what distils what."""
    classes, channels = data.train.num_classes, data.train.images.shape[1]
    student = build_model(cfg.DISTILLER.STUDENT, classes, channels)
    _check_images(cfg, student, tuple(data.train.images.shape[1:]))
    method = METHODS[cfg.DISTILLER.TYPE]
    teacher, teacher_sha256, source = None, None, None
    copied = cfg.DISTILLER.START == "teacher"
    if method.needs_teacher or cfg.DSKD.ENABLED or copied:
        teacher, teacher_sha256, source = load_teacher(cfg, classes, channels)
    if copied:
        copy_from_teacher(student, teacher)
    block = cfg.DISTILLER.TYPE.upper()
    distiller = build_distiller(
        cfg.DISTILLER.TYPE,
        student,
        teacher,
        cfg.get(block, CfgNode()),
        num_classes=classes,
        image_shape=tuple(data.train.images.shape[1:]),
        num_train=len(data.train),
    ).to(accelerator.device)
    if cfg.SOLVER.CHANNELS_LAST:
        distiller.to(memory_format=torch.channels_last)
    pairs = layer_pairs(student, teacher, cfg.DSKD) if cfg.DSKD.ENABLED else []
    if cfg.SOLVER.COMPILE:
        for network in filter(None, (student, teacher)):
            network.features = torch.compile(network.features)
    if accelerator.is_main_process:
        _announce(cfg, data, distiller, pairs, source)
    return distiller, pairs, teacher_sha256


@torch.no_grad()
def _check_images(cfg: CfgNode, student: nn.Module, shape: tuple[int, ...]) -> None:
    try:
        student.eval()(torch.zeros(1, *shape))
    except RuntimeError:
        size = "x".join(map(str, shape[1:]))
        raise UserError(
            f"{cfg.DISTILLER.STUDENT} cannot take images of {size} pixels; set a larger DATASET.IMAGE_SIZE"
        ) from None
    student.train()


def _tested_on(cfg: CfgNode) -> str:
    return "held-out training images" if cfg.DATASET.HELD_OUT else "test images"


def _announce(cfg: CfgNode, data: DataSets, distiller: Distiller, pairs: Pairs, source: str | None) -> None:
    teacher = f" from {source}" if source else ""
    teacher += ", started as a copy of its blocks" if cfg.DISTILLER.START == "teacher" else ""
    print(
        f"{cfg.DATASET.NAME}: {len(data.train)} training and {len(data.test)} {_tested_on(cfg)}, "
        f"{data.train.num_classes} classes\n{cfg.DISTILLER.STUDENT}{teacher} by {cfg.DISTILLER.TYPE}",
        flush=True,
    )
    for note in (*data.notes, *distiller.notes):
        print(f"note: {note}", flush=True)
    if cfg.DSKD.ENABLED:
        names = layer_map(distiller.student, distiller.teacher, cfg.DSKD)
        kept = {name for name, _, _ in pairs}
        rows = "\n".join(
            f"  {ours} <- {theirs}" + ("" if ours in kept else " (left out: shapes differ)") for ours, theirs in names
        )
        print(f"DSKD, lambda {cfg.DSKD.LAMBDA:g}, {cfg.DSKD.BASIS} directions:\n{rows}", flush=True)
    if late := [stage for stage in cfg.SOLVER.LR_DECAY_STAGES if stage >= cfg.SOLVER.EPOCHS]:
        print(f"note: LR_DECAY_STAGES {late} lie behind the last epoch, {cfg.SOLVER.EPOCHS}", flush=True)
