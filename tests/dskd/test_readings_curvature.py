"""The reading `Curvature`: its metric, its scale, and when it is renewed."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import make_loss
from torch import Tensor, nn
from torch.testing import assert_close

from dskd import Curvature, Own
from dskd.controls import DiagonalFisher, ShuffledFactors
from dskd.readings.curvature import add_curvature

SHAPES = {"square": (5, 5), "wide": (4, 7), "tall": (7, 4), "conv": (4, 2, 3, 3)}
every_shape = pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4)])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(tensor: Tensor) -> np.ndarray:
    return oracle.as_array(tensor).reshape(len(tensor), -1)


def factors(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Symmetric, without negative eigenvalues, not of full rank."""
    left, right = draw(m, 3, seed=3), draw(n, 3, seed=4)
    return left @ left.mT, right @ right.mT


def alignment(student: Tensor, teacher: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of two matrices and its gradient."""
    chosen = {"left": left[None], "right": right[None]}
    value, gradient = Curvature().value_and_gradient(student[None], {"teacher": teacher[None]}, chosen)
    return value[0], gradient[0]


class Run:
    """Students that move by given updates under given gradients."""

    def __init__(self, **settings):
        torch.manual_seed(1)
        self.students = {name: nn.Parameter(draw(*shape, seed=i)) for i, (name, shape) in enumerate(SHAPES.items())}
        self.teachers = {name: draw(*shape, seed=50 + i) for i, (name, shape) in enumerate(SHAPES.items())}
        pairs = [(name, W, self.teachers[name]) for name, W in self.students.items()]
        self.dskd = make_loss(pairs, basis="curvature", **{"rank": 0, "svd_steps": 1} | settings)
        self.seen: dict[str, list[Tensor]] = {name: [] for name in SHAPES}

    def train(self, steps: int = 1, *, skip=(), spoil: str = "", still: str = "") -> None:
        for _ in range(steps):
            for i, (name, W) in enumerate(self.students.items()):
                W.grad = draw(*W.shape, seed=1000 * (self.dskd.steps + 1) + i)
                if name == spoil:
                    W.grad[0] = math.inf
            with self.dskd.observe(0.4, skip), torch.no_grad():
                for name, W in self.students.items():
                    W -= 0.0 if name == still else 0.01 * W.grad.nan_to_num(posinf=1.0)
            if self.dskd.steps % self.dskd.svd_steps == 0 and not spoil:
                for name, W in self.students.items():
                    if name not in (*skip, still):
                        self.seen[name].append(W.grad)

    def gradients(self) -> dict[str, Tensor]:
        return dict(zip(self.students, torch.autograd.grad(self.dskd(), list(self.students.values())), strict=True))

    def expected(self, name: str) -> Tensor:
        """The pair's gradient by the oracle, divided by the number of pairs."""
        gap = flat(self.students[name]) - flat(self.teachers[name])
        A, B = np.eye(gap.shape[0]), np.eye(gap.shape[1])
        if self.seen[name]:
            A, B = oracle.mean_factors([flat(G) for G in self.seen[name]])
        pull = A @ gap @ B
        value = 2 * pull * np.linalg.norm(gap) / np.linalg.norm(pull) / min(gap.shape) / len(SHAPES)
        return torch.from_numpy(value).view(self.students[name].shape)

    def check(self) -> None:
        assert_close(self.gradients(), {name: self.expected(name) for name in SHAPES}, rtol=1e-9, atol=1e-12)


# The loss of two matrices
@every_shape
def test_the_loss_is_the_quadratic_form_times_its_scale(shape):
    student, teacher, (A, B) = draw(*shape, seed=1), draw(*shape, seed=2), factors(*shape)
    gap = oracle.as_array(student - teacher)
    scale = np.linalg.norm(gap) / np.linalg.norm(oracle.as_array(A) @ gap @ oracle.as_array(B))
    expected = scale * oracle.curvature_quadratic(student, teacher, oracle.as_array(A), oracle.as_array(B))
    assert alignment(student, teacher, A, B)[0].item() == pytest.approx(expected, rel=1e-12)


@every_shape
def test_its_gradient_is_that_of_the_quadratic_form_at_a_fixed_scale(shape):
    student, teacher, (A, B) = draw(*shape, seed=1), draw(*shape, seed=2), factors(*shape)
    _, gradient = alignment(student, teacher, A, B)
    gap = oracle.as_array(student - teacher)
    scale = np.linalg.norm(gap) / np.linalg.norm(oracle.as_array(A) @ gap @ oracle.as_array(B))
    numbers = [oracle.as_array(each) for each in (teacher, A, B)]
    slope = oracle.finite_difference(lambda W: oracle.curvature_quadratic(W, *numbers), student)
    assert_close(gradient, torch.from_numpy(scale * slope), rtol=1e-7, atol=1e-7)


@every_shape
def test_its_gradient_has_the_norm_of_the_plain_difference(shape):
    student, teacher = draw(*shape, seed=1), draw(*shape, seed=2)
    _, gradient = alignment(student, teacher, *factors(*shape))
    assert gradient.norm().item() == pytest.approx(2 * (student - teacher).norm().item() / min(shape))


def test_identities_give_the_squared_difference():
    student, teacher = draw(4, 7, seed=1), draw(4, 7, seed=2)
    loss, _ = alignment(student, teacher, torch.eye(4).double(), torch.eye(7).double())
    assert loss.item() == pytest.approx((student - teacher).square().sum().item() / 4)


def test_the_scale_of_the_factors_does_not_matter():
    student, teacher, (A, B) = draw(5, 5, seed=1), draw(5, 5, seed=2), factors(5, 5)
    assert_close(alignment(student, teacher, 7 * A, 0.1 * B), alignment(student, teacher, A, B))


def test_student_and_teacher_alike_give_zero_and_no_gradient():
    student = draw(4, 7, seed=1)
    loss, gradient = alignment(student, student.clone(), *factors(4, 7))
    assert (loss.item(), gradient.abs().max().item()) == (0, 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(exponent=st.sampled_from([-30, -12, 0, 8, 15]), zero=st.booleans(), shape=st.sampled_from([(1, 1), (3, 6)]))
def test_factors_of_any_gradient_are_finite_with_a_mean_eigenvalue_of_1(exponent, zero, shape):
    grad = torch.zeros(shape) if zero else (draw(*shape, seed=1) * 10.0**exponent).float()
    for mean_of_one in add_curvature(torch.eye(shape[0])[None], torch.eye(shape[1])[None], grad[None], share=1.0):
        mean = torch.linalg.eigvalsh(mean_of_one).mean().item()
        assert mean == pytest.approx(0 if zero else 1, abs=1e-5)


# The running means
def test_until_the_first_look_it_is_the_squared_difference():
    run = Run(svd_steps=3)
    run.train(2)
    run.check()
    assert all(
        run.dskd.effective_directions()[name] == pytest.approx(min(flat(W).shape)) for name, W in run.students.items()
    )


def test_every_step_adds_its_gradient_to_the_means():
    run = Run()
    for _ in range(4):
        run.train()
        run.check()


def test_with_svd_steps_only_every_nth_gradient_is_added():
    run = Run(svd_steps=3)
    run.train(9)
    assert all(len(seen) == 3 for seen in run.seen.values())
    run.check()


def test_a_skipped_pair_and_one_that_stood_still_keep_their_means():
    run = Run()
    run.train(2)
    run.train(skip=["wide"], still="tall")
    assert [len(run.seen[name]) for name in SHAPES] == [3, 2, 2, 3]
    run.check()


@pytest.mark.filterwarnings("ignore:DSKD")
def test_a_gradient_that_is_not_finite_changes_nothing():
    run = Run()
    run.train(2)
    run.train(spoil="wide")
    run.check()
    run.train()
    run.check()


def test_direction_weights_are_the_eigenvalues_of_the_smaller_factor():
    run = Run()
    run.train(5)
    for name, seen in run.seen.items():
        A, B = oracle.mean_factors([flat(G) for G in seen])
        values = np.linalg.eigvalsh(A if len(A) < len(B) else B)[::-1]
        row = run.dskd.direction_weights()[name]
        assert_close(row, torch.from_numpy(values / values.sum()), rtol=1e-9, atol=1e-12)
        assert run.dskd.effective_directions()[name] == pytest.approx(1 / row.square().sum().item())


# Controls
def test_the_plain_control_is_the_squared_difference():
    run = Run(direction="plain")
    run.train(3)
    for name, D in run.gradients().items():
        gap = run.students[name].detach() - run.teachers[name]
        assert_close(D, 2 * gap / min(flat(gap).shape) / len(SHAPES))


def test_the_score_random_has_the_same_eigenvalues_on_other_directions():
    run, other = Run(score="random"), Run()
    run.train(5)
    other.train(5)
    assert_close(run.dskd.direction_weights(), other.dskd.direction_weights())
    for name, D in run.gradients().items():
        true = other.gradients()[name]
        assert D.norm().item() == pytest.approx(true.norm().item())
        assert torch.cosine_similarity(D.flatten(), true.flatten(), 0) < 0.999


def test_the_score_random_reorders_rows_and_columns_of_a_factor_alike():
    factor, teacher = factors(7, 7)[0], draw(7, 7, seed=5)
    (reordered,) = ShuffledFactors(Curvature(), 1)._reordered(factor[None], teacher[None], "left")
    assert not torch.equal(reordered, factor)
    assert_close(reordered.diagonal().sort().values, factor.diagonal().sort().values)
    assert_close(torch.linalg.eigvalsh(reordered), torch.linalg.eigvalsh(factor), rtol=1e-9, atol=1e-9)


def test_the_order_of_a_factor_stays_the_same_from_one_choice_to_the_next_and_follows_the_seed():
    teacher, values = draw(7, 7, seed=5), torch.arange(7.0, dtype=torch.float64)
    orders = [
        ShuffledFactors(Curvature(), seed)._reordered(torch.diag(scale * values)[None], teacher[None], side) / scale
        for seed, side, scale in ((1, "left", 1.0), (1, "left", 2.0), (2, "left", 1.0), (1, "right", 1.0))
    ]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[3])


# Its memory
@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_the_memory_is_the_share_of_the_former_factors(memory):
    gradients = [draw(4, 7, seed=seed)[None] for seed in (1, 2, 3)]
    reading, chosen = Curvature(memory), Curvature(memory).start(gradients[0])
    for G in gradients:
        chosen = reading.choose(G, G, 0.5, chosen)
    A, B = oracle.mean_factors([G[0] for G in gradients], memory)
    assert_close(chosen["left"][0], torch.from_numpy(A), rtol=1e-9, atol=1e-12)
    assert_close(chosen["right"][0], torch.from_numpy(B), rtol=1e-9, atol=1e-12)


def test_neither_update_nor_progress_matters():
    reading, G = Curvature(), draw(4, 7, seed=1)[None]
    first, second = (reading.choose(dW, G, at, reading.start(G)) for dW, at in ((G, 0.0), (G.flip(-1), 1.0)))
    assert all(torch.equal(first[side], second[side]) for side in ("left", "right"))


# Its diagonal factors
@pytest.mark.parametrize(("shape", "thin"), [((4, 7), "right"), ((7, 4), "left"), ((5, 5), None)])
def test_diagonal_factors_are_the_diagonal_of_the_larger_one(shape, thin):
    gradients = [draw(*shape, seed=seed)[None] for seed in (1, 2, 3)]
    reading = Curvature(factors="diagonal")
    chosen = reading.start(gradients[0])
    for G in gradients:
        chosen = reading.choose(G, G, 0.5, chosen)
    dense = dict(zip(("left", "right"), oracle.mean_factors([G[0] for G in gradients]), strict=True))
    for side, mean in dense.items():
        kept = np.diag(mean) if side == thin else mean
        assert_close(chosen[side][0], torch.from_numpy(kept.copy()), rtol=1e-9, atol=1e-12)

    student, teacher = draw(*shape, seed=8), draw(*shape, seed=9)
    A, B = (np.diag(np.diag(mean)) if side == thin else mean for side, mean in dense.items())
    value, gradient = reading.value_and_gradient(student[None], {"teacher": teacher[None]}, chosen)
    gap = oracle.as_array(student - teacher)
    scale = np.linalg.norm(gap) / np.linalg.norm(A @ gap @ B)
    assert value.item() == pytest.approx(scale * oracle.curvature_quadratic(student, teacher, A, B) / 1.0, rel=1e-9)
    slope = oracle.finite_difference(lambda W: oracle.curvature_quadratic(W, oracle.as_array(teacher), A, B), student)
    assert_close(gradient[0], torch.from_numpy(scale * slope), rtol=1e-6, atol=1e-6)


def test_diagonal_factors_keep_the_square_of_the_shorter_side():
    state = Curvature(factors="diagonal").start(torch.zeros(2, 8, 50))
    assert {side: factor.shape for side, factor in state.items()} == {"left": (2, 8, 8), "right": (2, 50)}


def test_diagonal_factors_of_any_order_are_those_of_the_shuffled_control():
    reading, G = Curvature(factors="diagonal"), draw(4, 7, seed=1)[None]
    chosen, other = reading.choose(G, G, 0.5, reading.start(G)), draw(4, 7, seed=2)[None]
    pull, shuffled = (
        each.value_and_gradient(other, {"teacher": G}, chosen)[1] for each in (reading, ShuffledFactors(reading, 1))
    )
    assert not torch.allclose(pull, shuffled)
    assert shuffled.norm().item() == pytest.approx(pull.norm().item())


@pytest.mark.parametrize("reading", [DiagonalFisher(), Own()])
def test_readings_without_factors_have_none_to_shuffle(reading):
    with pytest.raises(ValueError, match="shuffled factors are those of Curvature"):
        ShuffledFactors(reading)


@pytest.mark.parametrize("wrong", [{"factors": "thin"}, {"memory": 1.0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Curvature(**wrong)
