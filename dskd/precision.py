"""The precision of the method's own products of matrices, whatever the training around it has chosen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """In here neither mixed precision nor TF32 or bf16 in products of float32 matrices."""
    matmuls: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    matmuls = [matmul for matmul in matmuls if hasattr(matmul, "fp32_precision")]
    with torch.autocast(device.type, enabled=False):
        # torch 2.9 and newer has a setting a backend, and refuses the older one beside it
        before = [matmul.fp32_precision for matmul in matmuls]
        for_all = "" if matmuls else torch.get_float32_matmul_precision()
        try:
            for matmul in matmuls:
                matmul.fp32_precision = "ieee"
            if for_all:
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            for matmul, value in zip(matmuls, before, strict=True):
                matmul.fp32_precision = value
            if for_all:
                torch.set_float32_matmul_precision(for_all)


def in_full_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`full_precision` around a function of tensors."""

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with full_precision(device):
            return function(*args, **kwargs)

    return wrapped
