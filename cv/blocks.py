"""Residual blocks of a student beside those of its teacher, and a student that starts as a copy of them."""

import torch
from torch import nn

from common.run.errors import UserError, user_errors
from dskd.pairing import spread_evenly


def paired_blocks(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Names of (student block, teacher block), stage by stage, spread over the teacher's blocks (`spread_evenly`).

    Raises:
        UserError: a network without stages of residual blocks, or with another number of stages.
    """
    for role, network in (("student", student), ("teacher", teacher)):
        blocks = [block for stage in getattr(network, "stages", [()]) for block in stage] or [network]
        if not all(
            isinstance(getattr(block, name, None), nn.Conv2d) for block in blocks for name in ("conv1", "conv2")
        ):
            raise UserError(f"the {role} {type(network).__name__} has no stages of residual blocks")
    if len(student.stages) != len(teacher.stages):
        raise UserError(f"the student has {len(student.stages)} stages and the teacher {len(teacher.stages)}")
    with user_errors():
        return [
            (f"stages.{s}.{i}", f"stages.{s}.{k}")
            for s, (ours, theirs) in enumerate(zip(student.stages, teacher.stages, strict=True))
            for i, k in enumerate(spread_evenly(len(theirs), len(ours)))
        ]


@torch.no_grad()
def copy_from_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Let the student start as the teacher without some of its blocks, in place.

    Every block becomes a copy of its pair in `paired_blocks`, and what lies outside the stages (stem, classifier) a
    copy of the teacher's part of that name. As DistilBERT (Sanh et al., 2019) takes one of two layers of BERT.

    Raises:
        UserError: networks that do not pair up block by block, or a tensor whose shapes differ (it is named).
    """
    try:
        block_of = dict(paired_blocks(student, teacher))
    except UserError as error:
        raise UserError(f"DISTILLER.START teacher: {error}; use START random") from None
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        block = ".".join(name.split(".")[:3])
        source = block_of[block] + name.removeprefix(block) if block in block_of else name
        if source not in theirs or theirs[source].shape != tensor.shape:
            found = tuple(theirs[source].shape) if source in theirs else "missing"
            raise UserError(
                f"DISTILLER.START teacher: the student's {name} {tuple(tensor.shape)} cannot be copied from the "
                f"teacher's {source} ({found}); use START random"
            )
        tensor.copy_(theirs[source])
