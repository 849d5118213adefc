"""DSKD, Direction Sensitivity-based Knowledge Distillation: align a student's weights with its teacher's along the
singular directions that the optimizer is most sensitive to right now.

    dskd = DirectionSensitivityLoss(pairs, Own(rank=32), svd_steps=100)  # pairs: (name, student weight, teacher weight)
    dskd.attach(optimizer, total_steps=T)                                # follows the optimizer's own steps
    loss = task_loss + lambda_size * dskd()

This file is the algorithm: what is kept between steps, and when it is renewed. Every `svd_steps` optimizer steps the
reading chooses directions from the update and the gradient (`_choose`). Every `grad_steps` steps the loss and its exact
gradient are computed along them (`_expand`). The formulas are in readings/ and sensitivity.py.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from .attach import Attachment
from .checks import check_pairs, naming_what_is_not_finite
from .groups import Pairs, group_by_shape
from .held import Held, check_intervals, hand_out
from .matrices import in_layout_of, inner_product, largest_entries
from .observed import ObservedStep
from .precision import full_precision
from .processes import collect
from .readings import Own, Reading
from .reports import Reports
from .state import Saved
from .watch import Watch


class DirectionSensitivityLoss(Reports, Saved):
    """L_DSKD, the mean alignment loss over matched pairs of layers, with directions that follow the optimizer.

    Calling it gives the loss, a scalar whose gradient goes to the student's weights. It must see every optimizer step,
    by `attach` or by `observe`. Calls within one optimizer step (gradient accumulation) see the same gradient.

    Degenerate input: a pair in `skip`, without a gradient, or with a zero gradient or update keeps its former
    directions. A gradient or update that is not finite (an overflow under a gradient scaler) postpones the choice to
    the next step, with one warning. So does, once, an optimizer that changes gradients in place (Nesterov momentum):
    from then on they are copied. Float64 weights are worked on in float64, all others in float32.

    Args:
        pairs: (name, student weight, teacher weight) of every matched layer, names unique, as `pair_layers` gives them.
            Weights of 3 and more dimensions (out, in, kh, kw) are read as (out, in * kh * kw). Teachers are constants.
        reading: which directions, and how they are compared; by default `Own()`, the paper's.
        svd_steps: optimizer steps between two choices of directions.
        grad_steps: optimizer steps for which an exact gradient is held; 1 = exact in every step. In a held step the
            loss is the first-order expansion: no decomposition, no product of matrices, no host synchronisation.
        drift: after every `grad_steps` steps the gradient is held on while no student matrix has moved by more than
            this share of its norm, ||W - W0|| / ||W0||, since it was computed (0 = never held on). A choice of
            directions ends it in any case.

    Attributes:
        steps, choices, expansions: optimizer steps seen, choices of directions made, exact gradients computed.

    Raises:
        ValueError, TypeError: pairs that cannot be aligned (named), or a setting out of range.
    """

    def __init__(
        self,
        pairs: Pairs,
        reading: Reading | None = None,
        svd_steps: int = 100,
        *,
        grad_steps: int = 1,
        drift: float = 0.0,
    ):
        check_intervals(svd_steps, grad_steps, drift)
        self.reading = Own() if reading is None else reading
        if not isinstance(self.reading, Reading):
            raise TypeError(f"reading must be one such as Own(rank=32), got {reading!r}")
        self.pairs = pairs = check_pairs(pairs, self.reading.any_shape)
        self.svd_steps, self.grad_steps, self.drift = svd_steps, grad_steps, drift
        self.steps = self.choices = self.expansions = 0
        self.names, self.students, self.teachers = (list(column) for column in zip(*pairs, strict=True))
        self.groups = group_by_shape(pairs)
        self.held: Held | None = None
        self.starts: list[Tensor] = []  # with span "interval": the weights after every pair's last choice
        self.postponed = False  # whether a choice is due that an earlier step could not make
        self.copy_gradients = False  # whether the optimizer changes them in place
        self.watch = Watch()
        self.attachment: Attachment | None = None
        self._version = -1  # of the first weight when the held gradient was computed

    def __call__(self) -> Tensor:
        """The loss, a scalar in the working precision."""
        self.watch.called(self.steps, self.students[0]._version, self.grad_steps)
        held = self._current()
        with full_precision(held.value.device):
            return hand_out(held.value_at(self.students), held.gradients, self.students)

    def gradients(self) -> list[Tensor]:
        """The loss's gradient with respect to every student weight, in the order of the pairs; not to be changed."""
        return self._current().gradients

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        total_steps: int,
        weight: float | None = None,
        skip: Callable[[], Collection[str]] | None = None,
        decoupled: bool = False,
    ) -> Attachment:
        """Follow the steps of an optimizer from now on; arguments and errors are those of `Attachment`."""
        self.attachment = Attachment(self, optimizer, total_steps, weight, skip, decoupled)
        return self.attachment

    @contextmanager
    def observe(self, progress: float, skip: Collection[str] = ()) -> Iterator[None]:
        """Bracket one optimizer step, taken inside after its backward pass; what `attach` does by itself.

        In a distributed run `skip` and which weights have a gradient must be the same on every process.

        Args:
            progress: optimizer steps done / planned, in [0, 1].
            skip: names of pairs that got no gradient from the task in this step; they keep their directions.

        Raises:
            ValueError: progress out of range, or a name in `skip` that is no pair's.
            RuntimeError: a backward pass ran inside, or `attach` follows the steps already.
        """
        if self.attachment is not None:
            raise RuntimeError("the DSKD loss follows an optimizer already: take steps without `observe`, or detach")
        step = self.begin_step(progress, skip)
        everything = range(len(self.students))
        step.note_gradients(everything)
        try:
            yield
        finally:
            step.forget()
        step.settle(everything)
        self.end_step(step)

    @property
    def due(self) -> bool:
        """Whether the coming optimizer step is one that chooses directions."""
        return self.postponed or (self.steps + 1) % self.svd_steps == 0

    def begin_step(self, progress: float, skip: Collection[str] = ()) -> ObservedStep:
        """Right before an optimizer step."""
        if unknown := set(skip) - set(self.names):
            raise ValueError(f"skip names no pair: {', '.join(sorted(unknown))}")
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        if self.reading.span == "interval" and not self.starts:  # not earlier: models change place until they train
            self.starts = [W.detach().clone() for W in self.students]
        if not self.due:
            return ObservedStep(self.students, None, False, progress, skip)
        self.pairs.check()
        self.held = None  # its memory serves the copies
        before = [W.detach().clone() for W in self.starts or self.students]
        return ObservedStep(self.students, before, self.copy_gradients, progress, skip)

    def end_step(self, step: ObservedStep) -> None:
        """Right after it: count it, choose directions if that is due, let go of a gradient that has had its time."""
        self.steps += 1
        if not step.gradients_held():
            self.copy_gradients = self.postponed = True
        elif step.before is not None:
            with full_precision(self.students[0].device):
                self.postponed = not self._choose(step)
        if self.held is not None and (self.steps - self.held.since) % self.grad_steps == 0:
            self.held = None if self.held.has_drifted(self.students, self.drift) else self.held

    @torch.no_grad()
    def _choose(self, step: ObservedStep) -> bool:
        """Choose directions anew; False, with nothing changed, where the step does not allow it."""
        updates = step.updates()
        update_sizes, gradient_sizes = largest_entries(updates, step.gradients)
        if not all(map(math.isfinite, update_sizes + gradient_sizes)):
            self.watch.warn("a gradient or update is not finite; its directions stay as they are")
            return False
        both = [bool(update and gradient) for update, gradient in zip(update_sizes, gradient_sizes, strict=True)]
        self.watch.chose(sum(both))
        if not any(update_sizes):
            return False  # a gradient scaler left the step out
        moved = {i for i, name in enumerate(self.names) if both[i] and name not in step.skip}
        for group in self.groups:
            group.start(self.reading, self.students)
            for rows in group.rounds([row for row, i in enumerate(group.index) if i in moved]):
                update_mn, gradient_mn = group.stack(updates, rows), group.stack(step.gradients, rows)
                chosen = self.reading.choose(update_mn, gradient_mn, step.progress, group.of_rows(rows))
                group.renew(self.reading, rows, chosen)
        if self.reading.span == "interval":  # a new list of new tensors: saved states keep the former ones
            self.starts = [self.students[i].detach().clone() if i in moved else W for i, W in enumerate(self.starts)]
        self.choices += 1
        return True

    def _current(self) -> Held:
        """The held gradient, or a new one; where each step has its own, weights that changed unseen have, too."""
        version = self.students[0]._version
        if self.held is None or (self.held.offset is None and version != self._version):
            self.held, self._version = self._expand(), version
            self.expansions += 1
        return self.held

    @naming_what_is_not_finite
    def _expand(self) -> Held:
        """The exact loss and gradient at the present weights."""
        value, gradients = torch.zeros((), device=self.students[0].device), list(self.students)
        # tensors of inference could not be held for the training, and leaving it would enable gradients
        with torch.inference_mode(False), torch.no_grad(), full_precision(self.students[0].device):
            for group in self.groups:
                group.start(self.reading, self.students)
                for rows in group.rounds(range(len(group))):
                    target = group.target(self.reading, self.teachers, rows)
                    student_mn = group.stack(self.students, rows)
                    found = self.reading.value_and_gradient(student_mn, target, group.of_rows(rows))
                    losses, D_mn = (collect(part, len(rows)) / len(self.students) for part in found)
                    value = value + losses.sum()
                    for row, D in zip(rows, D_mn, strict=True):
                        gradients[group.index[row]] = in_layout_of(self.students[group.index[row]], D)
            offset = inner_product(gradients, self.students) if self.grad_steps > 1 or self.drift else None
        origin = [W.detach().clone() for W in self.students] if self.drift else []
        return Held(value, gradients, offset, self.steps, origin)
