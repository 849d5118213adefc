"""Similarity-preserving distillation (Tung and Mori, ICCV 2019, "Similarity-Preserving Knowledge Distillation")."""

from torch import Tensor
from torch.nn import functional as F
from yacs.config import CfgNode

from cv.methods.base import Distiller


def similarity(feature: Tensor) -> Tensor:
    """G: the batch's Gram matrix with rows of unit length; (b, C, H, W) -> (b, b)."""
    flat = feature.flatten(1)
    return F.normalize(flat @ flat.T, dim=1)


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_teacher - G_student||_F^2 / b^2 (Tung and Mori, 2019, Sec. 3.1); the maps' sizes and channels may differ."""
    return F.mse_loss(similarity(student), similarity(teacher))


class SP(Distiller):
    """CE_WEIGHT * cross-entropy + FEAT_WEIGHT * `sp_loss` of the last maps."""

    compares_maps = True
    compares_classes = False

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.CE_WEIGHT = 1.0  # weight of the cross-entropy with the labels (float, default 1)
        block.FEAT_WEIGHT = 3000.0  # weight of the similarity loss (float, default 3000)
        return block

    def losses(self, student, teacher, labels, indices):
        s = self.settings
        return {
            "ce": s.CE_WEIGHT * F.cross_entropy(student.logits.float(), labels),
            "sp": s.FEAT_WEIGHT * sp_loss(student.maps[-1].float(), teacher.maps[-1].float()),
        }
