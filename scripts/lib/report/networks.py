"""The exported student of a run and its teacher, read back as the pairs of weights that are aligned."""

from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn
from yacs.config import CfgNode

from common.run.errors import UserError
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
    return _of_images(run) if run.vision else _of_text(run)


def _of_images(run: Run) -> Pairs:
    from cv.dskd import layer_pairs
    from cv.export import load_model
    from cv.teachers import find_teacher, weights_hash

    cfg = CfgNode(run.config)
    folder = find_teacher(cfg)
    student, teacher = (load_model(each)[0] for each in (run.folder / "student", folder))
    recorded = (run.result or {}).get("teacher_sha256")  # older runs have none
    if recorded and weights_hash(folder) != recorded:
        raise UserError(f"{folder} is not the teacher that {run.folder.name} was distilled from")
    return layer_pairs(student, teacher, cfg.DSKD)


def _of_text(run: Run) -> Pairs:
    from bert_of_theseus.modeling import layer_pairs

    own = run.settings.get("finetune_predecessor")
    teacher = run.folder / "predecessor" if own else _local(str(run.settings["model_name_or_path"]), run)
    return layer_pairs(_encoder(run.folder / "student"), _encoder(teacher))


def _local(name: str, run: Run) -> Path:
    """Folder of a model given as one or by its hub name; nothing is downloaded, the hub is not even asked."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(name, "config.json", cache_dir=run.settings.get("cache_dir"))
    except ValueError:  # no hub name either
        config = None
    if not isinstance(config, str):
        raise UserError(f"{name} is neither a folder nor a model that has been downloaded to this machine")
    return Path(config).parent


def _encoder(folder: Path) -> nn.Module:
    """A transformers model without its head."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # of the head that is left out
    logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder} cannot be read as a transformers model: {reason}") from None
