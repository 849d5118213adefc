"""The distillation methods, one file each; a new one is a file with a `Distiller` and an entry in `METHODS`."""

from collections.abc import Sequence

from torch import nn
from yacs.config import CfgNode

from common.run.errors import UserError
from cv.methods.at import AT
from cv.methods.base import Distiller, FeatureShapes, feature_shapes
from cv.methods.crd import CRD
from cv.methods.dkd import DKD
from cv.methods.expkd import ExpKD
from cv.methods.fitnet import FitNet
from cv.methods.kd import KD
from cv.methods.practise import Practise
from cv.methods.reviewkd import ReviewKD
from cv.methods.sp import SP
from cv.methods.vanilla import Vanilla

__all__ = ["METHODS", "Distiller", "FeatureShapes", "build_distiller", "feature_shapes", "method_defaults"]

METHODS: dict[str, type[Distiller]] = {
    "vanilla": Vanilla,
    "kd": KD,
    "dkd": DKD,
    "expkd": ExpKD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "crd": CRD,
    "reviewkd": ReviewKD,
    "practise": Practise,
}


def build_distiller(
    name: str,
    student: nn.Module,
    teacher: nn.Module | None,
    cfg_block: CfgNode,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    num_train: int,
    more_teachers: Sequence[nn.Module] = (),
    teacher_images: Sequence[nn.Module] = (),
) -> Distiller:
    """The method called `name` (a key of `METHODS`) with the settings `cfg_block`; other arguments as in `Distiller`.

    Raises UserError for an unknown name, and where networks, data set and settings do not fit together.
    """
    if name not in METHODS:
        raise UserError(f"unknown distillation method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name](
        student,
        teacher,
        cfg_block,
        num_classes=num_classes,
        image_shape=image_shape,
        num_train=num_train,
        more_teachers=more_teachers,
        teacher_images=teacher_images,
    )


def method_defaults() -> CfgNode:
    """The default settings of all methods, one block each under the method's name in capitals."""
    return CfgNode({name.upper(): method.defaults() for name, method in METHODS.items()})
