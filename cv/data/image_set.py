"""What a loaded data set is, and what is computed from one: channel statistics and the choice of images to use."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.run.errors import UserError
from cv.data.augment import Augment, ResizedCrop

_PART = 4096  # images that are looked at together


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size: `images` uint8 (N, C, H, W) contiguous, `labels` int64 (N,) in 0..num_classes-1.

    rows: where the images lie in a file that is larger than memory (cv/data/cache.py), which of them these are, int64
    (N,); `images` is the whole file then, and stays where it is. None: all of `images`, which are in memory.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or not self.images.is_contiguous():
            raise ValueError(
                f"images must be contiguous uint8 (N, C, H, W), not {self.images.dtype} {self.images.shape}"
            )
        count = len(self.images if self.rows is None else self.rows)
        if self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            raise ValueError(f"labels must be int64 ({count},), not {self.labels.dtype} {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on `device`; no copy where it is there already, and none of images in a file."""
        if self.rows is not None:
            return replace(self, labels=self.labels.to(device))
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def gather(self, indices: Tensor) -> Tensor:
        """The images (n, C, H, W) at `indices` (n,), on the device of these."""
        if self.rows is None:
            return self.images.index_select(0, indices)
        return self.images.index_select(0, self.rows[indices.cpu()]).to(indices.device)

    def take(self, indices: Tensor) -> "ImageSet":
        """The images at `indices` (int64), in that order."""
        if self.rows is not None:
            return replace(self, labels=self.labels[indices], rows=self.rows[indices])
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def parts(self) -> Iterator[Tensor]:
        """All images in order, (n, C, H, W) at a time."""
        for indices in torch.arange(len(self)).split(_PART):
            yield self.gather(indices.to(self.images.device))


@dataclass(frozen=True, eq=False)
class DataSets:
    """A data set ready for training; `mean` and `std` are per channel, of pixel values scaled to 0..1.

    `classes` are the names of the labels where the source has them. `augment` is the augmentation of this data set: a
    crop, by zero padding of an eighth of the side (4 pixels for CIFAR) or resized, and a flip, except for digits.
    `notes` are lines for the user: what of the source was not read.
    """

    train: ImageSet
    test: ImageSet
    classes: list[str] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | ResizedCrop
    notes: tuple[str, ...] = ()


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation per channel of uint8 (N, C, H, W) images, of values scaled to 0..1.

    Exact up to float64 rounding: both come from the channel's histogram. A channel that is constant over the whole set
    cannot be normalised and is a `UserError`.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in images.split(_PART):
        for channel, count in enumerate(counts):
            count += torch.bincount(part[:, channel].reshape(-1), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel, count in enumerate(counts):
        histogram = count.double()
        histogram /= histogram.sum()
        mean = (histogram * values).sum()
        deviation = (histogram * (values - mean) ** 2).sum().sqrt().item()
        if deviation == 0:
            raise UserError(f"training images: channel {channel} has the value {255 * mean:.0f} everywhere")
        means.append(mean.item())
        deviations.append(deviation)
    return tuple(means), tuple(deviations)


def choose_images(labels: Tensor, *, subset: int | None, subset_seed: int, held_out: int) -> Tensor:
    """Indices of the images that are used: those to train on, ascending, then the `held_out` ones to test on.

    labels (N,) of all training images. Both choices are class-balanced; which images are held out depends on their
    number alone, so that a teacher and all its students leave out the same. subset: of the others train on so many.
    """
    if not 0 <= held_out < len(labels):
        raise UserError(
            f"DATASET.HELD_OUT {held_out}: expected less than {len(labels)}, the training images of this data set"
        )
    held = balanced_subset(labels, held_out) if held_out else labels[:0]
    others = torch.ones_like(labels, dtype=torch.bool).index_fill_(0, held, False).nonzero().flatten()
    left, of_all = (torch.bincount(each, minlength=int(labels.max()) + 1) for each in (labels[others], labels))
    if emptied := (of_all.gt(0) & left.eq(0)).nonzero().flatten().tolist():
        raise UserError(f"DATASET.HELD_OUT {held_out}: no image of class {emptied[0]} would be left to train on")
    if subset is not None:
        others = others[balanced_subset(labels[others], subset, subset_seed)]
    return torch.cat((others, held))


def balanced_subset(labels: Tensor, size: int, seed: int = 0) -> Tensor:
    """Ascending indices (size,) of a subset in which the classes' counts differ by at most one.

    A function of `size` and `seed` alone; under one seed a smaller subset is contained in a larger one. A class with
    too few images gives all that it has.
    """
    if not 1 <= size <= len(labels):
        raise UserError(f"DATASET.SUBSET {size}: expected 1 to {len(labels)}, the training images of this data set")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    counts = torch.bincount(labels)
    turn_of_class = torch.randperm(len(counts), generator=generator)
    by_class = labels[shuffled].argsort(stable=True)
    rank_in_class = torch.empty_like(by_class)
    rank_in_class[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    turn = rank_in_class * len(counts) + turn_of_class[labels[shuffled]]
    return shuffled[turn.argsort()[:size]].sort().values
