"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, "Decoupled Knowledge Distillation")."""

import torch
from torch import Tensor
from torch.nn import functional as F
from yacs.config import CfgNode

from cv.methods.base import Distiller


def decouple(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split log softmax(logits) (N, classes) at the target class (Zhao et al., 2022, Sec. 3.1).

    Returns log b (N, 2), target against all others, and log p_hat (N, classes), the distribution among the others,
    with 0 in the target's column.
    """
    is_target = F.one_hot(labels, logits.shape[1]).bool()
    others = logits.masked_fill(is_target, -torch.inf)
    total = logits.logsumexp(1)
    log_target = logits.gather(1, labels[:, None]).squeeze(1) - total
    log_rest = others.logsumexp(1) - total
    return torch.stack((log_target, log_rest), 1), F.log_softmax(others, dim=1).masked_fill(is_target, 0.0)


def dkd_losses(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 TCKD and T^2 NCKD, where KD = TCKD + (1 - p_target of the teacher) NCKD (Zhao et al., 2022, Eqs. 5 and 6).

    TCKD = KL(b_teacher || b_student), NCKD = KL(p_hat_teacher || p_hat_student), means over the batch.
    """
    parts = zip(decouple(student / temperature, labels), decouple(teacher / temperature, labels), strict=True)
    tckd, nckd = (F.kl_div(ours, theirs, log_target=True, reduction="batchmean") for ours, theirs in parts)
    return temperature**2 * tckd, temperature**2 * nckd


class DKD(Distiller):
    """CE_WEIGHT * cross-entropy + warm-up * (ALPHA * TCKD + BETA * NCKD) (Zhao et al., 2022, Eq. 7)."""

    takes_teachers = True

    def __init__(self, student, teacher, settings, **dataset) -> None:
        super().__init__(student, teacher, settings, **dataset)
        self.require_positive("T")
        if self.num_classes == 2:
            self.notes = ("DKD on two classes: beside the target there is one class, so that the part NCKD is 0",)

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.T = 4.0  # temperature of both softmaxes (float, > 0, default 4)
        block.CE_WEIGHT = 1.0  # weight of the cross-entropy with the labels (float, default 1)
        block.ALPHA = 1.0  # weight of the target-class part TCKD (float, default 1)
        block.BETA = 8.0  # weight of the non-target part NCKD (float, default 8)
        block.WARMUP = 20  # epochs over which both parts grow linearly to their weights (int, default 20)
        return block

    def losses(self, student, teacher, labels, indices):
        s = self.settings
        logits = student.logits.float()
        tckd, nckd = dkd_losses(logits, teacher.logits.float(), labels, s.T)
        warmup = self.warmup(s.WARMUP)
        return {
            "ce": s.CE_WEIGHT * F.cross_entropy(logits, labels),
            "tckd": warmup * s.ALPHA * tckd,
            "nckd": warmup * s.BETA * nckd,
        }
