"""SOLVER.COMPILE: a network's passes compiled, and on a GPU captured."""

import torch
from torch import nn


def compile_features(network: nn.Module) -> None:
    """Compile `network.features` where it is; the network keeps its names and weights.

    On a GPU forward and backward become CUDA graphs (PyTorch's "reduce-overhead"), one for every shape: the kernels of
    a small network are launched more slowly than they run, and a graph is launched at once. What a graph puts out,
    gradients among it, is valid until the next call. Shapes are few, the batch, an epoch's rest and the evaluation's,
    and stay fixed in the code: otherwise the rest of the first epoch would bring code for any shape to all others.
    """
    on_gpu = next(network.parameters()).device.type == "cuda"
    mode = "reduce-overhead" if on_gpu else "default"
    network.features = torch.compile(network.features, mode=mode, dynamic=False)
    torch._dynamo.config.cache_size_limit = 64  # graphs of a function, which all networks of a kind share; 8 otherwise


def run_eagerly(network: nn.Module) -> None:
    """Undo `compile_features`: what runs once is not worth it."""
    vars(network).pop("features", None)
