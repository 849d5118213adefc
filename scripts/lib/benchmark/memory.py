"""Peak memory: of a CIFAR loop, in a process of its own, and of a piece of work above what is in use before it."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.run.record import peak_memory_bytes
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


def peak_above(work: Callable[[], object]) -> int:
    """Bytes of the tensors that a piece of work makes, at the moment when most of them are alive."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Alive() as alive:
        work()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Follows the storages of new tensors. On the host resident memory says less: malloc keeps what is freed."""

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {_id_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _id_of(tensor) not in given:
                storage = tensor.untyped_storage()
                self._storages[_id_of(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


def _peak_memory(loop: str, precision: str, batch: int, steps: int, images: int) -> int:
    repair_torchvision()
    from scripts.lib.benchmark.loops import build

    data = random_images(images)
    trained = build(loop, data, batch, precision, workers=0)
    del data  # the plain loop has made its own copy
    trained.run(steps)
    return peak_memory_bytes()


def _id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
