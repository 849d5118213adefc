"""DirectionSensitivityLoss in small training runs, each recomputed with the float64 oracle.

`python -m pytest tests/dskd/test_loss.py` compares with tests/golden/svd_loss.json. After a change of the numerics
that is meant, write the file anew with `PYTHONPATH=.:tests/helpers python tests/dskd/test_loss.py` and say why in the
commit.
"""

import contextlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from losses import make_loss
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dskd import Curvature, DirectionSensitivityLoss, Own, Update
from dskd.matrices import DRIVERS

GOLDEN = Path(__file__).parents[1] / "golden" / "svd_loss.json"
SHAPES = {"square": (5, 5), "wide": (4, 7), "tall": (7, 4), "conv": (4, 2, 3, 3)}
TOTAL = 20  # planned steps
BASES = ("own", "update", "curvature")
every_basis = pytest.mark.parametrize("basis", BASES)
SINGULAR_BASES = ("own", "update")  # of singular directions
every_singular_basis = pytest.mark.parametrize("basis", SINGULAR_BASES)


def rank_of(basis: str | None) -> int:
    """3 of the directions, but "curvature" takes all."""
    return 0 if basis == "curvature" else 3


class Run:
    """A small model with one weight per shape, a quadratic task loss, and DSKD beside it."""

    def __init__(self, *, dtype=torch.float64, shapes=SHAPES, layout=torch.contiguous_format, lr=0.02, **settings):
        generator = torch.Generator().manual_seed(11)

        def draw(shape) -> Tensor:
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return value.to(memory_format=layout) if value.ndim == 4 else value

        self.students = {name: nn.Parameter(draw(shape)) for name, shape in shapes.items()}
        self.teachers = {name: draw(shape) for name, shape in shapes.items()}
        self.targets = {name: draw(shape) for name, shape in shapes.items()}
        self.noise = {name: draw((64, *shape)) for name, shape in shapes.items()}
        self.optimizer = torch.optim.SGD(self.students.values(), lr=lr, momentum=0.9)
        pairs = [(name, student, self.teachers[name]) for name, student in self.students.items()]
        self.dskd = make_loss(pairs, **settings)
        self.step = 0

    def task_loss(self) -> Tensor:
        return sum(
            (weight * self.noise[name][self.step] - self.targets[name]).square().sum()
            for name, weight in self.students.items()
        )

    def backward(self, lambda_size: float = 0.1) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.dskd()
        (self.task_loss() + lambda_size * loss).backward()
        return loss.detach()

    def update(self, skip=()) -> None:
        with self.dskd.observe(progress=self.step / TOTAL, skip=skip):
            self.optimizer.step()
        self.step += 1

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self.backward().item())
            self.update()
        return losses

    def gradients(self) -> dict[str, Tensor]:
        return dict(zip(self.students, torch.autograd.grad(self.dskd(), list(self.students.values())), strict=True))

    def copies(self) -> dict[str, np.ndarray]:
        return {name: flat(weight) for name, weight in self.students.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: row.clone() for name, row in self.dskd.direction_weights().items()}


def flat(weight) -> np.ndarray:
    return oracle.as_array(weight).reshape(len(weight), -1)


def oracle_loss(run: Run, w: dict, basis: str, directions: dict | None = None, weights: dict | None = None) -> float:
    """The mean over pairs at `weights` (default: the run's own)."""
    weights = weights or run.copies()
    parts = []
    for name, weight in weights.items():
        teacher = flat(run.teachers[name])
        if basis == "own":
            parts.append(oracle.own_loss(weight, teacher, w[name]))
        else:
            parts.append(oracle.update_loss(weight, teacher, directions[name], w[name]))
    return float(np.mean(parts))


def oracle_gradients(run: Run, w: dict, basis: str, directions: dict | None = None) -> dict[str, Tensor]:
    """Of every pair, divided by the number of pairs, in the shape of the weight."""
    result = {}
    for name, weight in run.copies().items():
        teacher = flat(run.teachers[name])
        if basis == "own":
            value = oracle.own_gradient(weight, teacher, w[name])
        else:
            value = oracle.update_gradient(weight, teacher, directions[name], w[name])
        result[name] = torch.from_numpy(value).view(run.students[name].shape) / len(run.students)
    return result


def first_weights(run: Run, rank: int) -> dict[str, np.ndarray]:
    return {name: oracle.first_weights(min(flat(weight).shape), rank) for name, weight in run.students.items()}


def update_with_oracle(run: Run, rank: int, skip=()) -> tuple[dict, dict]:
    """One optimizer step; the weights that the oracle gives for it, and dW, of all pairs but the skipped."""
    before, grads = run.copies(), {name: flat(weight.grad) for name, weight in run.students.items()}
    alpha = run.step / TOTAL
    run.update(skip)
    updates = {name: after - before[name] for name, after in run.copies().items() if name not in skip}
    return {
        name: oracle.weights(oracle.scores(dW, grads[name], alpha)[2], rank) for name, dW in updates.items()
    }, updates


