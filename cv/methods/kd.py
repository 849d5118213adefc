"""Knowledge distillation with softened logits (Hinton, Vinyals and Dean, 2015, "Distilling the Knowledge in a Neural
Network", Sec. 2)."""

from torch import Tensor
from torch.nn import functional as F
from yacs.config import CfgNode

from cv.methods.base import Distiller


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_teacher || p_student), p = softmax(logits / T) (Hinton et al., 2015, Eq. 1); logits (N, classes).

    T^2 makes the gradient's size independent of T; mean over the batch.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


class KD(Distiller):
    """CE_WEIGHT * cross-entropy + KD_WEIGHT * `kd_loss`."""

    takes_teachers = True

    def __init__(self, student, teacher, settings, **dataset) -> None:
        super().__init__(student, teacher, settings, **dataset)
        self.require_positive("T")

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.T = 4.0  # temperature of both softmaxes (float, > 0, default 4)
        block.CE_WEIGHT = 0.1  # weight of the cross-entropy with the labels (float, default 0.1)
        block.KD_WEIGHT = 0.9  # weight of the distillation loss (float, default 0.9)
        return block

    def losses(self, student, teacher, labels, indices):
        s = self.settings
        logits = student.logits.float()
        return {
            "ce": s.CE_WEIGHT * F.cross_entropy(logits, labels),
            "kd": s.KD_WEIGHT * kd_loss(logits, teacher.logits.float(), s.T),
        }
