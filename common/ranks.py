"""Share work over the ranks of a distributed run: each computes its part, then all have all of it."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(items: Sequence[int]) -> list[int]:
    """The items that this rank works on: every world-size-th one."""
    rank, world = _world()
    return list(items[rank::world])


def agreed(number: int, device: torch.device) -> int:
    """Rank 0's number, on all ranks; below 2^62."""
    rank, world = _world()
    number %= 2**62
    return number if world == 1 else int(exchange(torch.tensor(number if rank == 0 else 0, device=device)))


def rounds(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """The items in parts, so large that each rank's share of a part is `size` items at most."""
    part = size * _world()[1]
    for start in range(0, len(items), part):
        yield list(items[start : start + part])


def exchange(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks; with zeros outside each rank's share, all ranks end with the same bits."""
    if _world()[1] > 1:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


def collect(mine: torch.Tensor, count: int) -> torch.Tensor:
    """Of each rank's results (share, ...) for its `share` of `count` items the results (count, ...) for all of them."""
    rank, world = _world()
    if world == 1:
        return mine
    results = mine.new_zeros(count, *mine.shape[1:])
    results[rank::world] = mine
    return exchange(results)
