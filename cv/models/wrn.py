"""Wide ResNets: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016 (pre-activation blocks, no dropout)."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from cv.models.features import Features, Network, conv, he_init


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; a shortcut that changes shape starts after the first."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.shortcut = None if in_channels == channels else conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and x after `bn1` with and without its ReLU: the latter two show the layer before."""
        preact = self.bn1(x)
        activated = F.relu(preact)
        out = self.conv2(F.relu_(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated)), activated, preact


class WideResNet(Network):
    """A stem and three stages of `blocks` blocks each (depth 6 * blocks + 4) of 16, 32, 64 channels times `width`.

    Batch norm and ReLU of what a stage puts out belong to the next stage's first block; `features` shows them as the
    end of the stage that they follow, so that the maps are post-activation as everywhere else.
    """

    def __init__(self, blocks: int, width: int, num_classes: int, in_channels: int = 3):
        super().__init__()
        channels = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = conv(in_channels, channels[0], 3)
        self.stages = nn.ModuleList()
        for (before, after), stride in zip(pairwise(channels), (1, 2, 2), strict=True):
            first = PreactBlock(before, after, stride)
            self.stages.append(nn.ModuleList([first, *(PreactBlock(after, after, 1) for _ in range(blocks - 1))]))
        self.bn = nn.BatchNorm2d(channels[-1])
        self.classifier = nn.Linear(channels[-1], num_classes)
        he_init(self)

    def features(self, x: Tensor) -> Features:
        maps, preacts = [], []
        x = self.conv1(x)
        for stage in self.stages:
            for index, block in enumerate(stage):
                x, activated, preact = block(x)
                if index == 0:
                    maps.append(activated)
                    preacts.append(preact)
        preacts.append(self.bn(x))
        maps.append(F.relu(preacts[-1]))
        return self.classify(maps, preacts)


# name -> (blocks per stage, width)
WRNS = {f"wrn_{depth}_{width}": ((depth - 4) // 6, width) for depth in (16, 40) for width in (1, 2)}
