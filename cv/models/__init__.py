"""Networks for 32x32 images (8x8 to 64x64 work too) by the names that the distillation literature uses."""

from collections.abc import Callable
from functools import partial

from common.run.errors import UserError
from common.run.suggest import nearest
from cv.models.features import Features, Network
from cv.models.library import LibraryNetwork, build_library_network, is_library
from cv.models.mobilenetv2 import MobileNetV2
from cv.models.pretrained import PUBLISHED
from cv.models.resnet import RESNETS, ResNet
from cv.models.shufflenet import shufflenetv1, shufflenetv2
from cv.models.vgg import VGG, VGGS
from cv.models.wrn import WRNS, WideResNet

# name -> constructor(num_classes=..., in_channels=...)
MODELS: dict[str, Callable[..., Network]] = {
    **{name: partial(ResNet, *shape) for name, shape in RESNETS.items()},
    **{name: partial(WideResNet, *shape) for name, shape in WRNS.items()},
    **{name: partial(VGG, depths) for name, depths in VGGS.items()},
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
}


def build_model(name: str, num_classes: int, in_channels: int = 3) -> Network:
    """A freshly initialised network by its name in `MODELS`, or by torchvision/<name> or timm/<name>.

    Raises UserError for an unknown name (the message lists all and names the nearest) and for counts below 1.
    """
    if name not in MODELS and not is_library(name):
        near = nearest(str(name).lower(), MODELS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise UserError(
            f"unknown network {name!r}: valid names are {', '.join(MODELS)}, torchvision/<name> and timm/<name>{hint}"
        )
    for key, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(count, int) or count < 1:
            raise UserError(f"{name}: {key} must be a whole number of at least 1, not {count!r}")
    if is_library(name):
        return build_library_network(name, num_classes, in_channels)
    return MODELS[name](num_classes=num_classes, in_channels=in_channels)


__all__ = ["MODELS", "PUBLISHED", "Features", "LibraryNetwork", "Network", "build_model", "is_library"]
