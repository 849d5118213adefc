"""What every network gives a distiller: logits, feature maps and the classifier's input, from one forward pass."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Features(NamedTuple):
    """The outcome of one forward pass of N images.

    logits: (N, classes).
    maps: (N, C, H, W) each, after the activation: the stem's, then one for the end of every stage. The last is ready
        for class-activation maps: its average over H and W is `pooled`.
    preacts: the same before the last ReLU, so that relu(preacts[i]) == maps[i]; equal to `maps` where there is no ReLU.
    pooled: (N, C), the input of `classifier`.
    """

    logits: Tensor
    maps: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]
    pooled: Tensor


class Network(nn.Module, ABC):
    """An image classifier: `features(x)` gives `Features`, `forward(x)` its logits; `classifier` is the last layer.

    ReLUs inside blocks are in place: a hook on a batch norm sees its output after the ReLU, and a full backward hook
    there is refused by torch.
    """

    classifier: nn.Linear

    @abstractmethod
    def features(self, x: Tensor) -> Features:
        """Classify images x (N, in_channels, H, W) and keep what distillers read."""

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).logits

    def classify(self, maps: list[Tensor], preacts: list[Tensor]) -> Features:
        """Average the last map over its locations, apply the classifier and pack everything."""
        pooled = maps[-1].mean((2, 3))
        return Features(self.classifier(pooled), tuple(maps), tuple(preacts), pooled)


class Stage(nn.Sequential):
    """Blocks that return their output before its ReLU; the stage applies it and returns (map, preact) of its end."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *inner, last = self
        for block in inner:
            x = F.relu_(block(x))  # nobody reads what was there: no pass over new memory
        preact = last(x)
        return F.relu(preact), preact


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias (a batch norm follows) whose padding keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """`conv` and its batch norm."""
    return nn.Sequential(conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels))


def he_init(network: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / (kh kw out_channels)) (He et al. 2015, equation 14)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
