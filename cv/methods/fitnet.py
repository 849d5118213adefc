"""Hint training (Romero et al., ICLR 2015, "FitNets: Hints for Thin Deep Nets")."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from cv.methods.base import Distiller, feature_shapes


class ConvReg(nn.Module):
    """The regressor r: brings a student map to the shape (C, H, W) of the teacher's, by pooling and a 1x1 convolution.

    A larger student map is averaged down, a smaller one repeated up; batch norm and relu follow the convolution, as
    the teacher's map has passed them too.
    """

    def __init__(self, in_channels: int, out_shape: torch.Size) -> None:
        super().__init__()
        self.size = tuple(out_shape[1:])
        self.conv = nn.Conv2d(in_channels, out_shape[0], kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_shape[0])

    def forward(self, feature: Tensor) -> Tensor:
        if tuple(feature.shape[2:]) != self.size:
            feature = F.adaptive_avg_pool2d(feature, self.size)
        return F.relu(self.bn(self.conv(feature)))


class FitNet(Distiller):
    """CE_WEIGHT * cross-entropy + FEAT_WEIGHT * mean (teacher's hint - r(student's map))^2.

    Eq. 3 of Romero et al. (2015), as a mean over elements in place of half the sum. The paper trains on the hint
    first and on the labels later; here, as is usual since, both losses are trained together.
    """

    compares_maps = True
    compares_classes = False

    def __init__(self, student, teacher, settings, **dataset) -> None:
        super().__init__(student, teacher, settings, **dataset)
        ours, theirs = (feature_shapes(model, self.image_shape).maps for model in (student, teacher))
        layer, last = settings.HINT_LAYER, min(len(ours), len(theirs)) - 1
        if not 0 <= layer <= last:
            raise self.bad_setting("HINT_LAYER", f"0 (stem) to {last}, the last stage that both networks have")
        self.regressor = ConvReg(ours[layer][0], theirs[layer])

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.HINT_LAYER = 2  # the map that is compared: 0 the stem, i the end of stage i (int, default 2)
        block.CE_WEIGHT = 1.0  # weight of the cross-entropy with the labels (float, default 1)
        block.FEAT_WEIGHT = 100.0  # weight of the hint loss (float, default 100)
        return block

    def losses(self, student, teacher, labels, indices):
        s = self.settings
        guided = self.regressor(student.maps[s.HINT_LAYER].float())
        return {
            "ce": s.CE_WEIGHT * F.cross_entropy(student.logits.float(), labels),
            "hint": s.FEAT_WEIGHT * F.mse_loss(guided, teacher.maps[s.HINT_LAYER].float()),
        }
