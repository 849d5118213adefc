"""What few-sample training is usually regularised by, beside DSKD: L2-SP, averaged weights, frozen layers."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.run.errors import UserError
from common.run.suggest import nearest


class StartingPoint:
    """L2-SP (Li, Grandvalet and Davoine, ICML 2018): strength / 2 * ||w - w_0||^2 over all trained parameters.

    w_0 is where the parameters are when this is made: what a student has copied from its teacher.
    """

    def __init__(self, network: nn.Module, strength: float) -> None:
        self.strength = strength
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.parameters]

    def __call__(self) -> Tensor:
        gaps = torch._foreach_sub(self.parameters, self.start)
        return self.strength / 2 * torch.stack([gap.square().sum() for gap in gaps]).sum()


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """A running mean of a network's weights and batch statistics, to be updated after every step."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).requires_grad_(False)


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Leave parameters as they start; the running statistics of batch norm follow the images all the same.

    Args:
        patterns: of parameter names, `*` for any characters: "conv1.*", "layer1.*".

    Raises:
        UserError: a pattern that no parameter fits, or nothing left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern, names)
            raise UserError(
                f"DISTILLER.FREEZE: no parameter of the student is named {pattern}"
                + (f"; the nearest is {near}" if near else f"; they are named as {names[0]}")
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("DISTILLER.FREEZE: it leaves no parameter of the student to be trained")
