"""The output folder of a run: whether it may be written to, holding it, and making room in it."""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_of_theseus.arguments import build_parser
from common.run.errors import UserError
from common.run.files import check_writable, remove_leftovers, write_json
from common.run.lock import LOCK, check_unlocked, locked
from common.run.reading import read_json, reading

# what a run writes, and what --overwrite_output_dir therefore may remove
_WRITTEN = ("checkpoint-*", "student", "student_best", "predecessor", "predictions", "runs", "metrics.jsonl")
_WRITTEN += ("directions.jsonl", "confusion.json", "config.json", "result.json", "evaluation.json")
_EARLIER = ".earlier-run"  # where an earlier run waits until the new one has something complete
_READ = ("model_name_or_path", "data_dir", "train_file", "dev_file", "test_file", "cache_dir")
# what a resumed run may be given otherwise than the run that it continues
_FREE_ON_RESUME = ("resume", "overwrite_output_dir", "output_dir", "data_dir", "cache_dir", "do_predict", "test_file")
_FREE_ON_RESUME += ("per_gpu_eval_batch_size", "save_total_limit", "report_to", "disable_tqdm", "torch_compile")
_FREE_ON_RESUME += ("probabilities",)


def check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Refuse an output folder that cannot be used, before anything is read or removed.

    Raises:
        UserError: it cannot be written to; another run works in it; it is in use; what `--overwrite_output_dir` would
            remove is no run's, or is what the run is to read; it has no run, a broken one, or that of other settings,
            for `--resume` to continue.
    """
    check_writable("--output_dir", folder)
    with reading(folder):
        check_unlocked("--output_dir", folder)
        if args.do_train and args.overwrite_output_dir:
            _check_inputs_stay(folder, args)
            _check_is_a_run(folder)
        if args.resume:
            before, parser = _settings_before(folder), build_parser()
            for name, value in vars(args).items():
                earlier = before.get(name, parser.get_default(name))  # the run may be older than the flag
                if name not in _FREE_ON_RESUME and value != earlier:
                    raise UserError(f"--resume: the run in {folder} has {name} {earlier}, not {value}")
        _check_unused(folder, args)


class ClaimedFolder:
    """The output folder while the run holds it.

    An earlier run lies aside in it until `keep` says that the new one has something complete. Its config.json goes
    there last and comes back first: where only a part had been moved when the program was killed, it is not there.
    """

    def __init__(self, folder: Path):
        self._folder, self._aside = folder, folder / _EARLIER

    @property
    def has_earlier(self) -> bool:
        return self._aside.exists()

    def move_earlier_aside(self) -> None:
        written = _earlier_run(self._folder)
        if (self._aside / "config.json").exists():  # of a run that was killed before it had anything complete
            _remove(written)
        elif written:
            self._aside.mkdir(exist_ok=True)
            for path in sorted(written, key=lambda path: path.name == "config.json"):
                os.replace(path, self._aside / path.name)

    def keep(self) -> None:
        """The new run has a checkpoint: the earlier one goes."""
        shutil.rmtree(self._aside, ignore_errors=True)

    def put_back(self) -> None:
        """The new run has nothing: the earlier one returns to its place, if there is one."""
        if self.has_earlier:
            _remove(_earlier_run(self._folder))
            for path in sorted(self._aside.iterdir(), key=lambda path: path.name != "config.json"):
                os.replace(path, self._folder / path.name)
            self._aside.rmdir()
            print(f"the earlier run in {self._folder} is back in its place: the new one had no checkpoint", flush=True)


@contextmanager
def claimed(folder: Path, args: argparse.Namespace) -> Iterator[ClaimedFolder]:
    """Hold the folder; only now, with data and model read and tried, is an earlier run moved aside."""
    with locked("--output_dir", folder):
        _check_unused(folder, args)  # another run may have come and gone since
        remove_leftovers(folder)
        claim = ClaimedFolder(folder)
        try:
            if args.do_train:
                if args.overwrite_output_dir:
                    claim.move_earlier_aside()
                write_json(folder / "config.json", vars(args))  # before the predecessor trains, for --resume to find
            yield claim
        except BaseException:
            if args.overwrite_output_dir:
                claim.put_back()
            raise
        if args.do_train:
            claim.keep()


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _earlier_run(folder: Path) -> list[Path]:
    return [path for pattern in _WRITTEN for path in folder.glob(pattern)]


def _check_unused(folder: Path, args: argparse.Namespace) -> None:
    if args.do_train and not args.overwrite_output_dir and not args.resume and folder.exists():
        found = [path.name for path in folder.iterdir() if path.name != LOCK]
        if found:
            raise UserError(f"--output_dir {folder} is in use; give another, --overwrite_output_dir or --resume")


def _check_is_a_run(folder: Path) -> None:
    """What has the names that a run writes is a run's only beside the config.json of one."""
    written = _earlier_run(folder)
    if not written:
        return
    config = folder / "config.json"
    try:
        is_ours = {"task_name", "output_dir", "method"} <= read_json(config).keys()
    except UserError:
        is_ours = False
    if not is_ours:
        raise UserError(
            f"--overwrite_output_dir would remove {written[0]}, but {folder} has no config.json of a run of this "
            "program; give another folder, or remove it yourself"
        )


def _settings_before(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"--resume: there is no run in {folder} to continue")
    try:
        return read_json(path)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # nothing is known about the run: no advice to replace it
            raise UserError(f"--resume: {error}") from error
    raise UserError(
        f"--resume: {path} does not hold the settings of a run; remove it and start again with --overwrite_output_dir"
    )


def _check_inputs_stay(folder: Path, args: argparse.Namespace) -> None:
    removed = [path.resolve() for path in _earlier_run(folder)]
    for name in _READ:
        path = Path(getattr(args, name) or "")
        if name == "model_name_or_path":
            path /= "config.json"  # an earlier run's has the same name
        if getattr(args, name) and path.exists() and any(path.resolve().is_relative_to(gone) for gone in removed):
            raise UserError(f"--overwrite_output_dir would remove --{name} {getattr(args, name)}; give another folder")
