"""Every setting of the vision pipeline, with its default; YAML files and `KEY VALUE` pairs override them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from yacs.config import CfgNode

from common import ROOT
from common.run.errors import UserError
from common.run.reading import read_yaml
from common.run.suggest import nearest
from common.run.yaml_files import UniqueKeyLoader
from common.settings import SETTINGS, key_checks
from cv.methods import METHODS, method_defaults

_LARGEST = 3.4e38  # the largest number of float32 is just above
_LARGEST_WHOLE = 10**15  # float64 and int64 hold it with room for a product


def defaults() -> CfgNode:
    """The configuration tree with all defaults; each method adds its own block (cv/methods)."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = ""  # where the run writes (str, default outputs/<dataset>/<run name>/seed<seed>)

    cfg.DATASET = CfgNode()
    cfg.DATASET.NAME = "cifar100"  # cifar100, cifar10, tiny-imagenet, folder or digits (str)
    cfg.DATASET.ROOT = "data/cifar100"  # its folder; CIFAR is downloaded there if it is empty (str)
    cfg.DATASET.IMAGE_SIZE = 0  # side in pixels that all images are resized to (int, 0: as they are)
    cfg.DATASET.SUBSET = 0  # train on so many images only, a class-balanced choice (int, 0: all)
    cfg.DATASET.SUBSET_SEED = 0  # of that choice (int, -1: SOLVER.SEED, other images under every seed)
    cfg.DATASET.HELD_OUT = 0  # training images to test on instead of the test set, for tuning; not trained on (int)
    cfg.DATASET.AUGMENT = True  # random crop and, except for digits, flip (bool)
    cfg.DATASET.CROP = "pad"  # of AUGMENT: with zero padding, or resized: of 8% to 100%, as for ImageNet (str)

    cfg.DISTILLER = CfgNode()
    cfg.DISTILLER.TYPE = "vanilla"  # method: vanilla trains the student alone, see cv/methods (str)
    cfg.DISTILLER.STUDENT = "resnet20"  # network that is trained, see cv/models; timm/<name>, torchvision/<name> (str)
    cfg.DISTILLER.STUDENT_CKPT = ""  # a timm or torchvision student's start: safetensors file, or pretrained (str)
    cfg.DISTILLER.TEACHER = ""  # network that is distilled; vanilla needs none without DSKD and START teacher (str)
    cfg.DISTILLER.TEACHER_CKPT = ""  # folder with model.json and model.safetensors, or as above (str, default: by name)
    cfg.DISTILLER.TEACHERS = []  # several in place of TEACHER, for kd and dkd; DSKD pairs with the first (list)
    cfg.DISTILLER.TEACHER_CKPTS = []  # as TEACHER_CKPT, one for each of TEACHERS (list, empty: all by name)
    cfg.DISTILLER.START = "random"  # the student's weights: random, or teacher: a copy of its paired blocks (str)
    cfg.DISTILLER.FREEZE = []  # parameters of the student that stay as they start, such as "conv1.*" (list)

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.BATCH_SIZE = 64  # images per optimizer step, over all processes together (int)
    cfg.SOLVER.EPOCHS = 240  # passes over the training set (int)
    cfg.SOLVER.EVAL_EPOCHS = 1  # epochs between two evaluations and checkpoints; the last epoch has both (int)
    cfg.SOLVER.OPTIMIZER = "sgd"  # sgd or adamw (str)
    cfg.SOLVER.LR = 0.05  # learning rate at the start (float)
    cfg.SOLVER.SCHEDULE = "steps"  # of the rate: steps, or cosine from LR towards 0, epoch by epoch (str)
    cfg.SOLVER.LR_DECAY_STAGES = [150, 180, 210]  # epochs after which the rate is multiplied by LR_DECAY_RATE (list)
    cfg.SOLVER.LR_DECAY_RATE = 0.1  # factor of a decay (float)
    cfg.SOLVER.MOMENTUM = 0.9  # of SGD (float)
    cfg.SOLVER.WEIGHT_DECAY = 5e-4  # on every parameter; AdamW's is apart from the gradient (float)
    cfg.SOLVER.L2SP = 0.0  # L2 towards the starting weights: this / 2 * ||w - w_start||^2 in the loss (float)
    cfg.SOLVER.EMA = 0.0  # decay of a running mean of the student, which is then evaluated and saved; 0: none (float)
    cfg.SOLVER.SEED = 1  # of initialisation, order and augmentation (int)
    cfg.SOLVER.PRECISION = "fp32"  # fp32, bf16 or fp16 (GPU only) mixed precision (str)
    cfg.SOLVER.CHANNELS_LAST = True  # NHWC memory layout of images and weights (bool)
    cfg.SOLVER.SYNC_BN = False  # batch statistics of all processes together: several train as one does (bool)
    cfg.SOLVER.DETERMINISTIC = False  # the same bits in every run on one GPU, slower; as on a CPU (bool)
    cfg.SOLVER.COMPILE = False  # torch.compile, on a GPU CUDA graphs, of student and teacher (bool)

    cfg.DSKD = CfgNode()
    cfg.DSKD.ENABLED = False  # add the DSKD loss to the method's (bool)
    for setting in SETTINGS:  # common/settings.py explains them
        cfg.DSKD[setting.key] = setting.cifar
    cfg.DSKD.PAIRS = []  # [student layer, teacher layer] names, "*" alike in both (list, empty: conv1, conv2 of blocks)
    cfg.DSKD.SKIP_MISMATCHED = False  # leave out pairs whose shapes differ, instead of refusing them (bool)

    cfg.LOG = CfgNode()
    cfg.LOG.INTERVAL = 100  # optimizer steps between lines of metrics.jsonl (int)
    cfg.LOG.TRACKERS = ["tensorboard"]  # besides: tensorboard, wandb, or none with [] (list)
    cfg.LOG.PROGRESS = True  # progress bar (bool)
    cfg.LOG.ONNX = False  # export the student to ONNX, too, at the end (bool)

    for name, block in method_defaults().items():
        cfg[name] = block
    return cfg


