"""Trained networks: teachers, by a folder or by name among the user's own and the shipped; a student's start."""

import hashlib
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode

from common import ROOT
from common.run.errors import UserError
from common.run.reading import read_safetensors
from cv.config import repository_path
from cv.export import load_model
from cv.models import LibraryNetwork, Network, build_model


class Teacher(NamedTuple):
    """A trained teacher in eval mode.

    Attributes:
        sha256: of its weights' file.
        line: its folder and accuracy.
        notes: what the user should know of it.
    """

    network: Network
    sha256: str
    line: str
    notes: tuple[str, ...] = ()


def find_teacher(cfg: CfgNode) -> Path:
    """Folder with model.json and model.safetensors of `DISTILLER.TEACHER`.

    Looks at `DISTILLER.TEACHER_CKPT` if it is given; otherwise at outputs/<dataset>/teacher_<name>/*/student, where
    configs/<dataset>/teacher/<name>.yaml leaves it, then at resources/teachers/<dataset>/<name>: a teacher that the
    user trained comes before the small shipped one.

    Raises:
        UserError: it is not there; the message has the command that trains it.
    """
    name, dataset = cfg.DISTILLER.TEACHER, cfg.DATASET.NAME
    if cfg.DISTILLER.TEACHER_CKPT:
        return repository_path(cfg.DISTILLER.TEACHER_CKPT)
    places = sorted((ROOT / "outputs" / dataset / f"teacher_{name}").glob("*/student"))
    places.append(ROOT / "resources" / "teachers" / dataset / name)
    for place in places:
        if (place / "model.json").is_file():
            return place
    raise UserError(f"no trained {name} for {dataset}; train it with `{_command(cfg)}`, or set DISTILLER.TEACHER_CKPT")


def _command(cfg: CfgNode) -> str:
    """The command, from the repository's root, after which `find_teacher` finds the teacher."""
    name, data = cfg.DISTILLER.TEACHER, cfg.DATASET
    words = ["python", "cv/train_svd.py", "--cfg", f"configs/{data.NAME}/teacher/{name}.yaml"]
    if not (ROOT / words[-1]).is_file():
        words[-1] = "configs/demo/base.yaml" if data.NAME == "digits" else "configs/cifar100/base.yaml"
        words += ["DISTILLER.STUDENT", name, "OUTPUT_DIR", f"outputs/{data.NAME}/teacher_{name}/seed1"]
        if data.NAME != "digits":
            words += ["DATASET.NAME", data.NAME, "DATASET.ROOT", data.ROOT, "DATASET.IMAGE_SIZE", str(data.IMAGE_SIZE)]
    return shlex.join(words)


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights of a saved network."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def load_teacher(
    cfg: CfgNode, num_classes: int, in_channels: int, classes: list[str] | None = None, *, by_class: bool = False
) -> Teacher:
    """The trained teacher of a run.

    Args:
        classes: names of the data set's classes, if they are known.
        by_class: whether the method compares the two networks class by class.

    Raises:
        UserError: no name, no checkpoint, another architecture or number of classes than asked for, other classes
            where they are compared, or one that has seen the images that this run holds out.
    """
    name = cfg.DISTILLER.TEACHER
    if not name:
        raise UserError(
            f"DISTILLER.TYPE {cfg.DISTILLER.TYPE} (or DSKD, or START teacher) needs DISTILLER.TEACHER, the network to "
            "distil"
        )
    build_model(name, num_classes, in_channels)  # refuses an unknown name before a folder is looked for
    folder = find_teacher(cfg)
    teacher, info = load_model(folder)
    for key, expected in (("architecture", name), ("num_classes", num_classes), ("in_channels", in_channels)):
        if info[key] != expected:
            raise UserError(f"{folder}: the checkpoint's {key} is {info[key]!r}, this run needs {expected!r}")
    held_out, left_out = cfg.DATASET.HELD_OUT, info.get("held_out", 0)
    if held_out and left_out != held_out:
        raise UserError(
            f"DATASET.HELD_OUT {held_out}: {folder} was trained with {left_out}, so that it has seen images that this "
            f"run would be tested on; train a {name} with DATASET.HELD_OUT {held_out}, and give it as "
            "DISTILLER.TEACHER_CKPT"
        )
    accuracy = f", top-1 {info['accuracy']:.2f}" if info.get("accuracy") is not None else ""
    accuracy += " on held-out images" if accuracy and left_out else ""
    notes = _data_notes(cfg, folder, info, classes, by_class)
    return Teacher(teacher, weights_hash(folder), f"{name} of {folder}{accuracy}", notes)


def _data_notes(
    cfg: CfgNode, folder: Path, info: dict[str, Any], classes: list[str] | None, by_class: bool
) -> tuple[str, ...]:
    """Of a teacher of other data: an error where its classes are compared, a note otherwise."""
    theirs = info.get("class_names")
    for number, (found, expected) in enumerate(zip(theirs or (), classes or (), strict=False)):
        if found != expected:
            told = f"{folder}: class {number} of the teacher is {found!r}, of this data set {expected!r}"
            if by_class:
                raise UserError(
                    f"{told}, and {cfg.DISTILLER.TYPE} compares the two networks class by class; train a "
                    f"{cfg.DISTILLER.TEACHER} on this data set, and give it as DISTILLER.TEACHER_CKPT"
                )
            return (told,)
    dataset = info.get("dataset") or cfg.DATASET.NAME
    if dataset != cfg.DATASET.NAME:
        return (f"{folder}: the teacher was trained on {dataset}, this run is on {cfg.DATASET.NAME}",)
    return ()


def load_student(cfg: CfgNode, student: Network) -> tuple[str, ...]:
    """Let a student of a library start from `DISTILLER.STUDENT_CKPT`, weights by the library's names; gives notes.

    A classifier for other classes is left as it is.

    Raises:
        UserError: the file cannot be read, or does not fit the network; the first difference is named.
    """
    if not cfg.DISTILLER.STUDENT_CKPT:
        return ()
    if not isinstance(student, LibraryNetwork):
        raise UserError(
            "DISTILLER.STUDENT_CKPT is for students of timm and torchvision; see DISTILLER.START for others"
        )
    file, name = repository_path(cfg.DISTILLER.STUDENT_CKPT), cfg.DISTILLER.STUDENT
    found, expected = read_safetensors(file), student.net.state_dict()
    head = [key for key in expected if key.startswith(student.classifier_name)]
    left = [key for key in head if key in found and found[key].shape != expected[key].shape]
    for key in [*expected, *found]:
        ours, theirs = (tuple(each[key].shape) if key in each else "absent" for each in (expected, found))
        if ours != theirs and key not in left:
            raise UserError(
                f"DISTILLER.STUDENT_CKPT {file} is not a {name}: {key} is {theirs} in it, {ours} in the network"
            )
    student.net.load_state_dict({**found, **{key: expected[key] for key in left}})
    begins = f"{name} starts from {file}"
    return (f"{begins}, its classifier from random weights, as the classes are others" if left else begins,)
