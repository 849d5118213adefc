"""The DSKD loss of a student and teacher network: which layers pair up, and the loss from the configuration."""

from collections import Counter

from torch import Tensor, nn
from yacs.config import CfgNode

from common.run.errors import UserError, user_errors
from common.settings import of_keys
from common.svd_loss import DirectionSensitivityLoss, build_loss
from cv.blocks import paired_blocks
from dskd.pairing import expand_patterns, pair_weights


def layer_pairs(student: nn.Module, teacher: nn.Module, settings: CfgNode) -> list[tuple[str, Tensor, Tensor]]:
    """(student layer, its weight, the teacher's weight) by `DSKD.PAIRS` or, if that is empty, block by block."""
    names = layer_map(student, teacher, settings)
    with user_errors():
        return pair_weights(
            student,
            teacher,
            names,
            skip_mismatched=settings.SKIP_MISMATCHED,
            any_shape=settings.BASIS == "spectrum",
        )


def layer_map(student: nn.Module, teacher: nn.Module, settings: CfgNode) -> list[tuple[str, str]]:
    """Names of the paired layers, (student's, teacher's).

    Raises:
        UserError: a pattern without a match, or a student layer that is named twice.
    """
    if not settings.PAIRS:
        return block_map(student, teacher)
    with user_errors():
        names = expand_patterns(student, settings.PAIRS)
    for name, times in Counter(ours for ours, _ in names).items():
        if times > 1:
            raise UserError(f"DSKD.PAIRS names the student's layer {name} {times} times; one teacher layer each")
    return names


def block_map(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """conv1 and conv2 of every residual block, stage by stage, as `paired_blocks` pairs them.

    Raises:
        UserError: networks that do not pair up block by block.
    """
    try:
        blocks = paired_blocks(student, teacher)
    except UserError as error:
        raise UserError(f"{error}; name the layer pairs in DSKD.PAIRS") from None
    return [(f"{ours}.{name}", f"{theirs}.{name}") for ours, theirs in blocks for name in ("conv1", "conv2")]


def build_dskd(pairs: list[tuple[str, Tensor, Tensor]], settings: CfgNode, seed: int) -> DirectionSensitivityLoss:
    """The loss that `cfg.DSKD` describes, of pairs from `layer_pairs`; `seed` is for controls that draw at random."""
    return build_loss(pairs, of_keys(settings), seed)