# Before the first refresh
def test_rank_0_starts_as_the_plain_squared_difference():
    run = Run(rank=0)
    gaps = {name: (student - run.teachers[name]).square().sum() for name, student in run.students.items()}
    assert_close(run.dskd(), (gaps["square"] / 5 + gaps["wide"] / 4 + gaps["tall"] / 4 + gaps["conv"] / 4) / 4)


@pytest.mark.parametrize("rank", [0, 3, 99])
def test_weights_start_uniform_over_the_leading_directions(rank):
    run = Run(rank=rank)
    for name, w in first_weights(run, rank).items():
        assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w))


@every_singular_basis
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("rank", [0, 3])
def test_loss_before_the_first_refresh_equals_the_oracle(basis, driver, rank):
    run = Run(rank=rank, basis=basis, driver=driver)
    expected = oracle_loss(run, first_weights(run, rank), basis, directions=run.copies())
    assert run.dskd().item() == pytest.approx(expected, rel=1e-6)


@every_singular_basis
@pytest.mark.parametrize("rank", [0, 3])
def test_gradient_before_the_first_refresh_equals_the_oracle(basis, rank):
    run = Run(rank=rank, basis=basis)
    expected = oracle_gradients(run, first_weights(run, rank), basis, directions=run.copies())
    assert_close(run.gradients(), expected, rtol=1e-6, atol=1e-6)


# Refreshes
@pytest.mark.parametrize("driver", DRIVERS)
@every_singular_basis
@pytest.mark.parametrize("rank", [0, 3])
def test_directions_follow_the_real_update_and_gradient(rank, basis, driver):
    run = Run(rank=rank, svd_steps=4, basis=basis, driver=driver)
    for step in range(1, 13):
        run.backward()
        expected, updates = update_with_oracle(run, rank)
        if step % 4 == 0:
            for name, w in expected.items():
                assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w), rtol=1e-5, atol=1e-7)
            assert run.dskd().item() == pytest.approx(oracle_loss(run, expected, basis, updates), rel=1e-5)
            assert_close(run.gradients(), oracle_gradients(run, expected, basis, updates), rtol=1e-5, atol=1e-6)


@every_basis
def test_directions_change_at_multiples_of_svd_steps_and_only_there(basis):
    run = Run(rank=rank_of(basis), svd_steps=4, basis=basis)
    changed = []
    for step in range(1, 13):
        before = run.weights()
        run.train(1)
        if any(not torch.equal(before[name], w) for name, w in run.weights().items()):
            changed.append(step)
    assert changed == [4, 8, 12]


@pytest.mark.parametrize("lambda_size", [0.0, 3.0])
def test_the_gradient_that_counts_is_the_one_of_the_whole_loss(lambda_size):
    run = Run(rank=3, svd_steps=1)
    run.backward(lambda_size)
    expected, _ = update_with_oracle(run, 3)
    for name, w in expected.items():
        assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w), rtol=1e-5, atol=1e-7)


def test_nesterov_momentum_does_not_change_the_gradient_that_is_seen():
    run = Run(rank=3, svd_steps=3)
    run.optimizer = torch.optim.SGD(run.students.values(), lr=0.05, momentum=0.9, nesterov=True, foreach=True)
    run.train(3)  # the third step shows that gradients must be copied, so that the fourth makes up for it
    run.backward()
    before = run.students["square"].grad.clone()
    expected, _ = update_with_oracle(run, 3)
    assert not torch.equal(before, run.students["square"].grad), "this optimizer no longer changes .grad in place"
    for name, w in expected.items():
        assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w), rtol=1e-5, atol=1e-7)


@every_basis
def test_a_scaled_gradient_gives_the_same_directions(basis):
    plain, scaled = (Run(rank=rank_of(basis), svd_steps=1, basis=basis) for _ in range(2))
    plain.train(1)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**16)
    scaler.scale(scaled.task_loss() + 0.1 * scaled.dskd()).backward()
    with scaled.dskd.observe(progress=0.0):
        scaler.step(scaled.optimizer)
    scaler.update()
    assert_close(scaled.weights(), plain.weights(), rtol=1e-9, atol=1e-12)
    assert_close(scaled.dskd(), plain.dskd(), rtol=1e-9, atol=0)


