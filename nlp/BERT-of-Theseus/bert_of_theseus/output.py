"""The output folder of a run: whether it may be written to, and making room in it."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from bert_of_theseus.arguments import build_parser
from common.run.errors import UserError
from common.run.files import check_writable, write_json

# what a run writes, and what --overwrite_output_dir therefore may remove
_WRITTEN = ("checkpoint-*", "student", "student_best", "predecessor", "predictions", "runs", "metrics.jsonl")
_WRITTEN += ("directions.jsonl", "config.json", "result.json", "evaluation.json")
_READ = ("model_name_or_path", "data_dir", "train_file", "dev_file", "test_file", "cache_dir")
# what a resumed run may be given otherwise than the run that it continues
_FREE_ON_RESUME = ("resume", "overwrite_output_dir", "output_dir", "data_dir", "cache_dir", "do_predict", "test_file")
_FREE_ON_RESUME += ("per_gpu_eval_batch_size", "save_total_limit", "report_to", "disable_tqdm", "torch_compile")


def check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Refuse an output folder that cannot be used, before anything is read or removed.

    Raises:
        UserError: it cannot be written to; it is in use; the run is to read what `--overwrite_output_dir` removes; it
            has no run, a broken one, or that of other settings, for `--resume` to continue.
    """
    check_writable("--output_dir", folder)
    if args.do_train and args.overwrite_output_dir:
        _check_inputs_stay(folder, args)
    if args.resume:
        before, parser = _settings_before(folder), build_parser()
        for name, value in vars(args).items():
            earlier = before.get(name, parser.get_default(name))  # the run may be older than the flag
            if name not in _FREE_ON_RESUME and value != earlier:
                raise UserError(f"--resume: the run in {folder} has {name} {earlier}, not {value}")
    elif args.do_train and not args.overwrite_output_dir and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} is in use; give another, --overwrite_output_dir or --resume")


def claim_folder(folder: Path, args: argparse.Namespace) -> None:
    """Only now, with data and model read, is an earlier run removed."""
    if args.do_train and args.overwrite_output_dir:
        for path in _earlier_run(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if args.do_train:
        write_json(folder / "config.json", vars(args))  # before the predecessor trains, for --resume to find


def _earlier_run(folder: Path) -> list[Path]:
    return [path for pattern in _WRITTEN for path in folder.glob(pattern)]


def _settings_before(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"--resume: there is no run in {folder} to continue")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:  # nothing is known about the run: no advice to replace it
        raise UserError(f"--resume: {path} cannot be read: {error.strerror or error}") from error
    except ValueError:  # no JSON, or not UTF-8
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"--resume: {path} does not hold the settings of a run; start again with --overwrite_output_dir"
        )
    return settings


def _check_inputs_stay(folder: Path, args: argparse.Namespace) -> None:
    removed = [path.resolve() for path in _earlier_run(folder)]
    for name in _READ:
        path = Path(getattr(args, name) or "")
        if name == "model_name_or_path":
            path /= "config.json"  # an earlier run's has the same name
        if getattr(args, name) and path.exists() and any(path.resolve().is_relative_to(gone) for gone in removed):
            raise UserError(f"--overwrite_output_dir would remove --{name} {getattr(args, name)}; give another folder")
