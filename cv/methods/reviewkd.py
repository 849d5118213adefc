"""Knowledge review (Chen et al., CVPR 2021, "Distilling Knowledge via Knowledge Review")."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from cv.methods.base import Distiller


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss (Chen et al., 2021, Sec. 3.4) of two maps of one shape (N, C, H, W).

    Squared differences of the maps and of their pools to 4x4, 2x2 and 1x1 (those smaller than the map), each a mean
    over elements, averaged with the weights 1, 1/2, 1/4, 1/8.
    """
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= min(student.shape[2:]):
            continue
        weight /= 2
        total += weight
        pools = (F.adaptive_avg_pool2d(feature, size) for feature in (student, teacher))
        loss = loss + weight * F.mse_loss(*pools)
    return loss / total


class ABF(nn.Module):
    """Attention based fusion (Chen et al., 2021, Sec. 3.3): merges a stage's map with the residual of deeper stages.

    Returns the merged map in the teacher's shape (out_channels, and the height and width asked for), and the residual
    (mid_channels, the student's own height and width) that the next shallower stage reviews.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuses: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels))
        self.attention = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuses else None
        self.expand = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        for convolution in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None, out_size: torch.Size) -> tuple[Tensor, Tensor]:
        residual = self.reduce(feature)
        if self.attention is not None:
            deeper = F.interpolate(deeper, feature.shape[2:])
            share = self.attention(torch.cat((residual, deeper), 1))
            residual = residual * share[:, :1] + deeper * share[:, 1:]
        merged = residual if residual.shape[2:] == out_size else F.interpolate(residual, out_size)
        return self.expand(merged), residual


class ReviewKD(Distiller):
    """CE_WEIGHT * cross-entropy + warm-up * REVIEWKD_WEIGHT * sum over the levels of `hcl_loss`.

    The levels are the ends of the stages and the pooled features, reviewed from the deepest to the shallowest; the
    student's maps after, the teacher's before their last relu.
    """

    compares_maps = True
    compares_classes = False

    def __init__(self, student, teacher, settings, **dataset) -> None:
        super().__init__(student, teacher, settings, **dataset)
        self.require_positive("MAX_MID_CHANNEL")
        ours, theirs = ([*(m[0] for m in shapes.maps[1:]), shapes.pooled] for shapes in self.matched_shapes())
        mid = min(settings.MAX_MID_CHANNEL, ours[-1])
        levels = list(zip(ours, theirs, strict=True))
        self.fusions = nn.ModuleList(ABF(i, mid, o, fuses=level > 0) for level, (i, o) in enumerate(levels[::-1]))

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.MAX_MID_CHANNEL = 512  # most channels inside a fusion; else the student's pooled width (int, default 512)
        block.WARMUP = 20  # epochs over which the review loss grows linearly to its weight (int, default 20)
        block.CE_WEIGHT = 1.0  # weight of the cross-entropy with the labels (float, default 1)
        block.REVIEWKD_WEIGHT = 5.0  # weight of the review loss; 0.6 suits ResNet56 -> ResNet20 (float, default 5)
        return block

    def losses(self, student, teacher, labels, indices):
        s = self.settings
        ours = [*student.maps[1:], student.pooled[..., None, None]]
        theirs = [*teacher.preacts[1:], teacher.pooled[..., None, None]]
        review, residual = 0.0, None
        for fusion, feature, target in zip(self.fusions, ours[::-1], theirs[::-1], strict=True):
            merged, residual = fusion(feature.float(), residual, target.shape[2:])
            review = review + hcl_loss(merged, target.float())
        return {
            "ce": s.CE_WEIGHT * F.cross_entropy(student.logits.float(), labels),
            "reviewkd": self.warmup(s.WARMUP) * s.REVIEWKD_WEIGHT * review,
        }
