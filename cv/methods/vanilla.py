"""Plain supervised training: the control row without distillation, and how teachers are trained."""

from torch.nn import functional as F
from yacs.config import CfgNode

from cv.methods.base import Distiller


class Vanilla(Distiller):
    """Cross-entropy with the labels; settings: none."""

    needs_teacher = False

    @staticmethod
    def defaults() -> CfgNode:
        return CfgNode()

    def losses(self, student, teacher, labels, indices):
        return {"ce": F.cross_entropy(student.logits.float(), labels)}
