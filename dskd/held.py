"""A gradient that is computed once, held, and handed to autograd as it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .matrices import inner_product, is_whole, working_dtype
from .sharding import is_sharded, local, sum_over_parts


class _HandOut(torch.autograd.Function):
    """A constant for the forward pass, given gradients for the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        outer = [grad_output.reshape(*grad_output.shape, *[1] * (D.ndim - grad_output.ndim)) for D in ctx.gradients]
        return None, None, *(scale.to(D.dtype) * D for scale, D in zip(outer, ctx.gradients, strict=True))


def hand_out(value: Tensor, gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """`value`, (...), whose gradients with respect to `weights`, each (..., *), are `gradients`."""
    handed: Tensor = _HandOut.apply(value, gradients, *weights)  # type: ignore[no-untyped-call]
    return handed


@dataclass
class Held:
    """The exact loss and gradient at some weights W0, and what the first-order expansion around them needs.

    Attributes:
        value: the loss at W0, a scalar.
        gradients: D of every pair / number of pairs, in the shape and memory layout of its weight.
        offset: sum <D, W0>; None where every step has a gradient of its own.
        since: optimizer steps done at W0.
        origin: W0, where their drift is looked at; otherwise empty.
    """

    value: Tensor
    gradients: list[Tensor]
    offset: Tensor | None
    since: int
    origin: list[Tensor]

    def value_at(self, weights: Sequence[Tensor]) -> Tensor:
        """The loss at other weights to first order, L0 + sum <D, W - W0>."""
        if self.offset is None:
            return self.value
        return self.value + inner_product(self.gradients, [W.detach() for W in weights]) - self.offset

    def has_drifted(self, weights: Sequence[Tensor], drift: float) -> bool:
        """Whether a matrix is further from W0 than this share of its norm.

        Always so where that is not looked at, and where the norm is 0 or beyond the range of the precision.
        """
        if not self.origin:
            return True
        origin = [local(W0) for W0 in self.origin]
        moved = torch._foreach_sub([local(W.detach()) for W in weights], origin)
        norms = torch._foreach_norm([*moved, *origin])
        if any(map(is_sharded, weights)):
            squares = [norm.double().square() for norm in norms]
            found = sum_over_parts(squares, [*weights, *weights]).tolist()
        else:  # squared on the host: not every device has float64
            found = [norm * norm for norm in torch.stack([norm.to(working_dtype(norm)) for norm in norms]).tolist()]
        count = len(weights)
        both = zip(found[:count], found[count:], strict=True)
        return not all(size > 0.0 and change <= drift**2 * size < math.inf for change, size in both)


def check_intervals(svd_steps: int, grad_steps: int, drift: float) -> None:
    for name, value in (("svd_steps", svd_steps), ("grad_steps", grad_steps)):
        if not is_whole(value, 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if isinstance(drift, bool) or not isinstance(drift, int | float) or not 0.0 <= drift < float("inf"):
        raise ValueError(f"drift must be 0 or a positive number, got {drift!r}")