def test_both_bases_agree_where_the_update_has_the_weights_own_directions():
    generator = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(n, 4, generator=generator, dtype=torch.float64)).Q for n in (6, 5))

    def along(*sigma: float) -> Tensor:
        return U @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ V.mT

    grad = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    losses, gradients, student_sigma, teacher_sigma = {}, {}, (8.4, 6.3, 4.2, 2.1), (9.0, 5.0, 4.0, 3.0)
    for basis in SINGULAR_BASES:
        weight = nn.Parameter(along(8.0, 6.0, 4.0, 2.0))
        dskd = make_loss([("layer", weight, along(*teacher_sigma))], rank=3, svd_steps=1, basis=basis)
        weight.grad = grad
        with dskd.observe(progress=0.5), torch.no_grad():
            weight.add_(along(0.4, 0.3, 0.2, 0.1))
        losses[basis] = dskd().item()
        gradients[basis] = (U * torch.autograd.grad(dskd(), weight)[0].matmul(V)).sum(0)
        w = dskd.direction_weights()["layer"]
    gaps = zip(w.tolist(), student_sigma, teacher_sigma, strict=False)
    expected = sum(w_i * (s - t) ** 2 for w_i, s, t in gaps)
    assert losses["own"] == pytest.approx(expected, rel=1e-6)
    assert losses["update"] == pytest.approx(expected, rel=1e-6)
    assert_close(gradients["own"], gradients["update"], rtol=1e-5, atol=1e-6)


# The held gradient
@every_singular_basis
def test_grad_steps_1_is_the_exact_loss_in_every_step(basis):
    run = Run(rank=rank_of(basis), svd_steps=4, basis=basis, grad_steps=1)
    w, directions = first_weights(run, 3), run.copies()
    for step in range(1, 11):
        assert run.dskd().item() == pytest.approx(oracle_loss(run, w, basis, directions), rel=1e-5)
        assert_close(run.gradients(), oracle_gradients(run, w, basis, directions), rtol=1e-5, atol=1e-6)
        run.backward()
        chosen, updates = update_with_oracle(run, 3)
        if step % 4 == 0:
            w, directions = chosen, updates


@every_singular_basis
def test_the_loss_in_between_is_the_first_order_expansion(basis):
    run = Run(rank=rank_of(basis), svd_steps=100, basis=basis, grad_steps=3)
    start, w = run.copies(), first_weights(run, 3)
    for step in range(7):
        if step % 3 == 0:
            here = run.copies()
            base = oracle_loss(run, w, basis, directions=start)
            gradients = oracle_gradients(run, w, basis, directions=start)
        slope = sum((flat(gradients[name]) * (now - here[name])).sum() for name, now in run.copies().items())
        assert run.dskd().item() == pytest.approx(base + slope, rel=1e-6)
        assert_close(run.gradients(), gradients, rtol=1e-6, atol=1e-6)
        run.train(1)


def test_by_default_the_gradient_is_exact_in_every_step():
    default, explicit = Run(rank=3, svd_steps=5), Run(rank=3, svd_steps=5, grad_steps=1)
    pairs = [(name, weight, default.teachers[name]) for name, weight in default.students.items()]
    default.dskd = DirectionSensitivityLoss(pairs, Own(rank=3), svd_steps=5)
    assert default.train(12) == explicit.train(12)
    assert default.dskd.expansions == 12


@every_basis
def test_gradient_accumulation_sees_one_gradient(basis):
    run = Run(rank=rank_of(basis), svd_steps=4, basis=basis, grad_steps=2)
    for _ in range(6):
        first, second = run.gradients(), run.gradients()
        assert all(torch.equal(first[name], second[name]) for name in first)
        run.train(1)


def test_a_step_may_pass_without_a_call():
    run = Run(rank=3, svd_steps=4, grad_steps=2)
    run.train(1)
    for _ in range(6):
        run.optimizer.zero_grad()
        run.task_loss().backward()
        run.update()
    w = {name: row.numpy() for name, row in run.weights().items()}
    expected = oracle_loss(run, w, "own")
    assert run.dskd().item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_scales_its_gradient():
    run = Run(rank=3)
    once = run.gradients()
    thrice = torch.autograd.grad(3 * run.dskd(), list(run.students.values()))
    assert_close(dict(zip(run.students, thrice, strict=True)), {name: 3 * value for name, value in once.items()})


def test_the_loss_is_there_without_autograd():
    run = Run(rank=3)
    with torch.no_grad():
        loss = run.dskd()
    assert not loss.requires_grad
    assert_close(loss, run.dskd().detach())


@pytest.mark.parametrize("basis", ["own", "update", "curvature"])
def test_the_loss_may_be_read_in_inference_mode_and_training_goes_on(basis):
    runs = [Run(rank=0 if basis == "curvature" else 3, basis=basis, svd_steps=2) for _ in range(2)]
    for _ in range(4):
        with torch.inference_mode():
            read = runs[0].dskd()
        assert_close(read.clone(), runs[1].dskd().detach())
        for run in runs:
            run.optimizer.zero_grad()
            (run.task_loss() + run.dskd()).backward()
            run.update()
    for name, weight in runs[0].students.items():
        assert torch.equal(weight, runs[1].students[name])


