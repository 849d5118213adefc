"""What a loaded data set is, and what is computed from one: channel statistics and the choice of images to use."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.run.errors import UserError
from cv.data.augment import Augment, ResizedCrop


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size: `images` uint8 (N, C, H, W) contiguous, `labels` int64 (N,) in 0..num_classes-1."""

    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or not self.images.is_contiguous():
            raise ValueError(
                f"images must be contiguous uint8 (N, C, H, W), not {self.images.dtype} {self.images.shape}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(self.images)},), not {self.labels.dtype} {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on `device`; no copy where it is there already."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.num_classes)

    def take(self, indices: Tensor) -> "ImageSet":
        """The images at `indices` (int64), in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.num_classes)


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
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        histogram = torch.bincount(images[:, channel].reshape(-1), minlength=256).double()
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
