"""Follow an optimizer by its own step hooks, so that any training loop can use the loss by one line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .matrices import is_whole
from .sharding import local

if TYPE_CHECKING:
    from .loss import DirectionSensitivityLoss
    from .observed import ObservedStep


class Attachment:
    """A loss that follows the steps of optimizers, made by `DirectionSensitivityLoss.attach`.

    Steps are those that the optimizer takes: a step that a gradient scaler leaves out is none. Gradients are those that
    it uses, whoever called backward and wherever, in a closure too.

    Args:
        loss: the loss that follows.
        optimizer: the one, or those, that train the paired weights of the student. With several, a step is one of each.
        total_steps: optimizer steps planned in all, those before a resume included; progress is steps done / planned.
        weight: of the loss, whose gradient is then added to `.grad` right before each step, after the loop's own
            clipping; no term in the loss is needed. `None`: the loop adds `lambda * loss()` to its loss.
        skip: asked where directions are to be chosen: names of pairs that keep theirs, see `observe`.
        decoupled: the gradient is not added to `.grad`; right before each step the weights themselves move by learning
            rate * weight * gradient. An optimizer that divides gradients by their size (AdamW) then leaves the loss's
            as it is, as with decoupled weight decay (Loshchilov & Hutter, ICLR 2019). The optimizer's update, in which
            directions are chosen, has no part of it.

    Raises:
        ValueError: the loss follows an optimizer already, a pair's weight is in none of the optimizers, LBFGS (which
            makes several updates a step), `decoupled` without a weight, or a number out of range.
    """

    def __init__(
        self,
        loss: DirectionSensitivityLoss,
        optimizer: Optimizer | Sequence[Optimizer],
        total_steps: int,
        weight: float | None = None,
        skip: Callable[[], Collection[str]] | None = None,
        decoupled: bool = False,
    ):
        if loss.attachment is not None:
            raise ValueError("the DSKD loss follows an optimizer already; call detach() on what attach returned first")
        if not is_whole(total_steps, 1):
            raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
        if weight is not None and not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight must be 0 or a positive number, got {weight}")
        if decoupled and weight is None:
            raise ValueError("a decoupled loss needs a weight: it is no term of the loop's loss")
        self.loss, self.total_steps, self.weight, self.skip = loss, total_steps, weight, skip
        self.decoupled = decoupled
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        optimizers = list(dict.fromkeys(_unwrapped(each) for each in given))
        self._places = self._places_in(optimizers)
        self._step: ObservedStep | None = None
        self._gradients: list[Tensor] = []  # of the loss, for the optimizers of the present step that come later
        self._begun: set[int] = set()  # of the optimizers, by id, in the present step
        self._stepped: set[int] = set()
        if total_steps < loss.svd_steps:
            loss.watch.warn(
                f"{total_steps} steps are planned and directions are chosen every {loss.svd_steps} (svd_steps): none "
                "will be chosen"
            )
        self._hooks = [each.register_step_pre_hook(self._before) for each in optimizers]
        self._hooks += [each.register_step_post_hook(self._after) for each in optimizers]

    def detach(self) -> None:
        """Follow no longer; nothing stays on the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._forget()
        if self.loss.attachment is self:
            self.loss.attachment = None

    def follows(self, optimizer: Any) -> bool:
        """Whether this optimizer, or the one in this wrapper, trains a paired weight."""
        return id(_unwrapped(optimizer)) in self._places

    def _places_in(self, optimizers: list[Optimizer]) -> dict[int, list[int]]:
        """Of every optimizer, by id, the places of the pairs whose weights it trains."""
        places: dict[int, list[int]] = {id(each): [] for each in optimizers}
        owner = {id(W): id(each) for each in optimizers for group in each.param_groups for W in group["params"]}
        for i, (name, W) in enumerate(zip(self.loss.names, self.loss.students, strict=True)):
            if id(W) not in owner:
                raise ValueError(f"pair {name}: the student's weight is in no parameter group of the optimizer")
            places[owner[id(W)]].append(i)
        for each in optimizers:
            if isinstance(each, LBFGS):
                raise ValueError("LBFGS takes several updates a step, with gradients of its own; DSKD cannot follow it")
        return {key: found for key, found in places.items() if found}

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the step, or after the closure that the step begins with, when the gradients are there."""
        if id(optimizer) in self._begun - self._stepped:  # its last step has raised: there was none
            self._forget()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin(optimizer)
            return None

        def followed() -> Any:
            result = closure()
            self._begin(optimizer)
            return result

        if len(args) > 1:
            return (args[0], followed, *args[2:]), kwargs
        return args, {**kwargs, "closure": followed}

    @torch.no_grad()
    def _begin(self, optimizer: Optimizer) -> None:
        places = self._places.get(id(optimizer))
        if places is None:
            return
        if id(optimizer) in self._stepped:  # the others were left out
            self._finish()
        if self.weight is not None:
            gradients = self._gradients or self.loss.gradients()
            pairs = [(self.loss.students[i], gradients[i]) for i in places]
            if self.decoupled:
                move_weights(optimizer, pairs, self.weight)
            else:  # the scale is that of a scaler whose optimizer unscales by itself
                add_gradient(pairs, self.weight, getattr(optimizer, "grad_scale", None))
            self._gradients = gradients if len(self._places) > 1 else []
        if self._step is None:
            progress = min(self.loss.steps / self.total_steps, 1.0)
            if self.loss.steps >= self.total_steps:
                self.loss.watch.warn(f"the training takes more than the {self.total_steps} steps planned (total_steps)")
            skip = self.skip() if self.skip is not None and self.loss.due else ()
            self._step = self.loss.begin_step(progress, skip)
        self._begun.add(id(optimizer))
        self._step.note_gradients(places)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(optimizer) in self._places and self._step is not None:
            self._step.settle(self._places[id(optimizer)])
            self._stepped.add(id(optimizer))
            if len(self._stepped) == len(self._places):
                self._finish()

    def _finish(self) -> None:
        step = self._step
        self._forget()
        if step is not None:
            self.loss.end_step(step)

    def _forget(self) -> None:
        if self._step is not None:
            self._step.forget()
        self._step, self._gradients = None, []
        self._begun, self._stepped = set(), set()


@torch.no_grad()
def add_gradient(pairs: Iterable[tuple[Tensor, Tensor]], weight: float, scale: Tensor | None = None) -> None:
    """Add weight * scale * D to `.grad` of every W that is trained, for pairs (W, D)."""
    added, wanted = [], []
    for W, D in _summed(pairs):
        W.grad = torch.zeros_like(W) if W.grad is None else W.grad
        added.append(local(W.grad))
        wanted.append(local(D) if scale is None else local(D) * scale)
    if added:
        torch._foreach_add_(added, wanted, alpha=weight)


@torch.no_grad()
def move_weights(optimizer: Optimizer, pairs: Iterable[tuple[Tensor, Tensor]], weight: float) -> None:
    """Take rate * weight * D from every W that is trained, for pairs (W, D); the rate is that of W's group."""
    rates = {id(W): group["lr"] for group in optimizer.param_groups for W in group["params"]}
    trained = _summed(pairs)
    if trained:
        moves = [local(D).to(W.dtype) * rates[id(W)] for W, D in trained]
        torch._foreach_sub_([local(W.detach()) for W, _ in trained], moves, alpha=weight)


def _summed(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The pairs (W, D) whose W is trained, each W once: a device may work on all tensors of a list at the same time."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for W, D in pairs:
        if W.requires_grad:  # else frozen by now; an optimizer moves whatever has a gradient
            found[id(W)] = (W, found[id(W)][1] + D if id(W) in found else D)
    return list(found.values())


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer itself, out of a wrapper such as accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return _unwrapped(inner)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"attach takes an optimizer or a list of them, got a {type(optimizer).__name__}")
    return optimizer
