"""One optimizer step as the method sees it: the update that it made, and the gradients that it used."""

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class ObservedStep:
    """Notes gradients before an optimizer step; `settle` and `gradients_held` say whether they are those of the step.

    Args:
        weights: all students' weights.
        before: copies of them that the update counts from, which this takes over; None where no choice is due.
        copy_gradients: for an optimizer that changes gradients in place.
        progress: of the training, in [0, 1].
        skip: names of pairs that keep their directions.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        before: list[Tensor] | None,
        copy_gradients: bool,
        progress: float,
        skip: Collection[str],
    ):
        self.weights, self.before, self.progress, self.skip = weights, before, progress, skip
        self.gradients: list[Tensor | None] = [None] * len(weights)
        self._copy = copy_gradients
        self._noted: list[Tensor | None] = [None] * len(weights)
        self._versions: list[int | None] = [None] * len(weights)
        self._hooks: list[tuple[int, RemovableHandle]] = []
        self._late = False  # whether a backward pass has run inside the step

    def note_gradients(self, places: Iterable[int]) -> None:
        """Remember `.grad` of some weights: what the coming step will use."""
        for i in places:
            grad = self.weights[i].grad
            self._noted[i], self._versions[i] = grad, _version(grad)
            if self.before is not None:
                self.gradients[i] = grad.clone() if grad is not None and self._copy else grad
            if self.before is not None and self.weights[i].requires_grad:  # not frozen since the loss was made
                register = self.weights[i].register_post_accumulate_grad_hook
                self._hooks.append((i, register(self._note_late)))  # type: ignore[no-untyped-call]

    def _note_late(self, _: Tensor) -> None:
        self._late = True

    def forget(self) -> None:
        """Leave nothing on the weights."""
        self._let_go(range(len(self.weights)))

    def _let_go(self, places: Collection[int]) -> None:
        for i, hook in self._hooks:
            if i in places:
                hook.remove()
        self._hooks = [(i, hook) for i, hook in self._hooks if i not in places]

    def settle(self, places: Collection[int]) -> None:
        """Right after the step of some weights, before any other backward pass may follow.

        Raises:
            RuntimeError: their gradients have become those of another backward pass, which ran inside the step.
        """
        self._let_go(places)
        now = {i: self.weights[i].grad for i in places}
        replaced = any(grad is not None and grad is not self._noted[i] for i, grad in now.items())
        if self._late or replaced:
            raise RuntimeError(
                "DSKD: a backward pass ran inside of the step, whose gradients are not those that were seen before it; "
                "use `dskd.attach(optimizer, total_steps)`, which follows an optimizer that calls a closure once; of "
                "one with several passes a step around another one (SAM) attach the inner one"
            )

    def gradients_held(self) -> bool:
        """False where the noted gradients were changed in place, by the optimizer or after its step."""
        unchanged = all(_version(grad) == old for grad, old in zip(self._noted, self._versions, strict=True))
        return self._copy or self.before is None or unchanged

    def updates(self) -> list[Tensor]:
        """Weights after the step minus weights before it, in the memory of the copies."""
        pairs = zip(self.weights, self.before or [], strict=True)
        return [start.neg_().add_(after.detach()) for after, start in pairs]


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else grad._version
