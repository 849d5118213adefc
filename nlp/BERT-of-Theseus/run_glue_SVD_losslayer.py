"""Compress a BERT on a GLUE task by module replacing, with or without DSKD; `--help` explains every flag."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bert_of_theseus.arguments import parse_arguments
from common.run.errors import run_cli
from common.run.imports import uncollected
from common.run.processes import said_once
from common.run.restarts import resumes_after_restart


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.do_train and not args.overwrite_output_dir:
        args.resume = args.resume or resumes_after_restart(Path(args.output_dir))
    with uncollected():
        from common.torchvision_repair import repair_torchvision

        repair_torchvision()
        from bert_of_theseus.pipeline import run

    run(args)


if __name__ == "__main__":
    run_cli(said_once(main))
