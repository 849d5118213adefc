"""ResNets for CIFAR: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

As in the knowledge-distillation literature since CRD (Tian et al., ICLR 2020), the shortcut of a block that changes the
shape is a 1x1 convolution with batch norm, and the 'x4' networks have 32, 64, 128, 256 channels.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from cv.models.features import Features, Network, Stage, conv, conv_bn, he_init


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; returns the sum before its ReLU (`Stage` applies that)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else conv_bn(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        return out.add_(self.shortcut(x))


class ResNet(Network):
    """A stem and three stages of `blocks` basic blocks (depth 6 * blocks + 2); `channels` starts with the stem's."""

    def __init__(self, blocks: int, channels: tuple[int, int, int, int], num_classes: int, in_channels: int = 3):
        super().__init__()
        self.conv1 = conv(in_channels, channels[0], 3)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.stages = nn.ModuleList()
        for (before, after), stride in zip(pairwise(channels), (1, 2, 2), strict=True):
            first = BasicBlock(before, after, stride)
            self.stages.append(Stage(first, *(BasicBlock(after, after, 1) for _ in range(blocks - 1))))
        self.classifier = nn.Linear(channels[-1], num_classes)
        he_init(self)

    def features(self, x: Tensor) -> Features:
        preact = self.bn1(self.conv1(x))
        x = F.relu(preact)
        maps, preacts = [x], [preact]
        for stage in self.stages:
            x, preact = stage(x)
            maps.append(x)
            preacts.append(preact)
        return self.classify(maps, preacts)


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
# name -> (blocks per stage, channels)
RESNETS = {f"resnet{depth}": ((depth - 2) // 6, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)} | {
    f"resnet{depth}x4": ((depth - 2) // 6, WIDE) for depth in (8, 32)
}
