"""Module replacing as it became when torch's `zero_grad` began to leave None: the trap of docs/deviations.md.

    python scripts/missing_gradients.py --missing none FLAGS_OF_run_glue_SVD_losslayer.py
    python scripts/reproduce.py theseus_details --set data=data/glue

An earlier run in the output folder is replaced, unless --resume continues it.
"""

import argparse

import _paths  # noqa: F401
from torch import Tensor

from bert_of_theseus.arguments import parse_arguments
from common.run.errors import Parser, run_cli
from common.torchvision_repair import repair_torchvision


class NoGradients:
    """In the place of the function that gives zero gradients to successor layers that were not sampled."""

    @staticmethod
    def apply(loss: Tensor, *_: Tensor) -> Tensor:
        return loss if loss.requires_grad else loss.requires_grad_()  # where no layer was sampled there is no graph


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--missing", choices=("zero", "none"), required=True, help="gradient of a successor layer that was not sampled"
    )
    ours, words = parser.parse_known_args()
    args = parse_arguments(words if "--resume" in words else [*words, "--overwrite_output_dir"])
    repair_torchvision()
    from bert_of_theseus import modeling, pipeline

    if ours.missing == "none":
        modeling._ZeroGradients = NoGradients
    pipeline.run(args)


if __name__ == "__main__":
    run_cli(main)
