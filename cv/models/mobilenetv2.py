"""MobileNetV2 at half width for CIFAR: Sandler et al., CVPR 2018, with the strides and plain ReLUs that CRD uses."""

import torch.nn.functional as F
from torch import Tensor, nn

from cv.models.features import Features, Network, conv_bn, he_init

# expansion, channels at full width, blocks, stride (paper, table 2; the first stride of 2 of the paper is 1 here)
STAGES = (
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.expand = conv_bn(in_channels, hidden, 1)
        self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = conv_bn(hidden, channels, 1)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(F.relu_(self.depthwise(F.relu_(self.expand(x)))))
        return x + out if self.residual else out


class MobileNetV2(Network):
    """Stem of stride 2, four stages (sizes 16, 8, 4, 2 for 32x32 images), a 1x1 convolution to 1280 channels.

    The stages' ends are linear, so their preacts equal their maps; that last convolution belongs to the fourth stage.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: float = 0.5):
        super().__init__()
        before = int(32 * width)
        self.stem = conv_bn(in_channels, before, 3, stride=2)
        self.stages = nn.ModuleList()
        for rows in STAGES:
            blocks = []
            for expansion, channels, repeats, stride in rows:
                after = int(channels * width)
                for index in range(repeats):
                    blocks.append(InvertedResidual(before, after, stride if index == 0 else 1, expansion))
                    before = after
            self.stages.append(nn.Sequential(*blocks))
        self.head = conv_bn(before, 1280, 1)
        self.classifier = nn.Linear(1280, num_classes)
        he_init(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def features(self, x: Tensor) -> Features:
        preacts = [self.stem(x)]
        x = F.relu(preacts[0])
        maps = [x]
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
            preacts.append(x)
        preacts[-1] = self.head(x)
        maps[-1] = F.relu(preacts[-1])
        return self.classify(maps, preacts)
