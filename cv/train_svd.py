"""Distil an image classifier, with or without DSKD, as a YAML config says.

    python train_svd.py --cfg configs/cifar100/svd/expkd/res56_res20.yaml [--resume | --overwrite] [KEY VALUE ...]

Every KEY is explained in cv/config.py and in the files under configs/.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.run.errors import Parser, UserError, run_cli
from common.run.imports import uncollected
from common.run.processes import said_once
from common.run.restarts import resumes_after_restart


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file, from here or the repository's root")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR from its checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUTPUT_DIR")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    if args.resume and args.overwrite:
        raise UserError("--resume continues the run that --overwrite would replace; give one of them")
    with uncollected():
        from common.torchvision_repair import repair_torchvision

        repair_torchvision()
        from cv.allocator import keep_freed_memory
        from cv.config import load_config
        from cv.trainer import output_folder, train

    keep_freed_memory()
    cfg = load_config(args.cfg, args.overrides)
    resume = args.resume or (not args.overwrite and resumes_after_restart(output_folder(cfg)))
    train(cfg, resume=resume, overwrite=args.overwrite)


if __name__ == "__main__":
    run_cli(said_once(main))
