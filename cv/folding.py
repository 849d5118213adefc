"""A frozen network's batch norms folded into the convolutions before them: the same outputs in less time."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-2  # of the largest output: far above what rounding does, far below what a wrong pair does
_NORMS = ("BatchNorm2d", "BatchNormAct2d")  # by name: the second is timm's, which may not be installed


@torch.no_grad()
def folded(network: nn.Module, image_shape: tuple[int, int, int]) -> nn.Module:
    """A copy of a network in eval mode without the batch norms that follow a convolution.

    Args:
        network: with `features(images)`; its weights stay as they are.
        image_shape: (C, H, W).

    Returns:
        The copy. A batch norm stays where all outputs would not be the same without it, as after a convolution whose
        output is used twice.
    """
    weight = next(network.parameters())
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    expected, pairs = _outputs(network, images), _pairs(network, images)

    def same(lean: nn.Module) -> bool:
        return all(_alike(a, b) for a, b in zip(expected, _outputs(lean, images), strict=True))

    lean = _without(network, pairs)
    if not same(lean):  # some of the convolutions have their outputs used otherwise, too
        lean = _without(network, [pair for pair in pairs if same(_without(network, [pair]))])
    return lean if same(lean) else network


def _without(network: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    lean = copy.deepcopy(network)
    for conv, norm in pairs:
        module = lean.get_submodule(norm)
        lean.set_submodule(conv, fuse_conv_bn_eval(lean.get_submodule(conv), module))
        lean.set_submodule(norm, nn.Sequential(*module.children()))  # timm's drop and activation; torch's has none
    return lean


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of the convolutions and of the batch norms that take their outputs, by running some images."""
    made: list[tuple[Tensor, str]] = []  # kept, as a tensor that is gone could have another one's identity
    found: dict[str, str] = {}

    def after(name: str):
        return lambda _, inputs, output: made.append((output, name))

    def before(name: str):
        def look(_, inputs):
            found.update({conv: name for output, conv in made if output is inputs[0]})

        return look

    hooks = []
    for name, module in network.named_modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(after(name)))
        elif isinstance(module, nn.BatchNorm2d) and type(module).__name__ in _NORMS:
            hooks.append(module.register_forward_pre_hook(before(name)))
    network.features(images)
    for hook in hooks:
        hook.remove()
    return list(found.items())


def _outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    features = network.features(images)
    return [features.logits, features.pooled, *features.maps, *features.preacts]


def _alike(output: Tensor, other: Tensor) -> bool:
    return bool((output - other).abs().max() <= TOLERANCE * output.abs().max())
