"""The output folder of a run: whether it may be written to, and making room in it."""

import argparse
import json
import shutil
from pathlib import Path

from common.errors import UserError
from common.files import write_json

# what a run writes, and what --overwrite_output_dir therefore may remove
_WRITTEN = ("checkpoint-*", "student", "student_best", "predecessor", "predictions", "runs", "metrics.jsonl")
_WRITTEN += ("directions.jsonl", "config.json", "result.json", "evaluation.json")
# what a resumed run may be given otherwise than the run that it continues
_FREE_ON_RESUME = ("resume", "overwrite_output_dir", "output_dir", "data_dir", "cache_dir", "do_predict", "test_file")
_FREE_ON_RESUME += ("per_gpu_eval_batch_size", "save_total_limit", "report_to", "disable_tqdm", "torch_compile")


def check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Refuse an output folder in use, or one without the run that `--resume` is to continue (UserError)."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    if args.resume:
        if not (folder / "config.json").exists():
            raise UserError(f"--resume: there is no run in {folder} to continue")
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, value in vars(args).items():
            if name not in _FREE_ON_RESUME and value != before.get(name):
                raise UserError(f"--resume: the run in {folder} has {name} {before.get(name)}, not {value}")
    elif args.do_train and not args.overwrite_output_dir and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} is in use; give another, --overwrite_output_dir or --resume")


def claim_folder(folder: Path, args: argparse.Namespace) -> None:
    """Only now, with data and model read, is an earlier run removed."""
    if args.do_train and args.overwrite_output_dir:
        for pattern in _WRITTEN:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if args.do_train:
        write_json(folder / "config.json", vars(args))  # before the predecessor trains, for --resume to find
