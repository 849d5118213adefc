"""Published weights of timm's and torchvision's networks, and what the images that they were trained on looked like."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from common.run.errors import UserError
from cv.normalisation import Normalisation

PUBLISHED = "pretrained"  # in place of a file: the library's own weights, from its cache or the network
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # weights of torchvision's further heads, which no network here has

# torchvision's weights of these bring images from ImageNet's mean and deviation to this one within the network
# (`transform_input`), which networks that are built without those weights do not do
_TRANSFORMED = ("googlenet", "inception_v3")
_HALF = Normalisation((0.5,) * 3, (0.5,) * 3)


def published_normalisation(name: str) -> Normalisation:
    """Mean and standard deviation of the weights that timm/<name>[.<tag>] or torchvision/<name> is published with."""
    library, _, model = name.partition("/")
    if library == "timm":
        import timm

        found = timm.get_pretrained_cfg(model)
        return Normalisation(tuple(found.mean), tuple(found.std))
    if model in _TRANSFORMED:
        return _HALF
    transforms = _torchvision_weights(model).transforms()
    return Normalisation(tuple(transforms.mean), tuple(transforms.std))


def published_weights(name: str, key: str) -> dict[str, Tensor]:
    """State of the published network, for the classes that it was trained on; downloaded where it is not cached.

    key: the setting that asks for it, for the message.

    Raises:
        UserError: there are none, or they cannot be had; it says where they are and how to give them as a file.
    """
    library, _, model = name.partition("/")
    try:
        with _quiet():
            if library == "timm":
                import timm

                return timm.create_model(model, pretrained=True).state_dict()
            from torchvision import models

            return models.get_model(model, weights=_torchvision_weights(model)).state_dict()
    except Exception as error:  # each library and its downloader raise their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key} {PUBLISHED}: the weights of {name} are not to be had here ({reason}); {_by_hand(name)}"
        ) from error


def _by_hand(name: str) -> str:
    """What to do without a network."""
    library, _, model = name.partition("/")
    if library == "torchvision":
        file = f"{model}.pth"
        return (
            f"download {_torchvision_weights(model).url} elsewhere as {file}, convert it by `python -m "
            f"cv.convert_teacher {file} --architecture {name}`, and give the folder that this writes in its place"
        )
    import timm

    found = timm.get_pretrained_cfg(model)
    if not found.hf_hub_id:
        return "give a safetensors file in its place"
    return f"download model.safetensors of https://huggingface.co/{found.hf_hub_id} elsewhere, and give it in its place"


def _torchvision_weights(model: str) -> Any:
    from torchvision import models

    return models.get_model_weights(model).DEFAULT


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub's line on each of its tries."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
