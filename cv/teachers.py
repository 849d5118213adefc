"""Trained teachers: found by an explicit folder, or by name among the shipped and the user's own."""

from pathlib import Path

from yacs.config import CfgNode

from common.errors import UserError
from cv.config import ROOT, repository_path
from cv.export import load_model
from cv.models import Network, build_model


def find_teacher(cfg: CfgNode) -> Path:
    """Folder with model.json and model.safetensors of `DISTILLER.TEACHER`.

    Looks at `DISTILLER.TEACHER_CKPT` if it is given; otherwise at resources/teachers/<dataset>/<name>, then at
    outputs/<dataset>/teacher_<name>/*/student, where configs/<dataset>/teacher/<name>.yaml leaves it.

    Raises:
        UserError: it is not there; the message has the command that trains it.
    """
    name, dataset = cfg.DISTILLER.TEACHER, cfg.DATASET.NAME
    if cfg.DISTILLER.TEACHER_CKPT:
        return repository_path(cfg.DISTILLER.TEACHER_CKPT)
    places = [ROOT / "resources" / "teachers" / dataset / name]
    places += sorted((ROOT / "outputs" / dataset / f"teacher_{name}").glob("*/student"))
    for place in places:
        if (place / "model.json").is_file():
            return place
    config = f"configs/{dataset}/teacher/{name}.yaml"
    if (ROOT / config).is_file():
        command = f"python cv/train_svd.py --cfg {config}"
    else:
        command = f"python cv/train_svd.py --cfg <a config> DISTILLER.TYPE vanilla DISTILLER.STUDENT {name}"
    raise UserError(f"no trained {name} for {dataset}; train it with `{command}`, or set DISTILLER.TEACHER_CKPT")


def load_teacher(cfg: CfgNode, num_classes: int, in_channels: int) -> Network:
    """The trained teacher in eval mode.

    Raises:
        UserError: no name, no checkpoint, another architecture or number of classes than asked for.
    """
    name = cfg.DISTILLER.TEACHER
    if not name:
        raise UserError(f"DISTILLER.TYPE {cfg.DISTILLER.TYPE} (or DSKD) needs DISTILLER.TEACHER, the network to distil")
    build_model(name, num_classes, in_channels)  # refuses an unknown name before a folder is looked for
    folder = find_teacher(cfg)
    teacher, info = load_model(folder)
    for key, expected in (("architecture", name), ("num_classes", num_classes), ("in_channels", in_channels)):
        if info[key] != expected:
            raise UserError(f"{folder}: the checkpoint's {key} is {info[key]!r}, this run needs {expected!r}")
    return teacher
