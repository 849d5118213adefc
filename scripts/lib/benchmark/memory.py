"""Peak memory of a piece of work, above what is in use before it."""

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


def storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors in nested containers, once where several share it."""
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in found}


class _Alive(TorchDispatchMode):
    """Follows the storages of new tensors. On the host resident memory says less: malloc keeps what is freed."""

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for key, storage in storages(result).items():
            if key not in given:
                self._storages[key] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result