def test_a_weight_in_two_pairs_gets_both_gradients():
    run = Run(shapes={"a": (5, 4), "b": (5, 4)}, rank=2)
    weight = run.students["a"]
    pairs = [("a", weight, run.teachers["a"]), ("b", weight, run.teachers["b"])]
    (actual,) = torch.autograd.grad(make_loss(pairs, rank=2)(), weight)
    w = oracle.first_weights(4, 2)
    expected = sum(oracle.own_gradient(weight, teacher, w) for teacher in run.teachers.values()) / 2
    assert_close(actual, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


# Control arms
@pytest.mark.parametrize("direction", ["plain", "random"])
@pytest.mark.parametrize(("basis", "rank"), [("own", 0), ("own", 3), ("update", 0), ("update", 3), ("curvature", 0)])
def test_a_control_arm_has_the_norms_and_the_loss_of_dskd(basis, direction, rank):
    dskd, arm = Run(rank=rank, basis=basis), Run(rank=rank, basis=basis, direction=direction)
    for name, gradient in dskd.gradients().items():
        assert arm.gradients()[name].norm().item() == pytest.approx(gradient.norm().item())
    assert arm.dskd().item() == pytest.approx(dskd.dskd().item())


def test_the_plain_arm_goes_along_the_difference_of_the_weights():
    run = Run(rank=3, direction="plain")
    for name, gradient in run.gradients().items():
        gap = run.students[name].detach() - run.teachers[name]
        assert_close(gradient / gradient.norm(), gap / gap.norm())


def test_the_random_arm_is_drawn_anew_at_every_expansion_and_repeats():
    first, second = (Run(rank=3, grad_steps=2, direction="random") for _ in range(2))
    for step in range(4):
        before = first.gradients()
        first.train(1)
        second.train(1)
        drawn, repeated = first.gradients(), second.gradients()
        for name in drawn:
            assert torch.equal(drawn[name], repeated[name])
            assert torch.equal(drawn[name], before[name]) == (step % 2 == 0)


def test_the_random_arm_differs_between_pairs_of_one_shape():
    run = Run(shapes={"a": (30, 30), "b": (30, 30)}, rank=3, direction="random")
    a, b = run.gradients().values()
    assert abs((a * b).sum() / a.norm() / b.norm()).item() < 0.2


# Which pairs keep their directions
def kept(basis: str, spoil=None, skip=()) -> dict[str, bool]:
    """Which pairs have the same direction weights before and after the second refresh."""
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    run.train(3)
    run.backward()
    if spoil is not None:
        spoil(run)
    before = run.weights()
    run.update(skip)
    return {name: torch.equal(before[name], w) for name, w in run.weights().items()}


ONLY_WIDE = {"square": False, "wide": True, "tall": False, "conv": False}


def no_gradient(run: Run) -> None:
    run.students["wide"].grad = None


def zero_gradient(run: Run) -> None:
    run.students["wide"].grad.zero_()


def zero_update(run: Run) -> None:
    groups = [{"params": [run.students["wide"]], "lr": 0.0}]
    groups.append({"params": [weight for name, weight in run.students.items() if name != "wide"]})
    run.optimizer = torch.optim.SGD(groups, lr=0.05)


@every_basis
@pytest.mark.parametrize("spoil", [no_gradient, zero_gradient, zero_update])
def test_a_pair_that_cannot_be_scored_keeps_its_directions(basis, spoil):
    assert kept(basis, spoil) == ONLY_WIDE


@every_basis
def test_a_skipped_pair_keeps_its_directions(basis):
    assert kept(basis, skip=["wide"]) == ONLY_WIDE


@every_singular_basis
def test_a_skipped_pair_keeps_its_loss_function(basis):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    run.train(1)
    run.backward()
    w, updates = update_with_oracle(run, 3)  # the first refresh, of all
    run.train(1)
    run.backward()
    chosen, moved = update_with_oracle(run, 3, skip=["wide", "conv"])  # the second, of square and tall
    w, updates = w | chosen, updates | moved
    assert run.dskd().item() == pytest.approx(oracle_loss(run, w, basis, updates), rel=1e-5)


@every_singular_basis
def test_a_pair_skipped_from_the_start_keeps_the_leading_directions(basis):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    start = run.copies()
    run.train(1)
    run.backward()
    w, updates = update_with_oracle(run, 3, skip=["wide"])
    w["wide"], updates["wide"] = oracle.first_weights(4, 3), start["wide"]
    assert run.dskd().item() == pytest.approx(oracle_loss(run, w, basis, updates), rel=1e-5)


# Gradients that are not finite
def overflow(run: Run) -> None:
    """What a gradient scaler does: the gradient is infinite and the optimizer step is left out."""
    run.backward()
    run.students["tall"].grad[0, 0] = float("inf")
    with run.dskd.observe(progress=run.step / TOTAL):
        pass
    run.step += 1


@pytest.mark.filterwarnings("ignore:DSKD")
def test_a_gradient_that_is_not_finite_keeps_all_directions():
    run = Run(rank=3, svd_steps=4)
    run.train(3)
    before = run.weights()
    overflow(run)
    assert all(torch.equal(before[name], w) for name, w in run.weights().items())


def test_gradients_that_are_not_finite_warn_once():
    run = Run(rank=3, svd_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            overflow(run)
    assert [str(w.message).startswith("DSKD: a gradient or update is not finite") for w in caught] == [True]


@pytest.mark.filterwarnings("ignore:DSKD")
@every_singular_basis
def test_a_postponed_refresh_is_made_up_at_the_next_good_step(basis):
    run = Run(rank=rank_of(basis), svd_steps=4, basis=basis)
    run.train(3)
    overflow(run)
    overflow(run)
    run.backward()
    expected, updates = update_with_oracle(run, 3)
    for name, w in expected.items():
        assert_close(run.dskd.direction_weights()[name], torch.from_numpy(w), rtol=1e-5, atol=1e-7)
    assert run.dskd().item() == pytest.approx(oracle_loss(run, expected, basis, updates), rel=1e-5)


@pytest.mark.filterwarnings("ignore:DSKD")
def test_the_schedule_goes_on_after_a_postponed_refresh():
    run = Run(rank=3, svd_steps=4)
    run.train(3)
    overflow(run)
    run.train(1)
    changed = []
    for step in range(6, 10):
        before = run.weights()
        run.train(1)
        if not torch.equal(before["square"], run.weights()["square"]):
            changed.append(step)
    assert changed == [8]


@pytest.mark.filterwarnings("ignore:DSKD")
def test_an_update_that_is_not_finite_keeps_all_directions():
    run = Run(rank=3, svd_steps=1)
    run.train(2)
    before = run.weights()
    run.backward()
    with run.dskd.observe(progress=0.1), torch.no_grad():
        run.students["wide"][0, 0] = float("nan")
    assert all(torch.equal(before[name], w) for name, w in run.weights().items())


def test_an_overflow_elsewhere_in_the_model_postpones_the_refresh():
    run = Run(rank=3, svd_steps=4)
    run.train(3)
    run.backward()
    with run.dskd.observe(progress=0.15):
        pass  # the scaler left the step out because of a weight that is in no pair
    run.step += 1
    before = run.weights()
    run.train(1)
    assert not any(torch.equal(before[name], w) for name, w in run.weights().items())


# Resuming
def save(run: Run) -> io.BytesIO:
    buffer = io.BytesIO()
    state = {"students": run.students, "optimizer": run.optimizer.state_dict(), "dskd": run.dskd.state_dict()}
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def resume(buffer: io.BytesIO, step: int, **settings) -> Run:
    run, state = Run(**settings), torch.load(buffer, weights_only=True)
    with torch.no_grad():
        for name, weight in run.students.items():
            weight.copy_(state["students"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    run.dskd.load_state_dict(state["dskd"])
    run.step = step
    return run


def train_with_overflow(run: Run, until: int) -> list[float]:
    losses = []
    while run.step < until:
        if run.step == 7:
            losses.append(run.dskd().item())
            overflow(run)
        else:
            losses += run.train(1)
    return losses


@pytest.mark.filterwarnings("ignore:DSKD")
@every_basis
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "step", [0, 2, 4, 5, 8, 9], ids=["start", "before_first", "after_first", "between", "postponed", "made_up"]
)
def test_a_resumed_run_continues_bit_for_bit(basis, dtype, layout, step):
    settings = {
        "dtype": dtype,
        "layout": layout,
        "rank": rank_of(basis),
        "svd_steps": 4,
        "grad_steps": 3,
        "basis": basis,
    }
    whole = Run(**settings)
    train_with_overflow(whole, step)
    resumed = resume(save(whole), step, **settings)
    assert train_with_overflow(resumed, 14) == train_with_overflow(whole, 14)
    for name, weight in whole.students.items():
        assert torch.equal(resumed.students[name], weight)
        assert torch.equal(resumed.dskd.direction_weights()[name], whole.dskd.direction_weights()[name])


def dumped(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@every_basis
def test_a_loaded_state_is_not_shared_with_its_source(basis):
    run, copy = (Run(rank=rank_of(basis), svd_steps=2, basis=basis) for _ in range(2))
    run.train(3)
    copy.dskd.load_state_dict(run.dskd.state_dict())
    before = dumped(copy.dskd.state_dict())
    run.train(4)
    assert dumped(copy.dskd.state_dict()) == before


@every_basis
def test_a_state_in_memory_is_not_changed_by_further_training(basis):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    run.train(3)
    state = run.dskd.state_dict()
    before = dumped(state)
    run.train(4)
    assert dumped(state) == before


def test_a_state_of_other_names_is_refused():
    state = Run(shapes={"a": (4, 4)}).dskd.state_dict()
    with pytest.raises(ValueError, match="other layer pairs"):
        Run(shapes={"b": (4, 4)}).dskd.load_state_dict(state)


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["held", "held_after_steps", "refreshed"])
@pytest.mark.parametrize("other", [(5, 4), (4, 3), (8, 8)])
def test_a_state_of_another_shape_is_refused(steps, other):
    run = Run(shapes={"a": (4, 4)}, rank=2, svd_steps=2)
    run.train(steps)
    run.dskd()
    with pytest.raises(ValueError, match="shape"):
        Run(shapes={"a": other}, rank=2, svd_steps=2).dskd.load_state_dict(run.dskd.state_dict())


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": 2},
        {"basis": "update"},
        {"direction": "random"},
        {"smoothing": 0.1},
        {"driver": "svd"},
        {"alpha": 0.0},
        {"score": "random"},
        {"score": "tempered"},
        {"span": "interval"},
    ],
    ids=str,
)
def test_a_state_of_another_reading_is_refused_with_both(changed):
    run, other = Run(rank=3, svd_steps=2), Run(**{"rank": 3, "svd_steps": 2} | changed)
    run.train(3)
    with pytest.raises(ValueError, match="the saved DSKD state is of") as caught:
        other.dskd.load_state_dict(run.dskd.state_dict())
    assert str(caught.value) == f"the saved DSKD state is of {run.dskd.reading!r}, not {other.dskd.reading!r}"
    assert repr(run.dskd.reading) != repr(other.dskd.reading)


@pytest.mark.parametrize("state", [None, {}, {"pairs": {}, "settings": {}, "counters": {}, "groups": []}])
def test_what_is_no_state_of_this_version_is_refused(state):
    with pytest.raises(ValueError, match="not one of this version"):
        Run(rank=3).dskd.load_state_dict(state)


def test_a_refused_state_changes_nothing():
    run, other = Run(rank=3, svd_steps=2), Run(rank=2, svd_steps=2)
    run.train(3)
    before = dumped(other.dskd.state_dict())
    with pytest.raises(ValueError, match="is of Own"):
        other.dskd.load_state_dict(run.dskd.state_dict())
    assert dumped(other.dskd.state_dict()) == before


def test_a_state_is_plain_tensors_and_numbers():
    run = Run(rank=3, svd_steps=2, span="interval")
    run.train(3)
    run.dskd()
    loaded = torch.load(io.BytesIO(dumped(run.dskd.state_dict())), weights_only=True)
    assert dumped(loaded) == dumped(run.dskd.state_dict())


@every_basis
def test_what_was_chosen_is_a_tensor_with_a_row_a_pair(basis):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    run.train(2)
    for group in run.dskd.groups:
        assert group.chosen
        assert all(isinstance(value, Tensor) and len(value) == len(group) for value in group.chosen.values())


# Precision and layout
@every_basis
@pytest.mark.parametrize(("of_student", "of_teacher"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_student_and_teacher_may_differ_in_precision(basis, of_student, of_teacher):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    same = {name: teacher.float() for name, teacher in run.teachers.items()}
    losses = []
    for dtype in (of_student, of_teacher):
        students = {name: nn.Parameter(weight.detach().float().to(of_student)) for name, weight in run.students.items()}
        pairs = [(name, weight, same[name].to(dtype)) for name, weight in students.items()]
        losses.append(make_loss(pairs, rank=rank_of(basis), basis=basis)())
    assert losses[0].dtype == of_student
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)


@every_basis
def test_bf16_weights_are_worked_on_in_float32(basis):
    half = Run(dtype=torch.bfloat16, rank=rank_of(basis), basis=basis)
    single = Run(dtype=torch.bfloat16, rank=rank_of(basis), basis=basis)
    students = {name: nn.Parameter(weight.detach().float()) for name, weight in single.students.items()}
    pairs = [(name, weight, single.teachers[name].float()) for name, weight in students.items()]
    single.students, single.dskd = students, make_loss(pairs, rank=rank_of(basis), basis=basis)
    assert half.dskd().dtype == torch.float32
    assert torch.equal(half.dskd(), single.dskd())
    rounded = {name: value.bfloat16() for name, value in single.gradients().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in half.gradients().items())


@every_basis
def test_float32_runs_are_close_to_float64(basis):
    settings = {"rank": rank_of(basis), "svd_steps": 4, "basis": basis}
    single, double = Run(dtype=torch.float32, **settings), Run(dtype=torch.float32, **settings)
    for name, weight in double.students.items():
        double.students[name].data = weight.data.double()
        for tensors in (double.teachers, double.targets, double.noise):
            tensors[name] = tensors[name].double()
    pairs = [(name, weight, double.teachers[name]) for name, weight in double.students.items()]
    double.dskd = make_loss(pairs, **settings)
    np.testing.assert_allclose(single.train(10), double.train(10), rtol=1e-3)


@every_basis
def test_autocast_does_not_reach_the_loss(basis):
    inside, outside = (Run(dtype=torch.float32, rank=rank_of(basis), svd_steps=2, basis=basis) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert inside.train(6) == outside_losses(outside)
    assert all(torch.equal(inside.weights()[name], w) for name, w in outside.weights().items())


def outside_losses(run: Run) -> list[float]:
    with torch.autocast("cpu", enabled=False):
        return run.train(6)


def convolutions(basis: str, layout=torch.contiguous_format) -> Run:
    shapes = {"a": (6, 3, 3, 3), "b": (6, 3, 3, 3), "point": (4, 8, 1, 1), "depth": (8, 1, 3, 3)}
    return Run(shapes=shapes, layout=layout, rank=rank_of(basis), svd_steps=4, grad_steps=2, basis=basis)


@every_basis
def test_convolution_weights_are_their_flattened_matrices(basis):
    conv, matrix = convolutions(basis), convolutions(basis)
    for tensors in (matrix.teachers, matrix.targets):
        tensors.update({name: value.flatten(1) for name, value in tensors.items()})
    matrix.noise = {name: value.flatten(2) for name, value in matrix.noise.items()}
    matrix.students = {name: nn.Parameter(weight.detach().flatten(1)) for name, weight in matrix.students.items()}
    matrix.optimizer = torch.optim.SGD(matrix.students.values(), lr=0.02, momentum=0.9)
    pairs = [(name, weight, matrix.teachers[name]) for name, weight in matrix.students.items()]
    matrix.dskd = make_loss(pairs, rank=rank_of(basis), svd_steps=4, grad_steps=2, basis=basis)
    assert conv.train(10) == pytest.approx(matrix.train(10), rel=1e-9)
    for name, value in conv.gradients().items():
        assert_close(value.flatten(1), matrix.gradients()[name])


@every_basis
def test_channels_last_weights_give_the_same_losses_and_gradients(basis):
    first, last = convolutions(basis), convolutions(basis, torch.channels_last)
    assert last.students["a"].is_contiguous(memory_format=torch.channels_last)
    assert last.train(10) == pytest.approx(first.train(10), rel=1e-9)
    gradients = last.gradients()
    assert_close(gradients, first.gradients())
    assert gradients["a"].is_contiguous(memory_format=torch.channels_last)


def test_a_weight_that_is_a_slice_gives_the_same_loss():
    whole = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = torch.zeros(6, 3, 3, 3, dtype=torch.float64)
    sliced = make_loss([("a", nn.Parameter(whole[:, 1:4]), teacher)], rank=2)
    copied = make_loss([("a", nn.Parameter(whole[:, 1:4].clone()), teacher)], rank=2)
    for dskd in (sliced, copied):
        dskd()
        with torch.no_grad():
            dskd.students[0].mul_(1.1)
    assert_close(sliced(), copied())


# Cost of a held step
class NoDecompositions(TorchDispatchMode):
    """Fails on matrix products and decompositions."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "linalg" in name or name in (
            "mm",
            "bmm",
            "addmm",
            "baddbmm",
            "_linalg_eigh",
            "_linalg_svd",
            "geqrf",
            "topk",
        ):
            raise AssertionError(f"{name} in a step with a held gradient")
        return func(*args, **kwargs or {})


def on_meta(**settings) -> DirectionSensitivityLoss:
    """On the meta device tensors have no values, so every read of one by the host raises."""
    weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES.values()]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    pairs = [(name, weight, torch.empty_like(weight)) for name, weight in zip(SHAPES, weights, strict=True)]
    return make_loss(pairs, rank=rank_of(settings.get("basis")), **settings)


def observed_step(dskd: DirectionSensitivityLoss) -> None:
    dskd().backward()
    optimizer = torch.optim.SGD(dskd.students, lr=0.1)
    with dskd.observe(progress=0.0):
        optimizer.step()


@pytest.fixture
def no_autocast(monkeypatch):
    """Autocast knows no meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


@every_basis
@pytest.mark.usefixtures("no_autocast")
def test_a_held_step_never_reads_a_value_on_the_host(basis):
    dskd = on_meta(svd_steps=10, basis=basis)
    for _ in range(3):
        observed_step(dskd)


@every_basis
@pytest.mark.usefixtures("no_autocast")
def test_a_recomputed_gradient_never_reads_a_value_on_the_host(basis):
    dskd = on_meta(svd_steps=10, grad_steps=1, basis=basis)
    for _ in range(3):
        observed_step(dskd)


@pytest.mark.usefixtures("no_autocast")
def test_the_host_check_notices_a_read():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        observed_step(on_meta(svd_steps=1))  # a refresh looks whether gradients are finite


@every_basis
def test_a_held_step_multiplies_and_decomposes_no_matrices(basis):
    run = Run(rank=rank_of(basis), svd_steps=10, basis=basis)
    run.train(1)
    with NoDecompositions():
        run.train(8)
    with NoDecompositions(), pytest.raises(AssertionError, match="in a step with a held gradient"):
        run.train(2)


# What is reported
def test_effective_directions_start_at_rank():
    run = Run(rank=3)
    assert run.dskd.effective_directions() == {name: 3.0 for name in SHAPES}


def test_effective_directions_of_a_rank_above_r_are_r():
    assert Run(rank=0).dskd.effective_directions() == {"square": 5.0, "wide": 4.0, "tall": 4.0, "conv": 4.0}


def test_effective_directions_are_one_over_the_sum_of_squares():
    run = Run(rank=3, svd_steps=2)
    run.train(2)
    for name, w in run.weights().items():
        assert run.dskd.effective_directions()[name] == pytest.approx(1 / sum(x * x for x in w.tolist()))


# Bad settings
def one_pair() -> list[tuple[str, Tensor, Tensor]]:
    return [("layer", nn.Parameter(torch.ones(3, 2)), torch.zeros(3, 2))]


@pytest.mark.parametrize("name", ["svd_steps", "grad_steps"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "5", None])
def test_an_interval_that_is_no_number_of_steps_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of at least 1, got {value!r}"):
        DirectionSensitivityLoss(one_pair(), **{name: value})


@pytest.mark.parametrize("reading", [Own, Update])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank must be 0 .* got -1"),
        ({"rank": 2.5}, r"rank must be 0 .* got 2\.5"),
        ({"rank": True}, "rank must be 0 .* got True"),
        ({"driver": "qr"}, "driver.*gram, svd.*qr"),
        ({"span": "epoch"}, "span.*step, interval.*epoch"),
    ],
    ids=str,
)
def test_a_bad_setting_of_a_reading_is_refused(reading, settings, message):
    with pytest.raises(ValueError, match=message):
        reading(**settings)


@pytest.mark.parametrize("memory", [-0.1, 1.0, float("nan")])
def test_a_memory_outside_the_unit_interval_is_refused(memory):
    with pytest.raises(ValueError, match="memory"):
        Curvature(memory)


@pytest.mark.parametrize(
    ("reading", "setting"),
    [
        *((Update, setting) for setting in ("smoothing", "alpha", "memory")),
        *((Own, setting) for setting in ("alpha", "memory")),
        *((Curvature, setting) for setting in ("rank", "driver", "score", "span", "smoothing", "alpha")),
    ],
)
def test_a_reading_has_no_setting_without_an_effect(reading, setting):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{setting}'"):
        reading(**{setting: 0})


@pytest.mark.parametrize("reading", [3, "own", Own], ids=str)
def test_what_is_no_reading_is_refused(reading):
    with pytest.raises(TypeError, match=r"reading must be one such as Own\(rank=32\)"):
        DirectionSensitivityLoss(one_pair(), reading)


def test_the_reading_is_the_papers_by_default():
    assert DirectionSensitivityLoss(one_pair()).reading == Own(rank=32, smoothing=0.0, driver="gram", span="step")


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="at least one pair"):
        make_loss([])


