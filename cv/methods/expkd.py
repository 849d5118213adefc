"""Distillation of class activation maps (CAM: Zhou et al., CVPR 2016, "Learning Deep Features for Discriminative
Localization", Eq. 2), restricted to the classes that the teacher finds likeliest; docs/method.md describes it."""

import torch
from torch import Tensor
from torch.nn import functional as F
from yacs.config import CfgNode

from common.run.errors import UserError
from cv.methods.base import Distiller, feature_shapes
from cv.models.library import LibraryNetwork


def class_activation_maps(feature_map: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """CAM_k(x, y) = relu(mean over channels c of weight_kc * f_c(x, y)) (Zhou et al., 2016, Eq. 2, with relu and mean).

    feature_map (N, C, H, W), classifier weight (all classes, C), classes (N, K) -> (N, K, H, W).
    """
    activation = torch.einsum("nkc,nchw->nkhw", weight[classes], feature_map)
    return F.relu(activation / feature_map.shape[1])


def class_distribution(cams: Tensor, size: int) -> Tensor:
    """CAMs (N, K, H, W) resized to size x size, then softmax over the K classes at every location."""
    if cams.shape[2:] != (size, size):
        cams = F.interpolate(cams, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return cams.softmax(1)


def cam_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of two (N, K, h, w) maps, summed over classes and locations, mean over the batch."""
    return (student - teacher).square().sum((1, 2, 3)).mean()


class ExpKD(Distiller):
    """CE_WEIGHT * cross-entropy + FEAT_WEIGHT * `cam_loss` over the teacher's TOP_K classes of each image.

    The mean over channels makes the maps small and their softmax almost flat, so that FEAT_WEIGHT has to be large for
    the two gradients to be of one order.
    """

    compares_maps = True

    def __init__(self, student, teacher, settings, **dataset) -> None:
        super().__init__(student, teacher, settings, **dataset)
        self.require_positive("TOP_K", "SIZE")
        for role, network in (("student", student), ("teacher", teacher)):
            if isinstance(network, LibraryNetwork):
                channels = feature_shapes(network, self.image_shape).maps[-1][0]
                if channels != network.classifier.in_features:
                    raise UserError(f"method expkd: the {role}'s classifier does not take the mean of its last map")
        self.top_k = min(settings.TOP_K, self.num_classes)

    @staticmethod
    def defaults() -> CfgNode:
        block = CfgNode()
        block.TOP_K = 30  # the teacher's likeliest classes per image, at most all classes (int, default 30)
        block.SIZE = 8  # height and width to which both networks' maps are resized (int, default 8)
        block.CE_WEIGHT = 1.0  # weight of the cross-entropy with the labels (float, default 1)
        block.FEAT_WEIGHT = 1000.0  # weight of the squared difference of the maps (float, default 1000)
        return block

    def losses(self, student, teacher, labels, indices):
        s = self.settings
        classes = teacher.logits.topk(self.top_k, dim=1).indices
        ours, theirs = (
            class_distribution(
                class_activation_maps(features.maps[-1].float(), model.classifier.weight.float(), classes), s.SIZE
            )
            for features, model in ((student, self.student), (teacher, self.teacher))
        )
        return {
            "ce": s.CE_WEIGHT * F.cross_entropy(student.logits.float(), labels),
            "cam": s.FEAT_WEIGHT * cam_loss(ours, theirs),
        }
