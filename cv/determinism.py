"""Which kernels a run takes: those that give the same bits in every run, or the fastest ones."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.run.errors import UserError

_REFUSAL = " does not have a deterministic implementation"


@contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Deterministic ones alone, or cuDNN's fastest for the shapes of the run; afterwards what was chosen before.

    Raises:
        UserError: in a deterministic run, an operation that has no such kernel on this device, by its name.
    """
    cudnn, before = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    flags, only_warned = (cudnn.benchmark, cudnn.deterministic), torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first product
        torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    try:
        yield
    except RuntimeError as error:
        operation, refused, _ = str(error).partition(_REFUSAL)
        if not refused:
            raise
        raise UserError(
            f"SOLVER.DETERMINISTIC: {operation} has no deterministic kernel on this device; set it to False, or take "
            "another method or network"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        cudnn.benchmark, cudnn.deterministic = flags
