"""A data set by its name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from common.run.errors import UserError
from cv.data.augment import Augment, ResizedCrop
from cv.data.cifar import CIFAR10, CIFAR100, read_cifar
from cv.data.digits import read_digits
from cv.data.folders import read_folder, read_tiny_imagenet
from cv.data.image_set import DataSets, ImageSet, channel_statistics, choose_images
from cv.data.memory import check_memory

Splits = tuple[ImageSet, ImageSet, list[str] | None, list[str]]  # training, test, class names, notes
CIFARS = {"cifar100": CIFAR100, "cifar10": CIFAR10}
READERS: dict[str, Callable[[Path, int | None, Path | None], Splits]] = {
    "tiny-imagenet": read_tiny_imagenet,
    "folder": read_folder,
    "digits": lambda root, image_size, cache: (*read_digits(), []),
}
PADDING_SHARE = 8  # zero padding is the side over this: 4 for CIFAR's 32 pixels


def load_dataset(
    name: str,
    root: str | Path,
    *,
    image_size: int | None = None,
    subset: int | None = None,
    subset_seed: int = 0,
    held_out: int = 0,
    crop: str = "pad",
    cache: Path | None = None,
) -> DataSets:
    """Read a data set into memory (N * C * H * W bytes on the CPU).

    name: cifar100, cifar10 (layouts: `read_cifar`), tiny-imagenet, folder (layouts: cv/data/folders.py) or digits (root
    is not looked at). image_size: side in pixels that all images are brought to; None keeps their own, which must be
    one. subset: train on that many images only, a balanced choice by `subset_seed` (`balanced_subset`). held_out: take
    that many training images out of training, and test on them instead of the test images (`choose_images`). crop: of
    the augmentation, "pad" (`Augment`) or "resized" (`ResizedCrop`). cache: folder for decoded image files that are
    larger than memory (cv/data/cache.py), which are refused without one. Mean and standard deviation are the customary
    constants for CIFAR, else those of all training images. Any bad input is a `UserError`.
    """
    if name not in (*CIFARS, *READERS):
        raise UserError(f"DATASET.NAME {name!r}: unknown; choose from {', '.join((*CIFARS, *READERS))}")
    if image_size is not None and image_size < 1:
        raise UserError(f"DATASET.IMAGE_SIZE {image_size}: must be at least 1")
    choose = None
    if held_out or subset is not None:
        choose = partial(choose_images, subset=subset, subset_seed=subset_seed, held_out=held_out)
    notes: list[str] = []
    if name in CIFARS:  # their statistics are known, so that what is left out need not be decoded
        train, test, classes = read_cifar(CIFARS[name], Path(root), choose)
    else:
        train, test, classes, notes = READERS[name](Path(root), image_size, cache)
    if image_size is not None:
        train, test = _resize(train, image_size), _resize(test, image_size)
    height, width = train.images.shape[2:]
    if test.images.shape[2:] != (height, width):
        raise UserError(
            f"data set {name!r}: training images have {width}x{height} pixels, test images "
            f"{test.images.shape[3]}x{test.images.shape[2]}; set DATASET.IMAGE_SIZE to bring all to one"
        )
    if name in CIFARS:
        mean, std = CIFARS[name].mean, CIFARS[name].std
    else:
        mean, std = channel_statistics(train.images)
        train = train.take(choose(train.labels)) if choose else train
    if held_out:
        every = torch.arange(len(train))
        train, test = train.take(every[:-held_out]), train.take(every[-held_out:])
    flip = name != "digits"
    augment: Augment | ResizedCrop = Augment(min(height, width) // PADDING_SHARE, flip)
    if crop == "resized":
        augment = ResizedCrop(height, width, flip)
    return DataSets(train, test, classes, mean, std, augment, tuple(notes))


def _resize(image_set: ImageSet, size: int) -> ImageSet:
    if image_set.images.shape[2:] == (size, size):
        return image_set
    check_memory(len(image_set), size, size)
    images = F.interpolate(image_set.images, size=(size, size), mode="bilinear", antialias=True)
    return ImageSet(images.contiguous(), image_set.labels, image_set.num_classes)
