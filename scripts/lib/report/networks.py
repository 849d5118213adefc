"""The exported student of a run and its teacher, read back as the pairs of weights that are aligned."""

from pathlib import Path

from torch import Tensor, nn
from yacs.config import CfgNode

from common.run.errors import UserError
from common.run.reading import read_json, reading
from scripts.lib.report.load import Run

Pairs = list[tuple[str, Tensor, Tensor]]


def has_networks(run: Run) -> bool:
    """Whether the run has left a student and names a teacher."""
    return bool(run.setting("DISTILLER.TEACHER", "model_name_or_path")) and (run.folder / "student").is_dir()


def weight_pairs(run: Run) -> Pairs:
    """(name, student weight, teacher weight) of every layer pair.

    Raises:
        UserError: the teacher is not on this machine or another one, or a network cannot be read or does not pair up.
    """
    with reading(run.folder, "a run whose networks can be compared"):
        return _of_images(run) if run.vision else _of_text(run)


def teacher_score(run: Run) -> float | None:
    """What the teacher of a vision run scores on the images that the run is tested on; None if no file says it."""
    if not (run.vision and has_networks(run)):
        return None
    try:
        with reading(run.folder, "a run whose teacher is known"):
            info = read_json(_teacher_of_images(run) / "model.json")
    except UserError:
        return None
    return info.get("accuracy") if info.get("held_out", 0) == run.settings.get("DATASET.HELD_OUT", 0) else None


def _of_images(run: Run) -> Pairs:
    from cv.dskd import layer_pairs
    from cv.export import load_model

    student, teacher = (load_model(folder)[0] for folder in (run.folder / "student", _teacher_of_images(run)))
    return layer_pairs(student, teacher, CfgNode(run.config).DSKD)


def _teacher_of_images(run: Run) -> Path:
    from cv.teachers import find_teacher, weights_hash

    folder = find_teacher(CfgNode(run.config))
    recorded = (run.result or {}).get("teacher_sha256")  # older runs have none
    if recorded and weights_hash(folder) != recorded:
        raise UserError(f"{folder} is not the teacher that {run.folder.name} was distilled from")
    return folder


def _of_text(run: Run) -> Pairs:
    from bert_of_theseus.modeling import layer_pairs

    own = run.settings.get("finetune_predecessor")
    teacher = run.folder / "predecessor" if own else _local(str(run.settings["model_name_or_path"]), run)
    return layer_pairs(_encoder(run.folder / "student"), _encoder(teacher))


def _local(name: str, run: Run) -> Path:
    """Folder of a model given as one or by its hub name; nothing is downloaded, the hub is not even asked."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, cache_dir=run.settings.get("cache_dir"), local_files_only=True))
    except (OSError, ValueError):
        raise UserError(f"{name} is neither a folder nor a model that has been downloaded to this machine") from None


def _encoder(folder: Path) -> nn.Module:
    """A transformers model without its head."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # of the head that is left out
    logging.disable_progress_bar()
    with reading(folder, "a transformers model"):
        return AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
