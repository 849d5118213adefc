"""ShuffleNets for CIFAR, as CRD uses them: a 1x1 stem of 24 channels at full size, then three stages that halve it.

V1: Zhang et al., CVPR 2018, 3 groups. V2: Ma et al., ECCV 2018, size 1. Weights keep torch's default initialisation.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cv.models.features import Features, Network, Stage, conv_bn

STEM = 24


class UnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1 (V1's figure 2, but with a ReLU after the depthwise
    one); at stride 2 the pooled input is appended.

    Returns its output before the ReLU, as do the other units here.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int):
        super().__init__()
        self.stride = stride
        made = channels - in_channels if stride == 2 else channels
        self.groups = 1 if in_channels == STEM else groups  # the stem is too narrow to be grouped (table 1)
        self.reduce = conv_bn(in_channels, made // 4, 1, groups=self.groups)
        self.depthwise = conv_bn(made // 4, made // 4, 3, stride, groups=made // 4)
        self.expand = conv_bn(made // 4, made, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        out = F.channel_shuffle(F.relu_(self.reduce(x)), self.groups)
        out = self.expand(F.relu_(self.depthwise(out)))
        return out + x if self.stride == 1 else torch.cat((out, F.avg_pool2d(x, 3, stride=2, padding=1)), 1)


class DownUnitV2(nn.Module):
    """V2's figure 3(d): two branches that halve the size, concatenated and shuffled."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        half = channels // 2
        self.left = nn.Sequential(
            conv_bn(in_channels, in_channels, 3, stride=2, groups=in_channels), conv_bn(in_channels, half, 1)
        )
        self.reduce = conv_bn(in_channels, half, 1)
        self.right = nn.Sequential(conv_bn(half, half, 3, stride=2, groups=half), conv_bn(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(torch.cat((self.left(x), self.right(F.relu_(self.reduce(x)))), 1), 2)


class UnitV2(nn.Module):
    """V2's figure 3(c): half of the channels pass through three convolutions, the other half stays."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.reduce = conv_bn(half, half, 1)
        self.right = nn.Sequential(conv_bn(half, half, 3, groups=half), conv_bn(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)  # `kept` is not negative, so that the stage's ReLU leaves it alone
        return F.channel_shuffle(torch.cat((kept, self.right(F.relu_(self.reduce(changed)))), 1), 2)


class ShuffleNet(Network):
    """Stem, three stages and, for V2, a last 1x1 convolution, which belongs to the third stage in `Features`."""

    def __init__(self, stages: list[Stage], channels: int, head: int | None, num_classes: int, in_channels: int):
        super().__init__()
        self.stem = conv_bn(in_channels, STEM, 1)
        self.stages = nn.ModuleList(stages)
        self.head = conv_bn(channels, head, 1) if head else None
        self.classifier = nn.Linear(head or channels, num_classes)

    def features(self, x: Tensor) -> Features:
        preacts = [self.stem(x)]
        x = F.relu(preacts[0])
        maps = [x]
        for stage in self.stages:
            x, preact = stage(x)
            maps.append(x)
            preacts.append(preact)
        if self.head is not None:
            preacts[-1] = self.head(x)
            maps[-1] = F.relu(preacts[-1])
        return self.classify(maps, preacts)


def shufflenetv1(num_classes: int, in_channels: int = 3) -> ShuffleNet:
    """ShuffleNet V1 of 3 groups: 4, 8, 4 units of 240, 480, 960 channels."""
    groups, widths = 3, (STEM, 240, 480, 960)
    stages = [
        Stage(UnitV1(before, after, 2, groups), *(UnitV1(after, after, 1, groups) for _ in range(units - 1)))
        for (before, after), units in zip(pairwise(widths), (4, 8, 4), strict=True)
    ]
    return ShuffleNet(stages, widths[-1], None, num_classes, in_channels)


def shufflenetv2(num_classes: int, in_channels: int = 3) -> ShuffleNet:
    """ShuffleNet V2 of size 1: 4, 8, 4 units of 116, 232, 464 channels, then 1024."""
    widths = (STEM, 116, 232, 464)
    stages = [
        Stage(DownUnitV2(before, after), *(UnitV2(after) for _ in range(units - 1)))
        for (before, after), units in zip(pairwise(widths), (4, 8, 4), strict=True)
    ]
    return ShuffleNet(stages, widths[-1], 1024, num_classes, in_channels)
