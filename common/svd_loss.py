"""DSKD, Direction Sensitivity-based Knowledge Distillation: align a student's weights with its teacher's along the
singular directions that the optimiser is most sensitive to right now.

    dskd = DirectionSensitivityLoss(pairs, rank=32, svd_steps=100)   # pairs: [(name, student_weight, teacher_weight)]
    loss = task_loss + lambda_size * dskd()
    loss.backward()
    with dskd.observe(progress=step / total_steps):
        optimizer.step()

The pure functions below stand beside the formulas of docs/method.md. Shapes: matrices are (..., m, n) with any leading
batch dimensions and r = min(m, n); suffixes name them (`V_nr` is n x r). Every formula is symmetric under
transposition, so wide matrices are turned (`tall`) and m >= n holds inside. Nothing needs the left singular vectors:
sigma_i u_i is W v_i, which stays accurate where sigma_i is tiny.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.matrices import (
    DRIVERS,
    as_matrix,
    inner_product,
    right_singular,
    shape_of,
    tall,
    unit_scale,
    working,
)
from common.ranks import exchange, share

BASES = ("own", "update")
DIRECTIONS = ("sensitive", "plain", "random")


def _without_autocast(function):
    """Mixed precision must not reach the method's products of matrices."""

    @wraps(function)
    def wrapped(first, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapped


@_without_autocast
def direction_sensitivity(update: Tensor, grad: Tensor, alpha: float, driver: str = "svd") -> Tensor:
    """Sensitivity J of every singular direction of a parameter update (method.md, steps 1 to 3).

    J_i = (1 - alpha) g_i / sum(g) + alpha c_i / sum(c), with first order g_i = sigma_i |u_i^T G v_i| and second order
    c_i = 1/2 sigma_i^2 (u_i^T G G^T u_i)(v_i^T G^T G v_i), the Kronecker-factored empirical Fisher (Martens & Grosse,
    ICML 2015) as curvature. The scales of update and gradient cancel.

    Args:
        update: (..., m, n), the weight after the optimizer step minus the weight before it.
        grad: (..., m, n), the gradient at that step.
        alpha: training progress in [0, 1]: gradient rules at 0, curvature at 1.
        driver: the decomposition, see `right_singular`.

    Returns:
        (..., r) scores in the order of falling singular values of `update`; they sum to 1. A term whose sum is zero
        (zero update or zero gradient) counts as zero, so that all scores of such a matrix are 0.

    Raises:
        ValueError: shapes differ or alpha lies outside [0, 1].
    """
    if update.shape != grad.shape or update.ndim < 2:
        raise ValueError(f"update and grad must be matrices of one shape, got {shape_of(update)} and {shape_of(grad)}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha (training progress) must lie in [0, 1], got {alpha}")
    update_mn, grad_mn = (unit_scale(tall(working(t.detach()))) for t in (update, grad))
    _, V_nr = right_singular(update_mn, driver)
    scaled_left_mr = update_mn @ V_nr  # sigma_i u_i
    grad_right_mr = grad_mn @ V_nr
    first_order = (scaled_left_mr * grad_right_mr).sum(-2).abs()
    second_order = 0.5 * (grad_mn.mT @ scaled_left_mr).square().sum(-2) * grad_right_mr.square().sum(-2)
    return (1.0 - alpha) * _share_of_sum(first_order) + alpha * _share_of_sum(second_order)


def select_directions(scores: Tensor, rank: int) -> Tensor:
    """Weights of the `rank` directions with the largest scores (method.md, steps 4 and 5).

    Over the selected set K the scores are min-max normalised and divided by their sum; everything outside K weighs 0.
    Equal scores: the lower index (larger singular value) is taken first, and a set of equal scores weighs uniformly.

    Args:
        scores: (..., r) finite scores.
        rank: size of K; 0 or anything above r means all r directions.

    Returns:
        (..., r) weights, non-negative, each row summing to 1, in the order of `scores`.

    Raises:
        ValueError: rank is negative.
    """
    k = selected_count(rank, scores.shape[-1])
    top, index = torch.sort(scores, dim=-1, descending=True, stable=True)
    top, index = top[..., :k], index[..., :k]
    above_least = top - top[..., -1:]
    total = above_least.sum(-1, keepdim=True)
    weights = torch.where(total > 0, above_least / total, 1.0 / k)
    return torch.zeros_like(scores).scatter(-1, index, weights)


@_without_autocast
def low_rank_alignment(student: Tensor, teacher: Tensor, weights: Tensor, driver: str = "svd") -> Tensor:
    """Alignment loss of the reading `own`: || W~_s - W~_t ||_F^2 with W~ = sum_i sqrt(w_i) sigma_i u_i v_i^T.

    Each network's *own* singular triplets are taken; index i pairs the student's i-th with the teacher's i-th. The
    gradient with respect to `student` is exact (in closed form, docs/method.md) and stays finite for rank-deficient,
    all-zero and repeated-singular-value matrices; `teacher` and `weights` are constants.

    Args:
        student, teacher: (..., m, n).
        weights: (..., r) from `select_directions`.
        driver: the decomposition, see `right_singular`.

    Returns:
        (...) losses, one a matrix, in float32 or better.

    Raises:
        ValueError: shapes do not match.
    """
    _check_alignment_shapes(student, teacher, weights)
    student_mn, teacher_mn = tall(working(student)), tall(working(teacher.detach()))
    _, V_nr = right_singular(teacher_mn, driver)
    root_r = weights.detach().to(student_mn.dtype).sqrt()
    return _OwnAlignment.apply(student_mn, _low_rank(teacher_mn, V_nr, root_r), root_r, driver)


@_without_autocast
def update_alignment(student: Tensor, teacher: Tensor, weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Alignment loss of the reading `update`: sum_i w_i (u_i^T (W_s - W_t) v_i)^2 along the directions of an update.

    Args:
        student, teacher: (..., m, n).
        weights: (..., k) weights of the directions.
        left, right: (..., m, k) and (..., n, k), the directions u_i and v_i as columns.

    Returns:
        (...) losses, differentiable by autograd.
    """
    gap_mn = working(student) - working(teacher.detach())
    along_k = (left * (gap_mn @ right)).sum(-2)
    return (weights * along_k.square()).sum(-1)


def selected_count(rank: int, r: int) -> int:
    """How many of r directions a rank setting selects: 0 or more than r means all."""
    if rank < 0:
        raise ValueError(f"rank must be 0 (all directions) or positive, got {rank}")
    return min(rank, r) if rank else r


class _OwnAlignment(torch.autograd.Function):
    """|| A P(A) - T ||_F^2 for tall A, where P(A) = V diag(sqrt w) V^T comes from A's own right singular vectors.

    With p = sqrt(w), H = 2 (A P - T), M = A^T A = V diag(sigma^2) V^T, the chain rule for the spectral function
    P of M gives  dP = V (F o (V^T dM V)) V^T  with  F_ij = (p_i - p_j) / (sigma_i^2 - sigma_j^2), F_ii = 0, hence

        D = H P + 2 A V (F o sym(V^T A^T H V)) V^T.

    It is the gradient of docs/method.md, with U eliminated. Where two singular values coincide but their weights
    differ the loss has no derivative; x / (x^2 + eps^2) instead of 1 / x then gives 0 (the mean over the two orders)
    in place of infinity, and differs from 1 / x by (eps / x)^2 elsewhere.
    """

    @staticmethod
    def forward(ctx, student_mn: Tensor, teacher_low_rank_mn: Tensor, root_r: Tensor, driver: str) -> Tensor:
        sigma_n, V_nn = right_singular(student_mn, driver)
        student_V = student_mn @ V_nn
        difference_mn = (student_V * root_r.unsqueeze(-2)) @ V_nn.mT - teacher_low_rank_mn
        if ctx.needs_input_grad[0]:
            H_V = 2 * difference_mn @ V_nn
            scale = sigma_n[..., :1].clamp(min=torch.finfo(sigma_n.dtype).tiny)
            unit_sigma = sigma_n / scale
            gap = unit_sigma.square().unsqueeze(-1) - unit_sigma.square().unsqueeze(-2)
            floor = 100 * torch.finfo(gap.dtype).eps
            F = (root_r.unsqueeze(-1) - root_r.unsqueeze(-2)) * gap / (gap.square() + floor**2)
            unit_student_V = student_V / scale.unsqueeze(-1)
            Q = unit_student_V.mT @ H_V
            rotation = unit_student_V @ (F * (Q + Q.mT))  # 2 A V (F o sym(Q)), both factors A scaled by 1 / sigma_0
            ctx.save_for_backward((H_V * root_r.unsqueeze(-2) + rotation) @ V_nn.mT)
        return difference_mn.square().sum((-2, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient_mn,) = ctx.saved_tensors
        return grad_output[..., None, None] * gradient_mn, None, None, None


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


class _Group:
    """Pairs of one (tall) shape, decomposed together. Tensors: (pairs, ...) stacks in the working precision."""

    def __init__(self, names: list[str], students: list[Tensor], teachers: list[Tensor]):
        self.names, self.students, self.teachers = names, students, teachers
        self.m, self.r = tall(as_matrix(students[0])).shape
        self.dtype = working(students[0].detach()).dtype
        self.teacher_V: Tensor | None = None
        self.weights = self.left = self.right = None  # None: no refresh has chosen directions yet

    def stack(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        return torch.stack([tall(working(as_matrix(tensors[i].detach()))) for i in rows]).to(self.dtype)


class DirectionSensitivityLoss:
    """L_DSKD, the mean alignment loss over matched pairs of layers, with directions that follow the optimiser.

    Calling it gives the loss; `observe` around every optimizer step counts the steps and, every `svd_steps` of them,
    chooses the directions anew. Between two recomputations of the exact gradient the loss is its first-order
    expansion, whose gradient is the exact one of `grad_steps` optimizer steps ago at most: no decomposition, no
    product of matrices and no host synchronisation in such a step. Calls within one optimizer step (gradient
    accumulation) see the same expansion.

    Degenerate input: a pair in `observe`'s `skip`, without a gradient, or with a zero gradient or update keeps its
    former directions; a non-finite gradient or update (an overflow under a gradient scaler) postpones the refresh to
    the next step, with one warning. Float64 weights are worked on in float64, all others in float32.

    Args:
        pairs: (name, student weight, teacher weight) of every matched layer, names unique. Weights of 3 and more
            dimensions (out, in, kh, kw) are read as (out, in * kh * kw).
        rank: directions to select per pair (0 = all).
        svd_steps: optimizer steps between two selections of directions.
        basis: "own" = each network's own singular triplets, "update" = the directions of the parameter update
            itself (until a pair's first refresh, the leading directions of the student's weight).
        grad_steps: optimizer steps for which an exact gradient is held (1 = exact in every step); `None` =
            `svd_steps`.
        driver: "gram" or "svd", see `right_singular`.
        direction: "sensitive" is DSKD. The others are its control arms, which replace every matrix's gradient by
            another one of equal norm: "plain" by W_s - W_t, "random" by a random direction drawn at every expansion.

    Raises:
        ValueError: no pairs, a repeated name, shapes of a pair that differ, or a setting out of range.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, Tensor, Tensor]],
        rank: int = 32,
        svd_steps: int = 100,
        *,
        basis: str = "own",
        grad_steps: int | None = None,
        driver: str = "gram",
        direction: str = "sensitive",
    ):
        _check_pairs(pairs)
        grad_steps = svd_steps if grad_steps is None else grad_steps
        for name, value, valid in (
            ("basis", basis, BASES),
            ("driver", driver, DRIVERS),
            ("direction", direction, DIRECTIONS),
        ):
            if value not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
        for name, value in (("svd_steps", svd_steps), ("grad_steps", grad_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        selected_count(rank, 1)
        self.rank, self.svd_steps, self.grad_steps = rank, svd_steps, grad_steps
        self.basis, self.driver, self.direction = basis, driver, direction
        self.steps = 0  # optimizer steps seen
        self._names = [name for name, _, _ in pairs]
        self._students = [student for _, student, _ in pairs]
        self._groups = _group_by_shape(pairs)
        self._held: tuple[Tensor, list[Tensor]] | None = None  # constant, gradients D / pairs
        self._held_since = 0
        self._postponed = False
        self._warned = False
        self._seed = torch.initial_seed()  # of the run, which the random control arm follows

    def __call__(self) -> Tensor:
        """The loss, a scalar in the working precision; its gradient goes to the student's weights."""
        if self._held is None:
            self._held = self._expand()
            self._held_since = self.steps
        constant, gradients = self._held
        with torch.autocast(constant.device.type, enabled=False):
            return _HeldGradient.apply(constant, gradients, *self._students)

    @contextmanager
    def observe(self, progress: float, skip: Collection[str] = ()) -> Iterator[None]:
        """Bracket one optimizer step, which must be taken inside.

        In a distributed run `skip` and which weights have a gradient must be the same on every rank.

        Args:
            progress: alpha, optimizer steps done / planned, in [0, 1].
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
        if due:  # the gradient is copied, too: some optimizers (Nesterov momentum) change it in place
            before = [weight.detach().clone() for weight in self._students]
            grads = [None if weight.grad is None else weight.grad.detach().clone() for weight in self._students]
        yield
        self.steps += 1
        if due:
            with torch.autocast(self._students[0].device.type, enabled=False):
                self._postponed = not self._choose_directions(before, grads, progress, set(skip))
        if (due and not self._postponed) or self.steps - self._held_since >= self.grad_steps:
            self._held = None

    def effective_directions(self) -> dict[str, float]:
        """1 / sum(w^2) of every pair: how many directions its weights amount to."""
        effective = {}
        for group in self._groups:
            if group.weights is None:
                values = [float(selected_count(self.rank, group.r))] * len(group.names)
            else:
                values = (1.0 / group.weights.square().sum(-1)).tolist()
            effective.update(zip(group.names, values, strict=True))
        return effective

    def direction_weights(self) -> dict[str, Tensor]:
        """The weights (r,) of every pair's directions, falling singular value first; zero outside the selection."""
        return {
            name: row for group in self._groups for name, row in zip(group.names, self._weights(group), strict=True)
        }

    def state_dict(self) -> dict:
        """All that a resumed run needs to continue bit for bit: counters, directions, the held gradient."""
        groups = [{"weights": g.weights, "left": g.left, "right": g.right} for g in self._groups]
        pairs = {name: list(W.shape) for name, W in zip(self._names, self._students, strict=True)}
        counters = {"steps": self.steps, "held_since": self._held_since, "postponed": self._postponed}
        settings = {"rank": self.rank, "basis": self.basis, "direction": self.direction}
        return {"pairs": pairs, "settings": settings, "counters": counters, "groups": groups, "held": self._held}

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
        self.steps = state["counters"]["steps"]
        self._held_since = state["counters"]["held_since"]
        self._postponed = state["counters"]["postponed"]
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

    def _weights(self, group: _Group) -> Tensor:
        if group.weights is not None:
            return group.weights
        like = working(group.students[0].detach())
        uniform = select_directions(like.new_zeros(group.r), self.rank)  # equal scores: 1 / rank on the first ones
        return uniform.expand(len(group.names), -1)

    @torch.no_grad()
    def _choose_directions(self, before: list, grads: list, progress: float, skip: set[str]) -> bool:
        """Score and select anew; False, with nothing changed, if a gradient or an update is not finite."""
        updates = [start.neg_().add_(after.detach()) for after, start in zip(self._students, before, strict=True)]
        present = [tensor for tensor in (*updates, *grads) if tensor is not None]
        if not torch.stack([tensor.isfinite().all() for tensor in present]).all():
            if not self._warned:
                warnings.warn("DSKD: a gradient or update is not finite; its directions stay as they are", stacklevel=4)
                self._warned = True
            return False
        if not torch.stack([dW.any() for dW in updates]).any():
            return False  # a scaler left the step out
        by_student = {id(W): (dW, G) for W, dW, G in zip(self._students, updates, grads, strict=True)}
        for group in self._groups:
            dW, G = zip(*(by_student[id(W)] for W in group.students), strict=True)
            moved = [
                i
                for i, name in enumerate(group.names)
                if name not in skip and G[i] is not None and bool(G[i].any()) and bool(dW[i].any())
            ]
            if moved:
                self._choose_for_group(group, moved, dW, G, progress)
        return True

    def _choose_for_group(self, group: _Group, moved: list[int], dW: Sequence, G: Sequence, progress: float) -> None:
        mine = share(moved)
        rows = [moved.index(i) for i in mine]
        fresh = self._weights(group).new_zeros(len(moved), group.r)
        if mine:
            update_mn = group.stack(dW, mine)
            scores = direction_sensitivity(update_mn, group.stack(G, mine), progress, self.driver)
            fresh[rows] = select_directions(scores, self.rank)
        weights = self._weights(group).clone()
        weights[moved] = exchange(fresh)
        if self.basis == "update":
            if group.left is None:
                self._start_directions(group)
            left, right = (
                group.left.new_zeros(len(moved), *group.left.shape[1:]),
                fresh.new_zeros(len(moved), *group.right.shape[1:]),
            )
            if mine:
                left[rows], right[rows] = self._directions(update_mn, fresh[rows])
            group.left, group.right = group.left.clone(), group.right.clone()  # saved states keep the former
            group.left[moved], group.right[moved] = exchange(left), exchange(right)
        group.weights = weights

    def _start_directions(self, group: _Group) -> None:
        """For `update` before there is one: the leading directions of the student's weights."""
        everyone = range(len(group.names))
        group.left, group.right = self._directions(group.stack(group.students, everyone), self._weights(group))

    def _directions(self, matrix_mn: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """u_i and v_i as columns, largest weight first, of the selected directions of (rows, m, n) matrices."""
        scaled_mn = unit_scale(matrix_mn)
        _, V_nr = right_singular(scaled_mn, self.driver)
        chosen = weights.topk(selected_count(self.rank, weights.shape[-1])).indices.unsqueeze(-2)
        right = V_nr.gather(-1, chosen.expand(-1, V_nr.shape[-2], -1))
        return normalize(scaled_mn @ right, dim=-2), right

    def _expand(self) -> tuple[Tensor, list[Tensor]]:
        """The exact loss and gradient at the present weights, as the expansion that `_HeldGradient` evaluates."""
        count = len(self._students)
        total, by_name = 0.0, {}
        with torch.autocast(self._students[0].device.type, enabled=False):
            for group in self._groups:
                mine = share(range(len(group.names)))
                losses = working(group.students[0].detach()).new_zeros(len(group.names))
                gradients = losses.new_zeros(len(group.names), group.m, group.r)
                if mine:
                    student_mn = group.stack(group.students, mine).requires_grad_()
                    with torch.enable_grad():
                        aligned = self._align(group, student_mn, mine)
                        (gradients[mine],) = torch.autograd.grad(aligned.sum(), student_mn)
                    losses[mine] = aligned.detach()
                total = total + exchange(losses).sum() / count
                gradients = exchange(gradients) / count
                if self.direction != "sensitive":
                    gradients = self._redirected(group, gradients)
                for name, W, D in zip(group.names, group.students, gradients, strict=True):
                    D = D if as_matrix(W).shape == D.shape else D.mT
                    # the layout of the weight (channels_last, say), so that inner products need no copy
                    by_name[name] = torch.empty_like(W.detach(), dtype=D.dtype).copy_(D.reshape(W.shape))
        gradients = [by_name[name] for name in self._names]
        return total - inner_product(gradients, [W.detach() for W in self._students]), gradients

    def _redirected(self, group: _Group, gradients: Tensor) -> Tensor:
        """Gradients of the same norms along the control arm's directions."""
        everyone = range(len(group.names))
        if self.direction == "plain":
            other = group.stack(group.students, everyone) - group.stack(group.teachers, everyone)
        else:  # a function of the step, so that ranks agree and resumed runs repeat
            generator = torch.Generator().manual_seed(hash((self._seed, self.steps, self._groups.index(group))) % 2**63)
            other = torch.randn(gradients.shape, generator=generator, dtype=gradients.dtype).to(gradients.device)
        wanted, norm = (torch.linalg.matrix_norm(each, keepdim=True) for each in (gradients, other))
        return other * (wanted / torch.where(norm > 0, norm, 1.0))

    def _align(self, group: _Group, student_mn: Tensor, rows: list[int]) -> Tensor:
        """Exact losses (rows,) of some pairs of a group."""
        teacher_mn = group.stack(group.teachers, rows)
        weights = self._weights(group)[rows]
        if self.basis == "update":
            if group.left is None:
                self._start_directions(group)
            chosen = weights.topk(group.left.shape[-1]).values
            return update_alignment(student_mn, teacher_mn, chosen, group.left[rows], group.right[rows])
        if group.weights is None and selected_count(self.rank, group.r) == group.r:
            return (student_mn - teacher_mn).square().sum((-2, -1)) / group.r  # equal weights: W~ = W / sqrt(r)
        if group.teacher_V is None:  # the teacher is frozen: decomposed once
            _, group.teacher_V = right_singular(teacher_mn, self.driver)
        root_r = weights.sqrt()
        return _OwnAlignment.apply(student_mn, _low_rank(teacher_mn, group.teacher_V, root_r), root_r, self.driver)


def _group_by_shape(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> list[_Group]:
    members: dict[tuple, list] = {}
    for pair in pairs:
        weight = pair[1]
        key = (tall(as_matrix(weight)).shape, working(weight).dtype, weight.device)
        members.setdefault(key, []).append(pair)
    return [_Group(*(list(column) for column in zip(*group, strict=True))) for group in members.values()]


def _check_pairs(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> None:
    if not pairs:
        raise ValueError("DSKD needs at least one pair of layers")
    names = [name for name, _, _ in pairs]
    for name, student, teacher in pairs:
        if names.count(name) > 1:
            raise ValueError(f"the pair name {name!r} occurs {names.count(name)} times")
        if student.shape != teacher.shape or student.ndim < 2:
            raise ValueError(f"pair {name}: student {shape_of(student)} and teacher {shape_of(teacher)} must match")


def _check_alignment_shapes(student: Tensor, teacher: Tensor, weights: Tensor) -> None:
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(f"student {shape_of(student)} and teacher {shape_of(teacher)} must be matrices of one shape")
    expected = (*student.shape[:-2], min(student.shape[-2:]))
    if tuple(weights.shape) != expected:
        raise ValueError(f"weights must have the shape {expected}, got {shape_of(weights)}")


def _low_rank(matrix_mn: Tensor, V_nr: Tensor, root_r: Tensor) -> Tensor:
    return (matrix_mn @ V_nr * root_r.unsqueeze(-2)) @ V_nr.mT


def _like(value: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if value is None else value.to(weight.device)


def _share_of_sum(scores: Tensor) -> Tensor:
    total = scores.sum(-1, keepdim=True)
    return scores / torch.where(total > 0, total, 1.0)
