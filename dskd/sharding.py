"""Weights that processes hold in parts (FSDP2's DTensors), with as little said of it elsewhere as possible.

A whole matrix is put together only where it is decomposed, one at a time, and stays only on the process that works on
it. All else, held gradients, copies and norms, is done on each process's part.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import process_count


def is_sharded(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def check_sharding(name: str, weight: Any) -> None:
    """Raises ValueError for a weight that is split over more than one dimension of a mesh, or otherwise than `Shard`.

    So FSDP2 with tensor parallelism is refused; FSDP2 with replicas, and either alone, are not.
    """
    if not is_sharded(weight):
        return
    split = [placement for placement in weight.placements if not placement.is_replicate()]
    if len(split) > 1 or any(type(placement).__name__ != "Shard" for placement in split):
        raise ValueError(
            f"pair {name}: DSKD takes weights that are split over one dimension of a mesh (FSDP2), not as "
            f"{tuple(weight.placements)}; leave the pair out, or train without tensor parallelism"
        )


def local(tensor: Any) -> Tensor:
    """This process's part, in the tensor's own memory."""
    part: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor
    return part


def whole(tensor: Any, wanted: bool) -> Tensor | None:
    """The whole tensor where it is wanted. If it is sharded all processes must call this, one after the other."""
    if is_sharded(tensor):
        tensor = tensor.detach().full_tensor()
    return tensor if wanted else None


def sharded_like(weight: Any, full: Tensor) -> Tensor:
    """Of a tensor that every process has in full the part that belongs to a weight's; without communication."""
    if not is_sharded(weight) or is_sharded(full):
        return full
    from torch.distributed.tensor import distribute_tensor

    part: Tensor = distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)
    return part


def largest_over_parts(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute entry of each tensor, infinite if one is not finite; (tensors,).

    In float32, or in float64 if there are such tensors; not every device has that.
    """
    parts = [local(tensor) for tensor in tensors]
    norms = torch._foreach_norm([part if part.numel() else part.new_zeros(1) for part in parts], float("inf"))
    wide = any(norm.dtype == torch.float64 for norm in norms)
    found = torch.stack([norm.to(torch.float64 if wide else torch.float32) for norm in norms])
    if any(map(is_sharded, tensors)):
        found = found.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a maximum may lose nan
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def sum_over_parts(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Values (tensors,) that each process has computed of its part of the tensors, or of the whole; added up."""
    found = torch.stack(list(values))
    if any(map(is_sharded, tensors)):
        found = found / torch.tensor([_copies(tensor) for tensor in tensors], dtype=found.dtype, device=found.device)
        dist.all_reduce(found)
    return found


def _copies(tensor: Any) -> int:
    """How many processes hold each entry."""
    parts = 1
    if is_sharded(tensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            parts *= size if placement.is_shard() else 1
    return process_count() // parts