def load_config(path: str, overrides: Sequence[str] = ()) -> CfgNode:
    """The configuration of a YAML file (its `BASE`, a file beside it, comes first) with `KEY VALUE` pairs on top.

    A relative OUTPUT_DIR in a file counts from the repository's root, in a pair from the working directory.

    Args:
        path: looked up from the working directory, then from the repository's root.
        overrides: alternating dotted keys and values.

    Raises:
        UserError: a missing or unreadable file, an unknown key (the nearest valid one is named), a wrong type, a value
            out of range.
    """
    cfg = defaults()
    _merge_file(cfg, _find(path))
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    if cfg.OUTPUT_DIR and not os.path.isabs(cfg.OUTPUT_DIR):
        cfg.OUTPUT_DIR = os.path.relpath(ROOT / cfg.OUTPUT_DIR)
    if len(overrides) % 2:
        raise UserError(f"overrides are KEY VALUE pairs; {overrides[-1]!r} has no value")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        _set(cfg, key, value, "command line")
    _validate(cfg, "command line")
    return cfg


def as_dict(cfg: CfgNode) -> dict[str, Any]:
    """Plain nested dictionaries of a configuration."""
    return {key: as_dict(value) if isinstance(value, CfgNode) else value for key, value in cfg.items()}


def leaves(cfg: CfgNode) -> dict[str, Any]:
    """All settings by their dotted keys."""
    return dict(_leaves(as_dict(cfg), cfg))


def repository_path(path: str) -> Path:
    """A path as given if it is absolute or exists from the working directory, otherwise from the repository's root."""
    found = Path(path).expanduser()
    return found if found.is_absolute() or found.exists() else ROOT / path


def _find(path: str) -> Path:
    found = repository_path(path)
    if not found.is_file():
        raise UserError(f"--cfg {path}: no such file, here or in the repository's root")
    return found


def _merge_file(cfg: CfgNode, path: Path, above: tuple[Path, ...] = ()) -> None:
    tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected KEY: value lines")
    if base := tree.pop("BASE", None):
        base = path.parent / str(base)
        if not base.is_file():
            raise UserError(f"{path}: BASE {base} does not exist")
        if base.resolve() in (path.resolve(), *above):
            raise UserError(f"{path}: BASE {base} leads back to the file itself")
        _merge_file(cfg, base, (path.resolve(), *above))
    for key, value in _leaves(tree, cfg):
        _set(cfg, key, value, str(path))
    _validate(cfg, str(path))


