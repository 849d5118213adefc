"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, "Paying More Attention to Attention")."""

from torch import Tensor
from torch.nn import functional as F
from yacs.config import CfgNode

from cv.methods.base import Distiller


def attention_map(feature: Tensor, power: float) -> Tensor:
    """Q / ||Q||_2 with Q = mean over channels of |feature|^p; (N, C, H, W) -> (N, H * W).

    F_sum^p of Sec. 3.1; the mean and the paper's sum over channels agree after the normalisation.
    """
    return F.normalize(feature.abs().pow(power).mean(1).flatten(1), dim=1)


def at_loss(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Mean squared difference of two attention maps, the stage's term of Eq. 2 (with p = 2 and a mean over elements).

    Maps (N, C, H, W) of different sizes are first averaged down to the smaller height and width.
    """
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    student, teacher = (
        feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size) for feature in (student, teacher)
    )
    return F.mse_loss(attention_map(student, power), attention_map(teacher, power))


class AT(Distiller):
    """CE_WEIGHT * cross-entropy + FEAT_WEIGHT * sum over the stages of `at_loss`."""

    compares_maps = True
    compares_classes = False

    def __init__(self, student, teacher, settings, **dataset) -> None:
        super().__init__(student, teacher, settings, **dataset)
        self.require_positive("P")
        self.matched_shapes()

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.P = 2.0  # power of the absolute activations in the attention map (float, > 0, default 2)
        block.CE_WEIGHT = 1.0  # weight of the cross-entropy with the labels (float, default 1)
        block.FEAT_WEIGHT = 1000.0  # weight of the attention loss (float, default 1000)
        return block

    def losses(self, student, teacher, labels, indices):
        s = self.settings
        stages = zip(student.maps[1:], teacher.maps[1:], strict=True)
        attention = sum(at_loss(ours.float(), theirs.float(), s.P) for ours, theirs in stages)
        return {
            "ce": s.CE_WEIGHT * F.cross_entropy(student.logits.float(), labels),
            "at": s.FEAT_WEIGHT * attention,
        }
