"""Trained networks: teachers, by a folder or by name among the user's own and the shipped; a student's start."""

import hashlib
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from yacs.config import CfgNode

from common import ROOT
from common.run.errors import UserError
from common.run.reading import read_safetensors
from cv.checkpoint import fingerprint
from cv.config import repository_path
from cv.export import load_model
from cv.models import PUBLISHED, LibraryNetwork, Network, build_model, is_library
from cv.models.pretrained import AUXILIARY, published_normalisation, published_weights
from cv.normalisation import Normalisation

_FINE_TUNE = (
    "; fine-tune it on this data set first: train it as the student of vanilla, with its weights as "
    "DISTILLER.STUDENT_CKPT"
)


class Teacher(NamedTuple):
    """A trained teacher in eval mode.

    Attributes:
        sha256: of its weights' file, or of the weights where they come from a library.
        line: its folder and accuracy.
        normalisation: of the images that it was trained on, as far as that is known.
        accuracy: top-1 in percent, if its description says it.
        notes: what the user should know of it.
    """

    network: Network
    sha256: str
    line: str
    normalisation: Normalisation | None = None
    accuracy: float | None = None
    notes: tuple[str, ...] = ()


class Start(NamedTuple):
    """What a student starts from: notes for the user, and the normalisation of its weights if those are trained."""

    notes: tuple[str, ...] = ()
    normalisation: Normalisation | None = None


def each_teacher(cfg: CfgNode) -> list[CfgNode]:
    """The configuration as if each of `DISTILLER.TEACHERS` were the only one, or itself where there is one."""
    names, places = cfg.DISTILLER.TEACHERS, cfg.DISTILLER.TEACHER_CKPTS
    if not names:
        return [cfg]
    found = []
    for name, place in zip(names, places or [""] * len(names), strict=True):
        one = cfg.clone()
        one.DISTILLER.TEACHER, one.DISTILLER.TEACHER_CKPT = name, place
        found.append(one)
    return found


def _place_key(cfg: CfgNode) -> str:
    """The setting that gives a teacher's folder, for a message."""
    return "DISTILLER.TEACHER_CKPTS" if cfg.DISTILLER.get("TEACHERS") else "DISTILLER.TEACHER_CKPT"


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
        return repository_path(cfg.DISTILLER.TEACHER_CKPT)  # for a library's network a safetensors file, too
    places = sorted((ROOT / "outputs" / dataset / f"teacher_{name}").glob("*/student"))
    places.append(ROOT / "resources" / "teachers" / dataset / name)
    for place in places:
        if (place / "model.json").is_file():
            return place
    raise UserError(f"no trained {name} for {dataset}; train it with `{_command(cfg)}`, or set {_place_key(cfg)}")


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
    if is_library(name) and (cfg.DISTILLER.TEACHER_CKPT == PUBLISHED or folder.suffix == ".safetensors"):
        teacher, info, sha256 = _library_teacher(name, _place_key(cfg), cfg.DISTILLER.TEACHER_CKPT, in_channels)
    else:
        teacher, info = load_model(folder)
        sha256 = weights_hash(folder)
    for key, expected in (("architecture", name), ("num_classes", num_classes), ("in_channels", in_channels)):
        if info[key] != expected:
            advice = _FINE_TUNE if key == "num_classes" and is_library(name) else ""
            raise UserError(f"{folder}: the checkpoint's {key} is {info[key]!r}, this run needs {expected!r}{advice}")
    held_out, left_out = cfg.DATASET.HELD_OUT, info.get("held_out", 0)
    if held_out and left_out != held_out:
        raise UserError(
            f"DATASET.HELD_OUT {held_out}: {folder} was trained with {left_out}, so that it has seen images that this "
            f"run would be tested on; train a {name} with DATASET.HELD_OUT {held_out}, and give it as {_place_key(cfg)}"
        )
    accuracy = f", top-1 {info['accuracy']:.2f}" if info.get("accuracy") is not None else ""
    accuracy += " on held-out images" if accuracy and left_out else ""
    notes = _data_notes(cfg, folder, info, classes, by_class)
    line = f"{name} of {folder}{accuracy}"
    return Teacher(teacher, sha256, line, Normalisation.of(info), info.get("accuracy"), notes)


