"""VGGs for CIFAR: Simonyan & Zisserman, ICLR 2015, with batch norm and one linear classifier, as CRD uses them."""

import torch.nn.functional as F
from torch import Tensor, nn

from cv.models.features import Features, Network, Stage, conv_bn, he_init

CHANNELS = (64, 128, 256, 512, 512)


class VGG(Network):
    """Five stages of `depths` 3x3 convolutions, 64 to 512 channels; the first stage is the stem of `Features`.

    Max-pooling halves the size after each of the first three stages (32x32 images end at 4x4), and after the fourth if
    the images have 64x64 pixels or more.
    """

    def __init__(self, depths: tuple[int, int, int, int, int], num_classes: int, in_channels: int = 3):
        super().__init__()
        self.stages = nn.ModuleList()
        for depth, channels in zip(depths, CHANNELS, strict=True):
            before = [in_channels] + [channels] * (depth - 1)
            self.stages.append(Stage(*(conv_bn(width, channels, 3) for width in before)))
            in_channels = channels
        self.classifier = nn.Linear(CHANNELS[-1], num_classes)
        he_init(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def features(self, x: Tensor) -> Features:
        maps, preacts = [], []
        pools = 4 if min(x.shape[2:]) >= 64 else 3
        for index, stage in enumerate(self.stages):
            if 0 < index <= pools:
                x = F.max_pool2d(x, 2)
            x, preact = stage(x)
            maps.append(x)
            preacts.append(preact)
        return self.classify(maps, preacts)


VGGS = {  # name -> convolutions per stage
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
