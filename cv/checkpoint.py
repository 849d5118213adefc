"""The checkpoint of a vision run: sealed when it is written, checked against its seal and the run when it is read."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from common.run.errors import UserError
from common.run.reading import reading
from common.run.record import check_circumstances
from cv.config import defaults, leaves
from cv.data import ImageSet
from cv.methods import Distiller

# what a resumed run may change; LOG.*, too
_FREE_ON_RESUME = ("OUTPUT_DIR", "DATASET.ROOT", "DISTILLER.TEACHER_CKPT", "DISTILLER.STUDENT_CKPT", "SOLVER.EPOCHS")
_FREE_ON_RESUME += ("DISTILLER.TEACHER_CKPTS", "SOLVER.COMPILE", "SOLVER.DETERMINISTIC")
_RESTART = "start again with --overwrite"


def weights(distiller: Distiller) -> dict[str, Tensor]:
    """All of a method's tensors but the teachers', which come from their own folders again."""
    left_out = ("teacher.", "more_teachers.")
    return {name: value for name, value in distiller.state_dict().items() if not name.startswith(left_out)}


def load_weights(distiller: Distiller, saved: Mapping[str, Tensor]) -> None:
    """Load what `weights` gave; a tensor that is missing, too many or of another shape is a ValueError."""
    for name, value in (expected := weights(distiller)).items():
        if name not in saved or saved[name].shape != value.shape:
            raise ValueError(f"its weight {name} is missing or has another shape")
    if more := [name for name in saved if name not in expected]:
        raise ValueError(f"its weight {more[0]} is none of this run's networks")
    distiller.load_state_dict(dict(saved), strict=False)  # all but the teacher


def fingerprint(value: Any) -> str:
    """SHA-256 of nested dictionaries, lists, tensors, numbers, texts and sets of images, as [images, labels]."""
    digest = hashlib.sha256()

    def add_values(each: Tensor) -> None:
        flat = each.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")

    def add(each: Any) -> None:
        if isinstance(each, Tensor):
            digest.update(f"{each.dtype}{tuple(each.shape)}".encode())
            add_values(each)
        elif isinstance(each, ImageSet):
            digest.update(f"[{each.images.dtype}{(len(each), *each.images.shape[1:])}".encode())
            for part in each.parts():
                add_values(part)
            add(each.labels)
            digest.update(b"]")
        elif isinstance(each, Mapping):
            for key, entry in each.items():
                digest.update(f"{key!r}:".encode())
                add(entry)
        elif isinstance(each, list | tuple):
            digest.update(b"[")
            for entry in each:
                add(entry)
            digest.update(b"]")
        else:
            digest.update(f"{each!r};".encode())

    add(value)
    return digest.hexdigest()


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the fingerprint of its contents, which torch.load does not check."""
    return {**state, "sha256": fingerprint(state)}


def read_whole(paths: Sequence[Path]) -> tuple[Path, dict[str, Any], list[str]]:
    """(the first of a run's checkpoints that is whole, its state, what is to be said of those passed over).

    Args:
        paths: the newest first.

    Raises:
        UserError: none is, with what is wrong with the newest that is there; one cannot be read.
    """
    errors = []
    for path in filter(Path.exists, paths):
        try:
            return path, read(path), [f"{error}; {path.name} is used instead" for error in errors]
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # it may be whole: no other one takes its place
                raise
            errors.append(str(error).removesuffix(f"; {_RESTART}"))
    raise UserError(f"{errors[0]}; {_RESTART}")


def read(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that is as it was written.

    Raises:
        UserError: it cannot be read, is none, or is damaged.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:  # nothing is known about the run: no advice to replace it
        raise UserError(f"--resume: {path} cannot be read: {error.strerror or error}") from error
    except Exception:  # of a file that is no checkpoint torch raises whatever its bytes lead to
        state = None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise UserError(f"--resume: {path} is not the checkpoint of a run; {_RESTART}")
    seal = state.pop("sha256", None)  # older ones have none
    if seal is not None and seal != fingerprint(state):
        raise UserError(f"--resume: {path} is damaged: its contents are not as they were written; {_RESTART}")
    return state


def restoring(path: Path) -> AbstractContextManager[None]:
    """What goes wrong inside is the checkpoint's fault."""
    return reading(f"--resume: {path}", "the checkpoint of this run")


def check(
    path: Path,
    state: Mapping[str, Any],
    cfg: CfgNode,
    circumstances: Mapping[str, int],
    teacher_sha256: str | None,
    data_sha256: Callable[[], str],
) -> None:
    """Refuse to resume with other settings, processes, images or teacher than the checkpoint was written with."""
    with restoring(path):
        before = leaves(defaults()) | leaves(CfgNode(state["config"]))  # a setting that is new since: its default
    for key, value in leaves(cfg).items():
        if value != before[key] and key not in _FREE_ON_RESUME and not key.startswith("LOG."):
            raise UserError(
                f"--resume: {path} was written with {key} = {before[key]!r}, and {value!r} is asked for now"
            )
    if cfg.SOLVER.SCHEDULE == "cosine" and before["SOLVER.EPOCHS"] != cfg.SOLVER.EPOCHS:
        raise UserError(
            f"--resume: {path} was written with SOLVER.EPOCHS = {before['SOLVER.EPOCHS']}, on which the cosine "
            f"schedule depends, and {cfg.SOLVER.EPOCHS} is asked for now"
        )
    check_circumstances(path, state.get("circumstances", {}), circumstances)
    if state.get("teacher_sha256", teacher_sha256) != teacher_sha256:
        if cfg.DISTILLER.TEACHERS:
            raise UserError(
                f"--resume: {path} was written with other teachers; give their folders as DISTILLER.TEACHER_CKPTS"
            )
        raise UserError(
            f"--resume: {path} was written with another {cfg.DISTILLER.TEACHER} as teacher; give its folder as "
            "DISTILLER.TEACHER_CKPT"
        )
    if "data_sha256" in state and state["data_sha256"] != data_sha256():
        raise UserError(
            f"--resume: {path} was written with other training images or labels than those of DATASET.ROOT "
            f"{cfg.DATASET.ROOT}; give that folder as it was, or {_RESTART}"
        )
