"""Share work over the processes of a distributed run: each computes its part, then all have all of it."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def _place() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def process_count() -> int:
    return _place()[1]


def share(items: Sequence[int]) -> list[int]:
    """The items that this process works on: every n-th one."""
    number, count = _place()
    return list(items[number::count])


def rounds(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """The items in parts, so large that each process's share of a part is `size` items at most."""
    part = size * _place()[1]
    for start in range(0, len(items), part):
        yield list(items[start : start + part])


def collect(mine: Tensor, count: int) -> Tensor:
    """Of each process's results (share, ...) for its `share` of `count` items the results (count, ...) for all.

    All processes end with the same bits.
    """
    number, processes = _place()
    if processes == 1:
        return mine
    results = torch.zeros(count, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    results[number::processes] = mine
    dist.all_reduce(results)  # a sum with zeros
    return results