def _library_teacher(name: str, key: str, given: str, in_channels: int) -> tuple[Network, dict[str, Any], str]:
    """The network of a library's weights as they are, for the classes that these have; as `load_model`, and a hash."""
    weights, normalisation = _library_weights(key, given, name)
    head = f"{build_model(name, 1, in_channels).classifier_name}.weight"
    if head not in weights or weights[head].dim() != 2:
        raise UserError(f"{key} {given} is not a {name}: {head} is absent in it")
    teacher = build_model(name, len(weights[head]), in_channels)
    _fill(teacher, weights, f"{key} {given}", name)
    described = {"architecture": name, "num_classes": len(weights[head]), "in_channels": in_channels}
    return teacher.eval(), described | normalisation._asdict(), fingerprint(weights)


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
                    f"{cfg.DISTILLER.TEACHER} on this data set, and give it as {_place_key(cfg)}"
                )
            return (told,)
    dataset = info.get("dataset") or cfg.DATASET.NAME
    if dataset != cfg.DATASET.NAME:
        return (f"{folder}: the teacher was trained on {dataset}, this run is on {cfg.DATASET.NAME}",)
    return ()


def load_student(cfg: CfgNode, student: Network) -> Start:
    """Let a student of a library start from `DISTILLER.STUDENT_CKPT`: weights by the library's names, from a file, a
    saved network or the library itself.

    A classifier for other classes is left as it is.

    Raises:
        UserError: the weights cannot be read, or do not fit the network; the first difference is named.
    """
    given, name = cfg.DISTILLER.STUDENT_CKPT, cfg.DISTILLER.STUDENT
    if not given:
        return Start()
    if not isinstance(student, LibraryNetwork):
        raise UserError(
            "DISTILLER.STUDENT_CKPT is for students of timm and torchvision; see DISTILLER.START for others"
        )
    weights, normalisation = _library_weights("DISTILLER.STUDENT_CKPT", given, name)
    replaced = _fill(student, weights, f"DISTILLER.STUDENT_CKPT {given}", name, keep_head=True)
    source = "its published weights" if given == PUBLISHED else str(repository_path(given))
    begins = f"{name} starts from {source}, and images are normalised as for those: {normalisation}"
    if replaced:
        begins += "; its classifier starts from random weights, as the classes are others"
    return Start((begins,), normalisation)


def _library_weights(key: str, given: str, name: str) -> tuple[dict[str, Tensor], Normalisation]:
    """Weights of a library's network by the library's names, and the normalisation that they were trained with.

    key, given: the setting and its value: PUBLISHED, a safetensors file, or the folder of a saved network.
    """
    if given == PUBLISHED:
        return published_weights(name, key), published_normalisation(name)
    path = repository_path(given)
    if not path.is_dir():
        return read_safetensors(path), published_normalisation(name)
    network, info = load_model(path)
    if info["architecture"] != name:
        raise UserError(f"{key} {given} is not a {name}: its architecture is {info['architecture']!r}")
    return network.net.state_dict(), Normalisation.of(info) or published_normalisation(name)


def _fill(network: LibraryNetwork, found: dict[str, Tensor], where: str, name: str, *, keep_head: bool = False) -> bool:
    """Load weights by a library's names; whether the classifier was left as it is, which `keep_head` allows."""
    expected = network.net.state_dict()
    found = {key: value for key, value in found.items() if key in expected or not key.startswith(AUXILIARY)}
    head = [key for key in expected if key.startswith(network.classifier_name)]
    left = [key for key in head if keep_head and key in found and found[key].shape != expected[key].shape]
    for key in [*expected, *found]:
        ours, theirs = (tuple(each[key].shape) if key in each else "absent" for each in (expected, found))
        if ours != theirs and key not in left:
            raise UserError(f"{where} is not a {name}: {key} is {theirs} in it, {ours} in the network")
    network.net.load_state_dict({**found, **{key: expected[key] for key in left}})
    return bool(left)


def names_of_teachers(cfg: CfgNode, between: str) -> str:
    """Of the one that is distilled, or of all of them."""
    return cfg.DISTILLER.TEACHER or between.join(cfg.DISTILLER.TEACHERS)
