"""Networks of torchvision and timm by `torchvision/<name>` and `timm/<name>`, used as they are."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from common.run.errors import UserError
from common.run.suggest import nearest
from common.torchvision_repair import repair_torchvision
from cv.models.features import Features, Network

_SERIES = (
    "features",
    "blocks",
    "stages",
    "layers",
    "trunk_output",
)  # what the libraries call a network's blocks in a row


class LibraryNetwork(Network):
    """A network of a library, `net`, whose features are read by hooks.

    The maps are the last output of every resolution among its blocks, so that the first is the stem's and the others
    end the stages; those of transformers, which have none of four dimensions, are empty. `preacts` are the maps, after
    their activation. `pooled` is what the classifier gets.
    """

    def __init__(self, net: nn.Module, classifier: str):
        super().__init__()
        self.net = net
        self.classifier_name = classifier
        self._map_names: dict[torch.Size, list[str]] = {}  # by the shape of an image

    @property
    def classifier(self) -> nn.Linear:
        return self.net.get_submodule(self.classifier_name)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def features(self, x: Tensor) -> Features:
        if x.shape[1:] not in self._map_names:
            self._map_names[x.shape[1:]] = self._find_maps(x[:1])
        seen: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in self._map_names[x.shape[1:]]:
                hooks.callback(self.net.get_submodule(name).register_forward_hook(_keep(seen, name)).remove)
            keep = self.classifier.register_forward_pre_hook(lambda _, inputs: seen.update(pooled=inputs[0]))
            hooks.callback(keep.remove)
            logits = self.net(x)
        pooled = seen.pop("pooled")
        maps = tuple(seen.values())
        return Features(logits, maps, maps, pooled)

    @torch.no_grad()
    def _find_maps(self, x: Tensor) -> list[str]:
        """Names of the blocks with the last output of every resolution, by running one image."""
        seen: dict[str, Tensor] = {}
        training = self.net.training
        with ExitStack() as hooks:
            for name, block in _blocks(self.net):
                hooks.callback(block.register_forward_hook(_keep(seen, name)).remove)
            self.net.eval()(x)
        self.net.train(training)
        seen = {name: output for name, output in seen.items() if isinstance(output, Tensor) and output.ndim == 4}
        runs = [list(run) for _, run in groupby(seen, key=lambda name: seen[name].shape[2:])]
        sizes = [seen[run[-1]].shape[2:] for run in runs]
        falling = all(h >= later_h and w >= later_w for (h, w), (later_h, later_w) in pairwise(sizes))
        return [run[-1] for run in runs] if falling else []  # else channels come last


def _keep(seen: dict[str, Tensor], name: str) -> Callable:
    return lambda _, inputs, output: seen.__setitem__(name, output)


def _blocks(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in net.named_children():
        if name in _SERIES and any(child.children()):
            yield from _blocks(child, f"{prefix}{name}.")
        elif "Adaptive" not in type(child).__name__:  # global pooling gives no map
            yield f"{prefix}{name}", child


def is_library(name: str) -> bool:
    return str(name).startswith(("torchvision/", "timm/"))


def build_library_network(name: str, num_classes: int, in_channels: int = 3) -> LibraryNetwork:
    """A network with random weights.

    Raises:
        UserError: the library is missing, has no classifier of that name, or it ends in no linear layer.
    """
    repair_torchvision()
    library, _, model = name.partition("/")
    if library == "torchvision":
        from torchvision import models

        names, make = models.list_models(module=models), models.get_model
        settings = {"weights": None, "num_classes": num_classes}
        settings |= {"aux_logits": False, "init_weights": True} if model in ("googlenet", "inception_v3") else {}
        if in_channels != 3:
            raise UserError(f"{name}: torchvision's networks take images of 3 channels, not {in_channels}")
    else:
        try:
            import timm
        except ImportError as error:
            raise UserError(f"{name} needs timm: pip install timm ({error})") from error
        names, make = timm.list_models(), timm.create_model
        if "." in model:  # with the tag of published weights
            names = timm.list_models(f"{model.partition('.')[0]}.*", pretrained=True) or names
        settings = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    if model not in names:
        near = nearest(model, names)
        hint = f"; did you mean {library}/{near}?" if near else ""
        raise UserError(f"{library} has no network {model!r}{hint}")
    net = make(model, **settings)
    heads = [each for each, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not heads or net.get_submodule(heads[-1]).out_features != num_classes:
        raise UserError(f"{name} does not end in one linear layer, which the methods here need")
    return LibraryNetwork(net, heads[-1])
