"""What pixels of 0 to 1 are normalised by, and images that change from one network's normalisation to another's."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Normalisation(NamedTuple):
    """Mean and standard deviation per channel, of pixel values scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, described: dict[str, Any]) -> "Normalisation | None":
        """That of a saved network, by its model.json; None where it says none."""
        if described.get("mean") is None or described.get("std") is None:
            return None
        return cls(tuple(described["mean"]), tuple(described["std"]))

    def is_close(self, other: "Normalisation") -> bool:
        """Whether both are one; the same statistics may differ in their last bits between two machines."""
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        return all(math.isclose(ours, theirs, abs_tol=1e-6) for ours, theirs in pairs)

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in self)
        return f"mean ({mean}), std ({std})"


class Renormalise(nn.Module):
    """Images (N, C, H, W) normalised by `ours` as images normalised by `theirs`: ((x std + mean) - mean') / std'."""

    def __init__(self, ours: Normalisation, theirs: Normalisation) -> None:
        super().__init__()
        mean, std = (_per_channel(values) for values in ours)
        their_mean, their_std = (_per_channel(values) for values in theirs)
        self.register_buffer("scale", (std / their_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - their_mean) / their_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def change_of_images(ours: Normalisation, theirs: Normalisation) -> nn.Module:
    """What makes images normalised by `theirs` of those normalised by `ours`: nothing where both are one."""
    return nn.Identity() if ours.is_close(theirs) else Renormalise(ours, theirs)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
