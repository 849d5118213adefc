"""The DSKD loss of a student and teacher network: which layers pair up, and the loss from the configuration."""

from collections import Counter

from torch import Tensor, nn
from yacs.config import CfgNode

from common.pairing import expand_patterns, pair_weights
from common.run.errors import UserError
from common.svd_loss import DirectionSensitivityLoss
from cv.blocks import paired_blocks


def layer_pairs(student: nn.Module, teacher: nn.Module, settings: CfgNode) -> list[tuple[str, Tensor, Tensor]]:
    """(student layer, its weight, the teacher's weight) by `DSKD.PAIRS` or, if that is empty, block by block."""
    return pair_weights(
        student, teacher, layer_map(student, teacher, settings), skip_mismatched=settings.SKIP_MISMATCHED
    )


def layer_map(student: nn.Module, teacher: nn.Module, settings: CfgNode) -> list[tuple[str, str]]:
    """Names of the paired layers, (student's, teacher's).

    Raises:
        UserError: a pattern without a match, or a student layer that is named twice.
    """
    if not settings.PAIRS:
        return block_map(student, teacher)
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


def build_dskd(student: nn.Module, teacher: nn.Module, settings: CfgNode) -> DirectionSensitivityLoss:
    """The loss that `cfg.DSKD` describes."""
    return DirectionSensitivityLoss(
        layer_pairs(student, teacher, settings),
        rank=settings.RANK,
        svd_steps=settings.SVD_STEPS,
        basis=settings.BASIS,
        grad_steps=settings.GRAD_STEPS,
        drift=settings.DRIFT,
        smoothing=settings.SMOOTHING,
        driver=settings.DRIVER,
        direction=settings.DIRECTION,
        alpha=None if settings.ALPHA == -1 else settings.ALPHA,
        score=settings.SCORE,
        span=settings.SPAN,
    )
