"""The weight matrices of a network: where each is, and what its dimensions mean."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention


@dataclass(frozen=True)
class Layer:
    """A weight of two and more dimensions.

    Attributes:
        name: the module's, or the parameter's where that is not called `weight`; of a layer that peft has wrapped the
            name that the layer had.
        module, parameter: what owns the weight, and its name there.
        dims: what its dimensions are. Weights of equal shape and unequal dimensions cannot pair.
        common: whether pairing by itself takes it: linear layers, convolutions, transformers' `Conv1D`, the input
            projections of attention, queries, keys and values as the one matrix that `nn.MultiheadAttention` keeps, and
            the matrices of recurrent layers, all gates as the one matrix that they keep.
        adapter: the module with which peft has wrapped the layer.
    """

    name: str
    module: nn.Module
    parameter: str
    weight: Tensor
    dims: str
    common: bool
    adapter: nn.Module | None = None


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """All layers by name, in the order of the network; a module that occurs twice has both names."""
    return {layer.name: layer for layer in _layers(network, "", None)}


def shared_names(network: nn.Module) -> dict[int, list[str]]:
    """Of every weight that several parameters share, by id, their names."""
    names = defaultdict(list)
    for name, weight in network.named_parameters(remove_duplicate=False):
        names[id(weight)].append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def inside(layers: dict[str, Layer], block: str) -> dict[str, Layer]:
    """The layers inside of a module, by their names in it."""
    start = f"{block}." if block else ""
    return {name.removeprefix(start): layer for name, layer in layers.items() if name.startswith(start)}


def _layers(module: nn.Module, name: str, adapter: nn.Module | None) -> Iterator[Layer]:
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):  # peft's: the adapter's own matrices are no layers of the network
        yield from _layers(base, name, module)
        return
    for parameter in _parameters(module):
        weight = getattr(module, parameter, None)
        if isinstance(weight, Tensor) and (nn.parameter.is_lazy(weight) or weight.ndim >= 2):
            dims, common = _dims(module)
            full = name if parameter == "weight" else joined(name, parameter)
            yield Layer(full, module, parameter, weight, dims, common, adapter)
    for child, submodule in module._modules.items():
        if submodule is not None:
            yield from _layers(submodule, joined(name, child), None)


def _parameters(module: nn.Module) -> Sequence[str]:
    """The names that a module's own weights may have."""
    if isinstance(module, nn.MultiheadAttention):
        return _IN_PROJECTIONS
    if isinstance(module, nn.RNNBase):  # by layer and direction; those of a parametrization are listed here too
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    return ("weight_ih", "weight_hh") if isinstance(module, nn.RNNCellBase) else ("weight",)


def _dims(module: nn.Module) -> tuple[str, bool]:
    """What the dimensions of a module's weight are, and whether it is of a kind that pairs by itself."""
    if isinstance(module, nn.Linear | nn.MultiheadAttention):
        return "(out, in)", True
    if any(cls.__name__ == "Conv1D" for cls in type(module).__mro__):
        return "(in, out)", True
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):  # gates differ in number and order; a cell has its layer's
        kind = next(cls.__name__ for cls in type(module).__mro__ if cls.__module__ == nn.RNNBase.__module__)
        return f"{kind.removesuffix('Cell')} (out, in)", True
    if isinstance(module, _ConvNd):
        kind = "transposed convolution" if module.transposed else "convolution"
        return f"{kind} in {module.groups} groups" if module.groups > 1 else kind, True
    return type(module).__name__, False
