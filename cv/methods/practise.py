"""Few-sample compression by feature maps: "Practical Network Acceleration with Tiny Sets" (Wang and Wu, CVPR 2023)."""

from torch.nn import functional as F
from yacs.config import CfgNode

from common.run.errors import UserError
from cv.methods.base import Distiller, feature_shapes


class Practise(Distiller):
    """MAP_WEIGHT * mean (F_student - F_teacher)^2 of the last feature maps; no label and no logit is used.

    For a student that is its teacher without some blocks (DISTILLER.START teacher): the classifier, which gets no
    gradient, is frozen and stays as it was copied.
    """

    compares_maps = True
    compares_classes = False

    def __init__(self, student, teacher, settings, **dataset) -> None:
        super().__init__(student, teacher, settings, **dataset)
        ours, theirs = (feature_shapes(model, self.image_shape).maps[-1] for model in (student, teacher))
        if ours != theirs:
            raise UserError(
                f"method practise: the last feature maps are {tuple(ours)} of the student and {tuple(theirs)} of the "
                "teacher; it needs a student that is its teacher without some blocks"
            )
        student.classifier.requires_grad_(False)

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.MAP_WEIGHT = 1.0  # weight of the loss (float, default 1)
        return block

    def losses(self, student, teacher, labels, indices):
        return {"map": self.settings.MAP_WEIGHT * F.mse_loss(student.maps[-1].float(), teacher.maps[-1].float())}
