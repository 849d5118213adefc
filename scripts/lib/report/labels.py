"""Names of several runs on one page: what tells them apart."""

from collections.abc import Sequence
from typing import Any

from scripts.lib.report.load import Run

# settings that say where things are, not what was run
_PLACES = (
    "OUTPUT_DIR",
    "DISTILLER.TEACHER_CKPT",
    "DISTILLER.TEACHER_CKPTS",
    "DATASET.ROOT",
    "output_dir",
    "data_dir",
    "overwrite_output_dir",
)
# settings that runs of different methods may differ in as well: in labels, in the vision pipeline, in the text pipeline
_TOLD = {
    "student": ("DISTILLER.STUDENT", ""),
    "subset": ("DATASET.SUBSET", ""),
    "held out": ("DATASET.HELD_OUT", ""),
    "layers": ("", "num_successor_layers"),
    "epochs": ("SOLVER.EPOCHS", "num_train_epochs"),
    "steps": ("", "max_steps"),
    "batch size": ("SOLVER.BATCH_SIZE", "per_gpu_train_batch_size"),
    "learning rate": ("SOLVER.LR", "learning_rate"),
}
_TOLD_OF_DSKD = {
    "lambda": ("DSKD.LAMBDA", "lambda_size"),
    "rank": ("DSKD.RANK", "rank_size"),
    "SVD steps": ("DSKD.SVD_STEPS", "svd_steps"),
}


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each of several runs: method, seed, and what else is different in training.

    Where these agree, all settings that differ.
    """
    tasks = {run.task for run in runs}
    names = [f"{run.task}: " * (len(tasks) > 1) + f"{run.method}, seed {run.seed}" for run in runs]

    def tell(word: str, values: dict[int, Any]) -> None:
        if len(set(map(repr, values.values()))) > 1:
            for i, value in values.items():
                names[i] += "" if value is None else f", {word} {value}"

    for word, keys in (_TOLD | _TOLD_OF_DSKD).items():
        told = [(i, run) for i, run in enumerate(runs) if run.has_dskd or word in _TOLD]
        for task in tasks:
            tell(word, {i: run.setting(*keys) for i, run in told if run.task == task})
    for name in {name for name in names if names.count(name) > 1}:
        alike = [i for i, other in enumerate(names) if other == name]
        for key in dict.fromkeys(key for i in alike for key in runs[i].settings if key not in _PLACES):
            tell(key, {i: runs[i].settings.get(key) for i in alike})
    return [name + f" [{run.folder}]" * (names.count(name) > 1) for run, name in zip(runs, names, strict=True)]


def without_dskd(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run that differs from this one in DSKD alone, as far as labels tell; none for a run without DSKD."""
    return next((other for other in runs if run.has_dskd and not other.has_dskd and _rest(other) == _rest(run)), None)


def _rest(run: Run) -> list[Any]:
    keys = [("DISTILLER.TYPE", "method"), ("DISTILLER.START", ""), *_TOLD.values()]
    return [run.task, run.seed, *(run.setting(*names) for names in keys)]
