"""DSKD, Direction Sensitivity-based Knowledge Distillation: align a student's weights with its teacher's along the
singular directions that the optimiser is most sensitive to right now.

    dskd = DirectionSensitivityLoss(pairs, rank=32, svd_steps=100)   # pairs: [(name, student_weight, teacher_weight)]
    loss = task_loss + lambda_size * dskd()
    loss.backward()
    with dskd.observe(progress=step / total_steps):
        optimizer.step()

This file is the loss that a training loop uses: what it keeps between steps, and when it renews that. The formulas are
pure functions on matrices in common/sensitivity.py (which directions matter) and common/alignment.py (how far apart two
matrices are along them, and the exact gradient); all four public names can be imported from here.
"""

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from common.alignment import curvature_alignment, low_rank_alignment, own_alignment, update_alignment
from common.groups import Group, check_pairs, group_by_shape
from common.matrices import (
    DRIVERS,
    as_matrix,
    columns,
    flat,
    inner_product,
    right_singular,
    shape_of,
    unit_scale,
    working,
)
from common.ranks import agreed, collect, share
from common.released import released_gradient
from common.sensitivity import (
    add_curvature,
    direction_sensitivity,
    score_directions,
    select_directions,
    selected_count,
)

__all__ = [
    "DirectionSensitivityLoss",
    "direction_sensitivity",
    "low_rank_alignment",
    "select_directions",
    "update_alignment",
]

BASES = ("own", "update", "curvature")
DIRECTIONS = ("sensitive", "plain", "random", "shuffled", "shrink", "released")
SCORES = ("sensitivity", "tempered", "magnitude", "random")
SPANS = ("step", "interval")
# settings that a saved state must agree with
_SETTINGS = ("rank", "basis", "direction", "alpha", "score", "span", "smoothing")
_COUNTERS = ("steps", "choices", "expansions", "_held_since", "_postponed", "_copy_gradients", "_seed")
_CHOSEN = ("weights", "left", "right", "spectrum")  # of a group, renewed by a choice of directions
_MEMORY = 0.95  # share of the former curvature that stays when a gradient is added: a mean over about 20 of them
_SAMPLE = 8  # every 8th element of a weight is looked at to see how far it has moved