def test_a_repeated_name_is_refused():
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"'layer\.0'"):
        make_loss([("layer.0", weight, weight), ("layer.0", weight, weight)])


def test_shapes_that_differ_are_refused_by_name():
    with pytest.raises(ValueError, match=r"layer\.1.*\(2, 3\).*\(3, 2\)"):
        make_loss([("layer.1", nn.Parameter(torch.ones(2, 3)), torch.ones(3, 2))])


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="bias"):
        make_loss([("bias", nn.Parameter(torch.ones(3)), torch.ones(3))])


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_outside_the_unit_interval_is_refused(progress):
    run = Run(rank=3)
    with pytest.raises(ValueError, match="progress"), run.dskd.observe(progress=progress):
        pass


def test_an_unknown_name_to_skip_is_refused():
    run = Run(rank=3, svd_steps=1)
    run.backward()
    with pytest.raises(ValueError, match="squares"):
        run.update(["squares"])


# Golden values
def golden_losses() -> dict[str, list[float]]:
    """20 steps in float32 with refreshes after 5, 10, 15 and gradients held for 2 steps."""
    settings = {"dtype": torch.float32, "svd_steps": 5, "grad_steps": 2}
    return {basis: Run(basis=basis, rank=rank_of(basis), **settings).train(20) for basis in BASES}


@every_basis
def test_losses_equal_the_golden_ones(basis):
    np.testing.assert_allclose(golden_losses()[basis], json.loads(GOLDEN.read_text())[basis], rtol=1e-4)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_losses(), indent=1) + "\n", encoding="utf-8")
