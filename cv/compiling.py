"""SOLVER.COMPILE: a network's passes compiled, and on a GPU captured."""

import torch
from torch import nn


def compile_features(network: nn.Module) -> None:
    """Compile `network.features` where it is; the network keeps its names and weights.

    On a GPU forward and backward become CUDA graphs (PyTorch's "reduce-overhead"), one for every shape: the kernels of
    a small network are launched more slowly than they run, and a graph is launched at once. What a graph puts out,
    gradients among it, is valid until the next call.
    """
    on_gpu = next(network.parameters()).device.type == "cuda"
    network.features = torch.compile(network.features, mode="reduce-overhead" if on_gpu else "default")