class _HeldGradient(torch.autograd.Function):
    """The first-order loss L0 + sum <D, W - W0>, written as constant + sum <D, W>; its gradient is the held D."""

    @staticmethod
    def forward(ctx, constant: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return constant + inner_product(gradients, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        return None, None, *(grad_output.to(D.dtype) * D for D in ctx.gradients)


class DirectionSensitivityLoss:
    """L_DSKD, the mean alignment loss over matched pairs of layers, with directions that follow the optimiser.

    Calling it gives the loss; `observe` around every optimizer step counts the steps and, every `svd_steps` of them,
    chooses the directions anew. Between two recomputations of the exact gradient the loss is its first-order
    expansion, whose gradient is that of the last recomputation, `grad_steps` optimizer steps ago at most unless `drift`
    holds it on: no decomposition, no product of matrices and no host synchronisation in such a step. Calls within one
    optimizer step (gradient accumulation) see the same expansion.

    Degenerate input: a pair in `observe`'s `skip`, without a gradient, or with a zero gradient or update keeps its
    former directions; a non-finite gradient or update (an overflow under a gradient scaler) postpones the refresh to
    the next step, with one warning. So does, once and silently, an optimizer that changes gradients in place (Nesterov
    momentum): from then on they are copied. Float64 weights are worked on in float64, all others in float32.

    Args:
        pairs: (name, student weight, teacher weight) of every matched layer, names unique. Weights of 3 and more
            dimensions (out, in, kh, kw) are read as (out, in * kh * kw).
        rank: directions to select per pair (0 = all).
        svd_steps: optimizer steps between two selections of directions.
        basis: "own" = each network's own singular triplets, "update" = the directions of the parameter update
            itself (until a pair's first refresh, the leading directions of the student's weight), "curvature" = the
            eigenvectors of running means of G G^T and G^T G over the gradients of every `svd_steps`-th step, all of
            them (rank 0), weighted by their eigenvalues; no decomposition. It has no alpha, span, driver or smoothing.
        grad_steps: optimizer steps for which an exact gradient is held (1 without drift = recomputed in every step);
            `None` = `svd_steps`.
        drift: after every `grad_steps` steps the gradient is held on if no student matrix has moved by more than this
            share of its norm, ||W - W0|| / ||W0||, since the gradient was computed (0 = never held on). A choice of
            directions ends it in any case, so that drift is of use with `grad_steps` below `svd_steps` only.
        smoothing: of the gradient of "own" between close singular values (common/alignment.py), whose squares are in
            units of the largest one's; 0 = exact.
        driver: "gram", "svd" or "randomized", see `right_singular`.
        direction: "sensitive" is DSKD. The control arms replace every matrix's gradient by another one of equal norm:
            "plain" by W_s - W_t, "random" by a random direction drawn at every expansion. "shuffled" is DSKD towards
            the teacher's matrices with rows and columns shuffled, which keeps their entries and singular values alone.
            "shrink" is DSKD towards matrices of zeros: a weight decay along the directions, without a teacher.
            "released" replaces the gradient by that of the authors' release (common/released.py), with its own norm
            and for the basis "own" only.
        alpha: the blend of gradient (0) and curvature (1), if it is to stay the same; `None` = the progress.
        score: what directions are ranked and weighted by: "sensitivity", J; "tempered", J with sqrt(c_i) in place of
            c_i; "magnitude", their singular value; "random", J dealt out to the directions at random, which keeps the
            weights as uneven as J makes them. With "curvature" there are two: "sensitivity", and "random", which has
            the rows and columns of the running means in a random order, drawn once.
        span: the update that is decomposed: of the "step" at which directions are chosen, or of the whole "interval"
            since the pair's last choice (since the first step before there is one), which keeps one more copy of the
            student's matched weights.

    Raises:
        ValueError: no pairs, a repeated name, shapes of a pair that differ, a setting out of range, or settings that
            cannot be combined.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, Tensor, Tensor]],
        rank: int = 32,
        svd_steps: int = 100,
        *,
        basis: str = "own",
        grad_steps: int | None = None,
        drift: float = 0.0,
        smoothing: float = 0.0,
        driver: str = "gram",
        direction: str = "sensitive",
        alpha: float | None = None,
        score: str = "sensitivity",
        span: str = "step",
    ):
        check_pairs(pairs)
        grad_steps = svd_steps if grad_steps is None else grad_steps
        for name, value, valid in (
            ("basis", basis, BASES),
            ("driver", driver, DRIVERS),
            ("direction", direction, DIRECTIONS),
            ("score", score, SCORES),
            ("span", span, SPANS),
        ):
            if value not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
        for name, value in (("svd_steps", svd_steps), ("grad_steps", grad_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, value in (("drift", drift), ("smoothing", smoothing)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be 0 or a positive number, got {value}")
        if direction == "released" and basis != "own":
            raise ValueError(f"direction 'released' is a gradient of the basis 'own', got basis {basis!r}")
        if basis == "curvature":
            for name, holds, value in (
                ("rank", rank == 0, "0"),
                ("score", score in ("sensitivity", "random"), "sensitivity or random"),
                ("alpha", alpha is None, "None"),
                ("span", span == "step", "step"),
                ("smoothing", smoothing == 0, "0"),
            ):
                if not holds:
                    raise ValueError(f"the basis 'curvature' needs {name} {value}")
        if alpha is not None and not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        if alpha is not None and score == "magnitude":
            raise ValueError("alpha has no effect on the score 'magnitude'")
        selected_count(rank, 1)
        self.rank, self.svd_steps, self.grad_steps, self.drift = rank, svd_steps, grad_steps, drift
        self.smoothing = smoothing
        self.basis, self.driver, self.direction = basis, driver, direction
        self.alpha, self.score, self.span = alpha, score, span
        self.steps = 0  # optimizer steps seen
        self.choices = 0  # choices of directions made
        self.expansions = 0  # exact gradients computed
        self._names = [name for name, _, _ in pairs]
        self._students = [student for _, student, _ in pairs]
        self._groups = group_by_shape(pairs)
        self._held: tuple[Tensor, list[Tensor]] | None = None  # constant, gradients D / pairs
        self._held_since = 0
        self._origin: list[Tensor] = []  # with drift: a sample of the weights W0 at which the gradient is exact
        self._starts: list[Tensor] = []  # with span "interval": the weights after every pair's last choice
        self._postponed = False
        self._copy_gradients = False  # whether the optimizer changes them in place, as Nesterov momentum may
        self._warned = False
        self._seed = torch.initial_seed()  # of the run, which the random arms follow

    def __call__(self) -> Tensor:
        """The loss, a scalar in the working precision; its gradient goes to the student's weights."""
        if self._held is None:
            self._held = self._expand()
            self._held_since = self.steps
            self.expansions += 1
            if self.drift:
                self._origin = [sample.clone() for sample in self._samples()]
        constant, gradients = self._held
        with torch.autocast(constant.device.type, enabled=False):
            return _HeldGradient.apply(constant, gradients, *self._students)

    @contextmanager
    def observe(self, progress: float, skip: Collection[str] = ()) -> Iterator[None]:
        """Bracket one optimizer step, which must be taken inside.

        In a distributed run `skip` and which weights have a gradient must be the same on every rank.

        Args:
            progress: optimizer steps done / planned, in [0, 1]: alpha, unless the loss has a fixed one.
            skip: names of pairs that got no gradient from the task in this step; they keep their directions.

        Raises:
            ValueError: progress out of range, or a name in `skip` that is no pair's.
        """
        unknown = set(skip) - set(self._names)
        if unknown:
            raise ValueError(f"skip names no pair: {', '.join(sorted(unknown))}")
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        due = self._postponed or (self.steps + 1) % self.svd_steps == 0
        if self.span == "interval" and not self._starts:  # not earlier: models change place until they train
            self._starts = self._copies()
        if due:
            self._held = None  # its memory serves the copies
            before = [start.clone() for start in self._starts] or self._copies()
            grads = [None if weight.grad is None else weight.grad.detach() for weight in self._students]
            if self._copy_gradients:
                grads = [None if grad is None else grad.clone() for grad in grads]
            versions = [None if grad is None else grad._version for grad in grads]
        yield
        self.steps += 1
        if due and versions != [None if grad is None else grad._version for grad in grads]:
            self._copy_gradients = self._postponed = True
        elif due:
            with torch.autocast(self._students[0].device.type, enabled=False):
                alpha = progress if self.alpha is None else self.alpha
                self._postponed = not self._choose_directions(before, grads, alpha, set(skip))
        if self._held is not None and (self.steps - self._held_since) % self.grad_steps == 0 and self._has_moved():
            self._held = None

    def effective_directions(self) -> dict[str, float]:
        """1 / sum(w^2) of every pair: how many directions its weights amount to."""
        effective = {}
        for group in self._groups:
            if group.weights is None and self.basis != "curvature":  # a whole number, without rounding
                values = [float(selected_count(self.rank, group.r))] * len(group.names)
            else:
                values = (1.0 / self._weights(group).square().sum(-1)).tolist()
            effective.update(zip(group.names, values, strict=True))
        return effective

    def direction_weights(self) -> dict[str, Tensor]:
        """The weights (r,) of every pair's directions, falling singular value first; zero outside the selection.

        Of the basis "curvature" the eigenvalues of the smaller one of the two factors, divided by their sum.
        """
        return {
            name: row for group in self._groups for name, row in zip(group.names, self._weights(group), strict=True)
        }

    def update_spectra(self) -> dict[str, Tensor]:
        """Singular values (r,) of the update in which every pair's directions were chosen, in units of the largest.

        Falling; 0 for those that the driver "randomized" does not look for, and all 0 before a pair's first choice and
        with the basis "curvature".
        """
        return {
            name: row for group in self._groups for name, row in zip(group.names, self._spectrum(group), strict=True)
        }

    def state_dict(self) -> dict:
        """All that a resumed run needs to continue bit for bit: counters, directions, the held gradient."""
        groups = [{key: getattr(group, key) for key in _CHOSEN} for group in self._groups]
        pairs = {name: list(W.shape) for name, W in zip(self._names, self._students, strict=True)}
        counters = {key: getattr(self, key) for key in _COUNTERS}
        settings = {key: getattr(self, key) for key in _SETTINGS}
        held = {"held": self._held, "origin": self._origin, "starts": self._starts}
        return {"pairs": pairs, "settings": settings, "counters": counters, "groups": groups, **held}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`; the pairs must have the same names and shapes, or a ValueError says so."""
        if list(state["pairs"]) != self._names:
            raise ValueError("the saved DSKD state belongs to other layer pairs")
        for name, W in zip(self._names, self._students, strict=True):
            if state["pairs"][name] != list(W.shape):
                raise ValueError(
                    f"the saved DSKD state has the shape {state['pairs'][name]} for {name}, not {shape_of(W)}"
                )
        for key, value in state["settings"].items():
            if value != getattr(self, key):
                raise ValueError(f"the saved DSKD state has {key} {value}, not {getattr(self, key)}")
        for group, saved in zip(self._groups, state["groups"], strict=True):
            for key, value in saved.items():
                setattr(group, key, _like(value, group.students[0]))
        for key, value in state["counters"].items():
            setattr(self, key, value)
        self._origin, self._starts = (
            [_like(tensor, W) for tensor, W in zip(state[key], self._students, strict=False)]
            for key in ("origin", "starts")
        )
        self._held = None
        if state["held"] is not None:
            constant, gradients = state["held"]
            self._held = (
                _like(constant, self._students[0]),
                [
                    torch.empty_like(W.detach(), dtype=D.dtype).copy_(D)
                    for D, W in zip(gradients, self._students, strict=True)
                ],
            )

    def _weights(self, group: Group) -> Tensor:
        if group.weights is not None:
            return group.weights
        if self.basis == "curvature" and group.right is not None:
            return torch.linalg.eigvalsh(group.right).flip(-1).clamp(min=0) / group.r
        like = working(group.students[0].detach())
        uniform = select_directions(like.new_zeros(group.r), self.rank)  # equal scores: 1 / rank on the first ones
        return uniform.expand(len(group.names), -1)

    def _spectrum(self, group: Group) -> Tensor:
        return torch.zeros_like(self._weights(group)) if group.spectrum is None else group.spectrum

    def _copies(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self._students]

    def _samples(self) -> list[Tensor]:
        return [flat(W.detach())[::_SAMPLE] for W in self._students]

    def _has_moved(self) -> bool:
        """Whether a student matrix is further than `drift` from where the held gradient is exact."""
        if not (self.drift and self._origin):
            return True
        moved = [torch.linalg.vector_norm(now - W0) for now, W0 in zip(self._samples(), self._origin, strict=True)]
        size = [torch.linalg.vector_norm(W0) for W0 in self._origin]
        return bool((torch.stack(moved) > self.drift * torch.stack(size)).any())

    @torch.no_grad()
    def _choose_directions(self, before: list, grads: list, alpha: float, skip: set[str]) -> bool:
        """Score and select anew; False, with nothing changed, if a gradient or an update is not finite."""
        self._agree_on_seed()
        updates = [start.neg_().add_(after.detach()) for after, start in zip(self._students, before, strict=True)]
        present = [tensor for tensor in (*updates, *grads) if tensor is not None]
        largest = torch.stack([torch.linalg.vector_norm(tensor, torch.inf).double() for tensor in present]).tolist()
        if not all(map(math.isfinite, largest)):
            if not self._warned:
                warnings.warn("DSKD: a gradient or update is not finite; its directions stay as they are", stacklevel=4)
                self._warned = True
            return False
        if not any(largest[: len(updates)]):
            return False  # a scaler left the step out
        nonzero = {id(tensor) for tensor, entry in zip(present, largest, strict=True) if entry}
        by_student = {id(W): (dW, G) for W, dW, G in zip(self._students, updates, grads, strict=True)}
        chosen: set[str] = set()
        for group in self._groups:
            dW, G = zip(*(by_student[id(W)] for W in group.students), strict=True)
            moved = [
                i
                for i, name in enumerate(group.names)
                if name not in skip and id(dW[i]) in nonzero and id(G[i]) in nonzero
            ]
            if moved and self.basis == "curvature":
                self._add_curvature(group, moved, G)
            elif moved:
                self._choose_for_group(group, moved, dW, G, alpha)
            if moved:
                chosen.update(group.names[i] for i in moved)
        if self.span == "interval":  # a new list of new tensors: saved states keep the former ones
            starts = zip(self._names, self._students, self._starts, strict=True)
            self._starts = [W.detach().clone() if name in chosen else start for name, W, start in starts]
        self.choices += 1
        return True

    def _choose_for_group(self, group: Group, moved: list[int], dW: Sequence, G: Sequence, alpha: float) -> None:
        if self.basis == "update" and group.left is None:
            self._start_directions(group)
        former = (self._weights(group), group.left, group.right, self._spectrum(group))
        chosen = [None if tensor is None else tensor.clone() for tensor in former]  # saved states keep the former ones
        for rows in group.rounds(moved):
            mine = share(rows)
            fresh = [None if tensor is None else tensor[mine] for tensor in chosen]
            if mine:
                update_mn, grad_mn = (unit_scale(group.stack(tensors, mine)) for tensors in (dW, G))
                sigma_q, V_nq = right_singular(update_mn, self.driver, selected_count(self.rank, group.r))
                sigma_r = pad(sigma_q, (0, group.r - sigma_q.shape[-1]))
                if self.score == "magnitude":
                    scores = sigma_r
                else:
                    scores = score_directions(update_mn, grad_mn, V_nq, alpha, self.score == "tempered")
                if self.score == "random":
                    scores = self._dealt_out(scores, [group.names[i] for i in mine], V_nq.shape[-1])
                fresh[0] = select_directions(scores, self.rank)
                if group.left is not None:
                    fresh[1], fresh[2] = self._directions(update_mn, V_nq, fresh[0])
                fresh[3] = sigma_r / sigma_r[..., :1]
            for kept, new in zip(chosen, fresh, strict=True):
                if kept is not None:
                    kept[rows] = collect(new, len(rows))
        group.weights, group.left, group.right, group.spectrum = chosen

    def _add_curvature(self, group: Group, moved: list[int], G: Sequence) -> None:
        """The running means, whose first value is the identity: all directions alike."""
        means = []
        for former, size in ((group.left, group.m), (group.right, group.r)):
            start = torch.eye(size, dtype=group.dtype, device=group.students[0].device)
            means.append(start.expand(len(group.names), size, size) if former is None else former)
        for rows in group.rounds(moved):
            mine = share(rows)
            new = [_rows(mean, mine) for mean in means]
            if mine:
                new = add_curvature(*new, group.stack(G, mine), 1.0 - _MEMORY)
            means = [_with_rows(mean, rows, collect(part, len(rows))) for mean, part in zip(means, new, strict=True)]
        group.left, group.right = means

    def _agree_on_seed(self) -> None:
        """At the first use: between the making of the loss and that a model may change its device."""
        if not (self.expansions or self.choices):
            self._seed = agreed(self._seed, self._students[0].device)

    def _dealt_out(self, scores: Tensor, names: list[str], found: int) -> Tensor:
        """Scores (rows, r) in random order among the first `found`, those that the driver finds."""
        order = torch.stack([torch.randperm(found, generator=g) for g in self._generators(names, 1)])
        return torch.cat([scores.gather(-1, order.to(scores.device)), scores[..., found:]], -1)

    def _generators(self, names: list[str], *purpose: int) -> list[torch.Generator]:
        """One a pair, a function of the step, so that ranks agree and resumed runs repeat."""
        return [self._generator(self.steps, self._names.index(name), *purpose) for name in names]

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self._seed, *key)) % 2**63)

    def _start_directions(self, group: Group) -> None:
        """For `update` before there is one: the leading directions of the student's weights."""
        left, right = [], []
        for rows in group.rounds(range(len(group.names))):
            student_mn = unit_scale(group.stack(group.students, rows))
            _, V_nq = right_singular(student_mn, self.driver, selected_count(self.rank, group.r))
            directions = self._directions(student_mn, V_nq, self._weights(group)[rows])
            for side, found in zip((left, right), directions, strict=True):
                side.append(found)
        group.left, group.right = torch.cat(left), torch.cat(right)

    def _directions(self, matrix_mn: Tensor, V_nq: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """u_i and v_i as columns, largest weight first, of the selected directions of (rows, m, n) matrices."""
        found = weights[..., : V_nq.shape[-1]]
        right = columns(V_nq, found.topk(selected_count(self.rank, weights.shape[-1])).indices)
        return normalize(matrix_mn @ right, dim=-2), right

    def _expand(self) -> tuple[Tensor, list[Tensor]]:
        """The exact loss and gradient at the present weights, as the expansion that `_HeldGradient` evaluates."""
        self._agree_on_seed()
        count = len(self._students)
        total, by_name = 0.0, {}
        autocast = torch.autocast(self._students[0].device.type, enabled=False)
        with torch.inference_mode(False), autocast:  # tensors of inference could not be held for the training
            for group in self._groups:
                for rows in group.rounds(range(len(group.names))):
                    losses, gradients = self._exact(group, rows)
                    total = total + losses.sum() / count
                    for i, D in zip(rows, gradients.div_(count), strict=True):
                        W = group.students[i]
                        D = D if as_matrix(W).shape == D.shape else D.mT
                        # the layout of the weight (channels_last, say), so that inner products need no copy
                        D = torch.empty_like(W.detach(), dtype=D.dtype).copy_(D.reshape(W.shape))
                        by_name[group.names[i]] = D
            gradients = [by_name[name] for name in self._names]
            return total - inner_product(gradients, [W.detach() for W in self._students]), gradients

    def _exact(self, group: Group, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Losses (rows,) and gradients (rows, m, n) of some pairs of a group."""
        mine = share(rows)
        if mine:
            student_mn = group.stack(group.students, mine).requires_grad_(self.direction != "released")
            with torch.enable_grad():
                aligned = self._align(group, student_mn, mine)
                if self.direction == "released":
                    gradients = self._released(group, student_mn, mine)
                else:
                    (gradients,) = torch.autograd.grad(aligned.sum(), student_mn)
            losses = aligned.detach()
        else:  # more ranks than rows
            losses = torch.zeros(0, dtype=group.dtype, device=group.students[0].device)
            gradients = losses.new_zeros(0, group.m, group.r)
        losses, gradients = collect(losses, len(rows)), collect(gradients, len(rows))
        redirected = self.direction in ("plain", "random")
        return losses, self._redirected(group, rows, gradients) if redirected else gradients

    def _released(self, group: Group, student_mn: Tensor, rows: list[int]) -> Tensor:
        """The release's gradients (rows, m, n) of some pairs of a group; it does not turn wide matrices."""
        teacher_mn, weights = group.stack(group.teachers, rows), self._weights(group)[rows]
        teacher_V_nn = self._teacher_V(group, teacher_mn, rows)
        low_rank_mn = (teacher_mn @ teacher_V_nn * weights.sqrt().unsqueeze(-2)) @ teacher_V_nn.mT
        gradients = torch.empty_like(student_mn)
        for place, i in enumerate(rows):
            wide = as_matrix(group.students[i]).shape[0] < group.m
            turned = [matrix.mT if wide else matrix for matrix in (student_mn[place], low_rank_mn[place])]
            found = released_gradient(*turned, weights[place])
            gradients[place] = found.mT if wide else found
        return gradients

    def _redirected(self, group: Group, rows: list[int], gradients: Tensor) -> Tensor:
        """Gradients of the same norms along the control arm's directions."""
        if self.direction == "plain":
            other = group.stack(group.students, rows) - group.stack(group.teachers, rows)
        else:
            generators = self._generators([group.names[i] for i in rows])
            shape, dtype = gradients.shape[1:], gradients.dtype
            other = torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in generators]).to(gradients.device)
        wanted, norm = (torch.linalg.matrix_norm(each, keepdim=True) for each in (gradients, other))
        return other * (wanted / torch.where(norm > 0, norm, 1.0))

    def _align(self, group: Group, student_mn: Tensor, rows: list[int]) -> Tensor:
        """Exact losses (rows,) of some pairs of a group."""
        teacher_mn = group.stack(group.teachers, rows)
        if self.direction == "shuffled":
            names = [group.names[i] for i in rows]
            teacher_mn = torch.stack([self._shuffled(*each) for each in zip(names, teacher_mn, strict=True)])
        elif self.direction == "shrink":
            teacher_mn = torch.zeros_like(teacher_mn)
        if self.basis == "update":
            if group.left is None:
                self._start_directions(group)
            chosen = self._weights(group)[rows].topk(group.left.shape[-1]).values
            return update_alignment(student_mn, teacher_mn, chosen, group.left[rows], group.right[rows])
        if self.basis == "curvature" and group.left is not None:
            factors = (_rows(group.left, rows), _rows(group.right, rows))
            if self.score == "random":
                names = [group.names[i] for i in rows]
                factors = (self._reordered(names, factor, place) for place, factor in enumerate(factors))
            return curvature_alignment(student_mn, teacher_mn, *factors)
        if group.weights is None and selected_count(self.rank, group.r) == group.r:
            return (student_mn - teacher_mn).square().sum((-2, -1)) / group.r  # equal weights: W~ = W / sqrt(r)
        count = selected_count(self.rank, group.r)
        teacher_V_nn, weights = self._teacher_V(group, teacher_mn, rows), self._weights(group)[rows]
        return own_alignment(student_mn, teacher_mn, teacher_V_nn, weights, count, self.driver, self.smoothing)

    def _shuffled(self, name: str, teacher_mn: Tensor) -> Tensor:
        """A pair's teacher with its rows and columns in a random order, the same at every call."""
        generator = self._generator(self._names.index(name))
        for dim, size in enumerate(teacher_mn.shape):
            order = torch.randperm(size, generator=generator)
            teacher_mn = teacher_mn.index_select(dim, order.to(teacher_mn.device))
        return teacher_mn

    def _reordered(self, names: list[str], factors: Tensor, place: int) -> Tensor:
        """Factors (rows, n, n) with the rows and columns of each in one random order, the same at every call."""
        generators = [self._generator(self._names.index(name), place) for name in names]
        order = torch.stack([torch.randperm(factors.shape[-1], generator=g) for g in generators]).to(factors.device)
        return columns(columns(factors, order).mT, order)

    def _teacher_V(self, group: Group, teacher_mn: Tensor, rows: list[int]) -> Tensor:
        """Right singular vectors (rows, n, n); the teacher is frozen: decomposed once."""
        for i, matrix_mn in zip(rows, teacher_mn, strict=True):
            if i not in group.teacher_V:
                _, group.teacher_V[i] = right_singular(matrix_mn, self.driver)
        return torch.stack([group.teacher_V[i] for i in rows])


def _rows(stack: Tensor, rows: list[int]) -> Tensor:
    """stack[rows], without a copy where that is all of it."""
    return stack if rows == list(range(len(stack))) else stack[rows]


def _with_rows(stack: Tensor, rows: list[int], new: Tensor) -> Tensor:
    """The stack with new values in some rows; the former is left as it is, since saved states keep it."""
    if rows == list(range(len(stack))):
        return new
    changed = stack.clone()
    changed[rows] = new
    return changed


def _like(value: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if value is None else value.to(weight.device)
