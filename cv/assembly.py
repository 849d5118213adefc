"""The networks of a run: a student, its teachers, the method between them and DSKD's pairs, as the settings ask."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from yacs.config import CfgNode

from common.run.errors import UserError
from cv.blocks import copy_from_teacher
from cv.compiling import compile_features
from cv.data import DataSets
from cv.data.memory import memory_is_short
from cv.dskd import layer_map, layer_pairs
from cv.folding import folded
from cv.methods import METHODS, Distiller, build_distiller
from cv.models import build_model
from cv.normalisation import Normalisation, Renormalise, change_of_images
from cv.regularisers import averaged, freeze
from cv.reporting import warnings_before
from cv.sync_bn import synchronise
from cv.teachers import Teacher, each_teacher, load_student, load_teacher
from dskd.groups import Pairs


class Built(NamedTuple):
    """What `build` makes of the settings; `normalisation` is that of the student's images."""

    distiller: Distiller
    pairs: Pairs
    teachers: list[Teacher]
    normalisation: Normalisation


def build(cfg: CfgNode, data: DataSets, accelerator: Accelerator) -> Built:
    """The method with its networks on the device, DSKD's pairs, the teachers; prints what distils what."""
    classes, channels = data.train.num_classes, data.train.images.shape[1]
    student = build_model(cfg.DISTILLER.STUDENT, classes, channels)
    start = load_student(cfg, student)
    _check_images(cfg, student, tuple(data.train.images.shape[1:]))
    method = METHODS[cfg.DISTILLER.TYPE]
    teachers: list[Teacher] = []
    copied = cfg.DISTILLER.START == "teacher"
    if method.needs_teacher or cfg.DSKD.ENABLED or copied:
        by_class = method.needs_teacher and method.compares_classes
        for each in each_teacher(cfg):
            teachers.append(load_teacher(each, classes, channels, data.classes, by_class=by_class))
    first, *more = [each.network for each in teachers] or [None]
    of_data = Normalisation(data.mean, data.std)
    of_student = start.normalisation or of_data
    if copied:
        copy_from_teacher(student, first)
        of_student = teachers[0].normalisation or of_student
    freeze(student, cfg.DISTILLER.FREEZE)
    block = cfg.DISTILLER.TYPE.upper()
    distiller = build_distiller(
        cfg.DISTILLER.TYPE,
        student,
        first,
        cfg.get(block, CfgNode()),
        num_classes=classes,
        image_shape=tuple(data.train.images.shape[1:]),
        num_train=len(data.train),
        more_teachers=more,
        teacher_images=[change_of_images(of_student, each.normalisation or of_data) for each in teachers],
    ).to(accelerator.device)
    if cfg.SOLVER.EMA:
        distiller.average = averaged(student, cfg.SOLVER.EMA)
    if cfg.SOLVER.CHANNELS_LAST:
        distiller.to(memory_format=torch.channels_last)
    notes = (*start.notes, *(note for each in teachers for note in each.notes))
    for each, change in zip(teachers, distiller.teacher_images, strict=False):
        if isinstance(change, Renormalise) and method.needs_teacher:
            notes += (f"the teacher's images are normalised as those that it was trained on: {each.normalisation}",)
    pairs = layer_pairs(student, first, cfg.DSKD) if cfg.DSKD.ENABLED else []
    if cfg.SOLVER.SYNC_BN and accelerator.num_processes > 1:
        synchronise(distiller)
    if accelerator.is_main_process:
        _announce(cfg, data, distiller, pairs, " and ".join(each.line for each in teachers), notes)
    if method.needs_teacher:  # DSKD's pairs hold the weights as they are, what teaches may have others
        shape = tuple(data.train.images.shape[1:])
        lean = [folded(each, shape) for each in (first, *more)]
        distiller.teacher, distiller.more_teachers = lean[0], nn.ModuleList(lean[1:])
    if cfg.SOLVER.COMPILE:
        for network in filter(None, (student, distiller.teacher, *distiller.more_teachers)):
            compile_features(network)
    return Built(distiller, pairs, teachers, of_student)


@torch.no_grad()
def _check_images(cfg: CfgNode, student: nn.Module, shape: tuple[int, ...]) -> None:
    try:
        student.eval()(torch.zeros(1, *shape))
    except (RuntimeError, AssertionError) as error:  # timm's transformers assert their size
        if memory_is_short(error):
            raise
        size = "x".join(map(str, shape[1:]))
        raise UserError(
            f"{cfg.DISTILLER.STUDENT} cannot take images of {size} pixels; set a larger DATASET.IMAGE_SIZE"
            + ("" if isinstance(error, RuntimeError) else f" ({error})")
        ) from None
    student.train()


def tested_on(cfg: CfgNode) -> str:
    return "held-out training images" if cfg.DATASET.HELD_OUT else "test images"


def _announce(
    cfg: CfgNode, data: DataSets, distiller: Distiller, pairs: Pairs, source: str, notes: tuple[str, ...]
) -> None:
    teacher = f" from {source}" if source else ""
    teacher += ", started as a copy of its blocks" if cfg.DISTILLER.START == "teacher" else ""
    print(
        f"{cfg.DATASET.NAME}: {len(data.train)} training and {len(data.test)} {tested_on(cfg)}, "
        f"{data.train.num_classes} classes\n{cfg.DISTILLER.STUDENT}{teacher} by {cfg.DISTILLER.TYPE}",
        flush=True,
    )
    for note in (*data.notes, *notes, *distiller.notes):
        print(f"note: {note}", flush=True)
    if cfg.DSKD.ENABLED:
        names = layer_map(distiller.student, distiller.teacher, cfg.DSKD)
        kept = {name for name, _, _ in pairs}
        rows = "\n".join(
            f"  {ours} <- {theirs}" + ("" if ours in kept else " (left out: shapes differ)") for ours, theirs in names
        )
        print(f"DSKD, lambda {cfg.DSKD.LAMBDA:g}, {cfg.DSKD.BASIS} directions:\n{rows}", flush=True)
    for warning in warnings_before(cfg, data):
        print(f"warning: {warning}", flush=True)
