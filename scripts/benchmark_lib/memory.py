"""Peak memory of a CIFAR loop, in a process of its own: what a process has needed once, it never gives back."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from common.record import peak_memory_bytes
from common.torchvision_repair import repair_torchvision
from cv.data import Augment, DataSets, ImageSet

CIFAR_IMAGES = 50_000


def random_images(count: int) -> DataSets:
    """Images of CIFAR-100's kind: reading the files would have a peak of its own."""
    images = ImageSet(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 100, 100)
    return DataSets(images, images, None, (0.5,) * 3, (0.25,) * 3, Augment(padding=4, flip=True))


def peak_memory_apart(loop: str, precision: str, batch: int, steps: int, images: int = CIFAR_IMAGES) -> int:
    """Peak memory (bytes) of a new process that takes some steps: allocated on the GPU, resident without one.

    The plain loop has no workers there, so that all that it needs is counted.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_memory, loop, precision, batch, steps, images).result()


def _peak_memory(loop: str, precision: str, batch: int, steps: int, images: int) -> int:
    repair_torchvision()
    from benchmark_lib.loops import build

    data = random_images(images)
    trained = build(loop, data, batch, precision, workers=0)
    del data  # the plain loop has made its own copy
    trained.run(steps)
    return peak_memory_bytes()