def _leaves(tree: dict, cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(cfg.get(key), CfgNode):
            yield from _leaves(value, cfg[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(cfg: CfgNode, key: str, value: Any, where: str) -> None:
    valid = leaves(cfg)
    if key not in valid:
        raise UserError(f"{where}: {_unknown(key, valid)}")
    if isinstance(value, str) and not isinstance(valid[key], str):
        value = _parse(value)
    if isinstance(valid[key], float) and (type(value) is int or (isinstance(value, str) and _is_number(value))):
        with suppress(OverflowError):  # a whole number beyond all floats; its type is refused
            value = float(value)  # YAML 1.1 reads 5e-4 as a text
    if type(value) is not type(valid[key]):
        raise UserError(
            f"{where}: {key} must be of type {type(valid[key]).__name__} (such as {valid[key]!r}), got {_shown(value)}"
        )
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, int) and not abs(each) <= _LARGEST_WHOLE:
            raise UserError(f"{where}: {key} = {_shown(value)}: expected {_LARGEST_WHOLE} at most")
    if isinstance(value, float) and not abs(value) <= _LARGEST:  # also true for NaN
        raise UserError(f"{where}: {key} = {value!r}: expected a finite number, {_LARGEST:g} at most")
    node = cfg
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node[parent]
    node[leaf] = value


def _unknown(key: str, valid: dict[str, Any]) -> str:
    if below := [name for name in valid if name.startswith(f"{key}.")]:
        return f"{key} is a block of keys; set one of them, such as {below[0]}"
    leaf = key.split(".")[-1].upper()
    elsewhere = (name for name in valid if name.split(".")[-1] == leaf)  # the right name in the wrong block
    near = next(elsewhere, None) or nearest(key.upper(), valid)
    return f"unknown key {key}" + (f"; the nearest is {near}" if near else "")


def _parse(text: str) -> Any:
    """A value of the command line as YAML reads it; text that is no YAML stays as it is, to be refused by its type."""
    try:
        return yaml.load(text, UniqueKeyLoader)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return text


def _shown(value: Any) -> str:
    """A value in a message, cut off: aliases make one of 10^10 entries out of a hundred bytes."""
    short = Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring, short.maxother = 3, 20, 10, 200, 200
    try:
        return short.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _validate(cfg: CfgNode, where: str) -> None:
    solver = cfg.SOLVER
    checks = [
        ("DISTILLER.TYPE", cfg.DISTILLER.TYPE in METHODS, f"one of {', '.join(METHODS)}"),
        ("DISTILLER.START", cfg.DISTILLER.START in ("random", "teacher"), "random or teacher"),
        ("DATASET.IMAGE_SIZE", cfg.DATASET.IMAGE_SIZE == 0 or cfg.DATASET.IMAGE_SIZE > 1, "0 or 2 pixels or more"),
        ("DATASET.SUBSET", cfg.DATASET.SUBSET >= 0, "0 or a number of images"),
        ("DATASET.SUBSET_SEED", -1 <= cfg.DATASET.SUBSET_SEED < 2**32, "-1 (SOLVER.SEED) or from 0 to below 2^32"),
        ("DATASET.HELD_OUT", cfg.DATASET.HELD_OUT >= 0, "0 or a number of images"),
        ("DATASET.CROP", cfg.DATASET.CROP in ("pad", "resized"), "pad or resized"),
        ("SOLVER.BATCH_SIZE", solver.BATCH_SIZE >= 2, "at least 2: batch norm cannot train on a single image"),
        ("SOLVER.EPOCHS", solver.EPOCHS >= 1, "at least 1"),
        ("SOLVER.EVAL_EPOCHS", solver.EVAL_EPOCHS >= 1, "at least 1"),
        ("SOLVER.LR", solver.LR > 0, "above 0"),
        ("SOLVER.OPTIMIZER", solver.OPTIMIZER in ("sgd", "adamw"), "sgd or adamw"),
        ("SOLVER.SCHEDULE", solver.SCHEDULE in ("steps", "cosine"), "steps or cosine"),
        ("SOLVER.LR_DECAY_STAGES", all(type(e) is int and e > 0 for e in solver.LR_DECAY_STAGES), "whole epochs"),
        ("SOLVER.LR_DECAY_RATE", solver.LR_DECAY_RATE > 0, "above 0"),
        ("SOLVER.MOMENTUM", 0 <= solver.MOMENTUM < 1, "in [0, 1)"),
        ("SOLVER.WEIGHT_DECAY", solver.WEIGHT_DECAY >= 0, "at least 0"),
        ("SOLVER.L2SP", solver.L2SP >= 0, "at least 0"),
        ("SOLVER.EMA", 0 <= solver.EMA < 1, "in [0, 1)"),
        ("DISTILLER.FREEZE", all(isinstance(each, str) for each in cfg.DISTILLER.FREEZE), "a list of names"),
        ("SOLVER.SEED", 0 <= solver.SEED < 2**32, "from 0 to below 2^32"),
        ("SOLVER.PRECISION", solver.PRECISION in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
        *key_checks(cfg.DSKD),
        ("DSKD.PAIRS", all(_is_pair(pair) for pair in cfg.DSKD.PAIRS), "a list of [student layer, teacher layer]"),
        ("LOG.INTERVAL", cfg.LOG.INTERVAL >= 1, "at least 1"),
        ("LOG.TRACKERS", all(name in ("tensorboard", "wandb") for name in cfg.LOG.TRACKERS), "tensorboard and wandb"),
    ]
    values = leaves(cfg)
    for key, holds, expected in checks:
        if not holds:
            raise UserError(f"{where}: {key} = {_shown(values[key])}: expected {expected}")
    _validate_teachers(cfg.DISTILLER, where)


def _validate_teachers(distiller: CfgNode, where: str) -> None:
    names, places = distiller.TEACHERS, distiller.TEACHER_CKPTS
    given = f"{where}: DISTILLER.TEACHERS = {_shown(names)}"
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{given}: expected a list of networks")
    several = [name for name, method in METHODS.items() if method.takes_teachers]
    if names and distiller.TYPE not in several:
        raise UserError(
            f"{given}: {distiller.TYPE} takes one, as DISTILLER.TEACHER; several are for {' and '.join(several)}"
        )
    if names and (distiller.TEACHER or distiller.TEACHER_CKPT):
        raise UserError(f"{given}: stands in place of DISTILLER.TEACHER and TEACHER_CKPT; set those to ''")
    if len(places) not in (0, len(names)) or not all(isinstance(place, str) for place in places):
        raise UserError(
            f"{where}: DISTILLER.TEACHER_CKPTS = {_shown(places)}: expected a folder for each of the {len(names)} "
            "DISTILLER.TEACHERS, or none"
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)
