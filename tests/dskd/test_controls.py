"""What the ablation varies: controls around a reading, of the pairs and of the score, and the update of an interval."""

import io
import math

import numpy as np
import oracle
import pytest
import torch
from losses import make_loss
from torch import Tensor, nn
from torch.testing import assert_close

from dskd import Curvature, Own, Update
from dskd.controls import (
    ConstantProgress,
    Dealt,
    DiagonalFisher,
    Plain,
    RandomDirection,
    ReleasedGradient,
    ShuffledFactors,
    released_gradient,
)
from dskd.sensitivity import sensitivity

SHAPES = {"square": (5, 5), "wide": (4, 7), "tall": (7, 4), "conv": (4, 2, 3, 3)}
RANK = 3
every_singular_basis = pytest.mark.parametrize("basis", ["own", "update"])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(tensor: Tensor) -> np.ndarray:
    return oracle.as_array(tensor).reshape(len(tensor), -1)


class Run:
    """Students that move by given updates under given gradients."""

    def __init__(self, shapes=SHAPES, seed: int = 1, **settings):
        torch.manual_seed(seed)  # what the random controls follow by `make_loss`
        self.students = {name: nn.Parameter(draw(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
        self.teachers = {name: draw(*shape, seed=50 + i) for i, (name, shape) in enumerate(shapes.items())}
        pairs = [(name, W, self.teachers[name]) for name, W in self.students.items()]
        self.dskd = make_loss(pairs, **{"rank": RANK, "svd_steps": 1} | settings)
        self.step = 0

    def train(self, steps: int = 1, *, progress: float = 0.4, skip=(), spoil: str = "") -> None:
        for _ in range(steps):
            self.step += 1
            for name, W in self.students.items():
                W.grad = self.gradient(name)
            if spoil:
                self.students[spoil].grad[0] = math.inf
            with self.dskd.observe(progress, skip), torch.no_grad():
                for name, W in self.students.items():
                    W += self.update(name, self.step)

    def _drawn(self, name: str, seed: int) -> Tensor:
        return draw(*self.students[name].shape, seed=seed + 10 * list(self.students).index(name))

    def update(self, name: str, *steps: int) -> Tensor:
        """The sum of the updates of some steps."""
        return sum(0.05 * self._drawn(name, 1000 * step) for step in steps)

    def gradient(self, name: str) -> Tensor:
        """That of the last step."""
        return self._drawn(name, 1000 * self.step + 500)

    def terms(self, name: str, *steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(g, c, sigma) of the update of some steps (default: the last one) under the last gradient."""
        update = flat(self.update(name, *(steps or (self.step,))))
        first, second, _ = oracle.scores(update, flat(self.gradient(name)), 0.0)
        return first, second, np.linalg.svd(update, compute_uv=False)

    def weights(self) -> dict[str, Tensor]:
        return {name: row.clone() for name, row in self.dskd.direction_weights().items()}

    def expect(self, scores: dict[str, np.ndarray], rank: int = RANK) -> None:
        """That the weights in use are those of the scores."""
        wanted = {name: torch.from_numpy(oracle.weights(values, rank)) for name, values in scores.items()}
        assert_close({name: self.weights()[name] for name in wanted}, wanted, rtol=1e-5, atol=1e-7)


def blend(first: np.ndarray, second: np.ndarray, alpha: float) -> np.ndarray:
    return (1 - alpha) * first / first.sum() + alpha * second / second.sum()


# alpha
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_fixed_alpha_is_the_blend_at_any_progress(alpha):
    run = Run(alpha=alpha)
    for progress in (0.0, 0.9):
        run.train(progress=progress)
        run.expect({name: blend(*run.terms(name)[:2], alpha) for name in SHAPES})


def test_without_a_fixed_alpha_it_is_the_progress():
    run = Run()
    for progress in (0.0, 0.9):
        run.train(progress=progress)
        run.expect({name: blend(*run.terms(name)[:2], progress) for name in SHAPES})


# Scores
@every_singular_basis
def test_the_tempered_score_has_the_root_of_the_curvature(basis):
    run = Run(score="tempered", basis=basis)
    run.train(progress=0.7)
    run.expect({name: blend(first, np.sqrt(second), 0.7) for name in SHAPES for first, second, _ in [run.terms(name)]})


@every_singular_basis
@pytest.mark.parametrize("rank", [0, RANK])
def test_the_magnitude_is_the_singular_value_of_the_update(basis, rank):
    run = Run(score="magnitude", basis=basis, rank=rank)
    run.train()
    run.expect({name: run.terms(name)[2] for name in SHAPES}, rank)


def test_the_magnitude_does_not_ask_for_the_gradient():
    first, second = Run(score="magnitude"), Run(score="magnitude")
    second.gradient = lambda name: first.gradient(name).flip(0)
    first.train()
    second.train()
    assert_close(first.weights(), second.weights(), rtol=0, atol=0)


def test_random_scores_are_those_of_the_sensitivity_on_other_directions():
    dealt, sensitive = Run(score="random"), Run()
    dealt.train()
    sensitive.train()
    for name, w in sensitive.weights().items():
        assert_close(dealt.weights()[name].sort().values, w.sort().values)
    assert any(not torch.equal(dealt.weights()[name], w) for name, w in sensitive.weights().items())


def permutation(run: Run, name: str) -> list[int]:
    """Which direction's sensitivity every direction was given, at rank 0."""
    wanted = oracle.weights(blend(*run.terms(name)[:2], 0.4), 0)
    return [int(np.abs(wanted - w).argmin()) for w in run.weights()[name].tolist()]


def test_random_scores_repeat_with_the_seed_and_differ_by_seed_step_and_pair():
    shapes = {"a": (16, 16), "b": (16, 16)}
    run, same, other = (Run(shapes, seed, score="random", rank=0) for seed in (1, 1, 2))
    orders = []
    for each in (run, same, other):
        each.train()
        orders.append([permutation(each, name) for name in shapes])
    run.train()
    assert orders[0] == orders[1]
    a, b = orders[0]
    for order in (b, orders[2][0], permutation(run, "a")):
        assert sorted(order) == list(range(16))
        assert order != a


@pytest.mark.parametrize("score", ["tempered", "magnitude", "random"])
def test_the_loss_takes_the_directions_that_were_chosen(score):
    run = Run({"a": (9, 8)}, score=score, basis="update")
    run.train()
    w = run.weights()["a"].numpy()
    expected = oracle.update_loss(run.students["a"], run.teachers["a"], run.update("a", 1), w)
    assert run.dskd().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("score", ["tempered", "magnitude", "random"])
def test_no_weight_falls_on_a_direction_that_the_randomized_driver_does_not_find(score):
    run = Run({"a": (90, 80)}, score=score, driver="randomized")
    for _ in range(5):
        run.train()
        w = run.weights()["a"]
        assert w.sum().item() == pytest.approx(1)
        assert not w[RANK + 32 :].any()


# Span
@every_singular_basis
def test_the_update_of_an_interval_is_the_sum_since_the_last_choice(basis):
    run = Run(span="interval", svd_steps=2, basis=basis)
    for steps in ((1, 2), (3, 4)):
        run.train(2)
        expected = {name: blend(*run.terms(name, *steps)[:2], 0.4) for name in SHAPES}
        run.expect(expected)
    if basis == "update":
        w = run.weights()
        losses = [
            oracle.update_loss(flat(W), flat(run.teachers[name]), flat(run.update(name, 3, 4)), w[name].numpy())
            for name, W in run.students.items()
        ]
        assert run.dskd().item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_update_of_a_step_is_that_of_the_last_step():
    run = Run(svd_steps=2)
    run.train(2)
    run.expect({name: blend(*run.terms(name, 2)[:2], 0.4) for name in SHAPES})


def test_the_interval_of_a_skipped_pair_goes_on():
    run = Run(span="interval", svd_steps=2)
    run.train(2)
    run.train(2, skip=["wide"])
    run.train(2)
    intervals = {name: (3, 4, 5, 6) if name == "wide" else (5, 6) for name in SHAPES}
    run.expect({name: blend(*run.terms(name, *steps)[:2], 0.4) for name, steps in intervals.items()})


@pytest.mark.filterwarnings("ignore:DSKD")
def test_the_interval_goes_on_while_the_choice_is_postponed():
    run = Run(span="interval", svd_steps=2)
    run.train(1)
    run.train(1, spoil="tall")
    run.train(1)
    run.expect({name: blend(*run.terms(name, 1, 2, 3)[:2], 0.4) for name in SHAPES})


def saved(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("score", ["sensitivity", "random"])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 5])
def test_a_resumed_run_continues_bit_for_bit(score, step):
    settings = {"span": "interval", "score": score, "svd_steps": 3, "grad_steps": 2, "basis": "update"}
    whole, resumed = Run(**settings), Run(**settings)
    whole.train(step)
    whole.dskd()
    state = torch.load(io.BytesIO(saved(whole.dskd.state_dict())), weights_only=True)
    with torch.no_grad():
        for name, W in resumed.students.items():
            W.copy_(whole.students[name])
    resumed.step = step
    resumed.dskd.load_state_dict(state)
    for _ in range(7):
        assert torch.equal(resumed.dskd(), whole.dskd())
        whole.train()
        resumed.train()
        assert_close(resumed.weights(), whole.weights(), rtol=0, atol=0)


def test_a_state_in_memory_is_not_changed_by_further_training():
    run, copy = (Run(span="interval", svd_steps=2) for _ in range(2))
    run.train(3)
    state = run.dskd.state_dict()
    copy.dskd.load_state_dict(state)
    before = saved(state)
    run.train(4)
    assert saved(state) == saved(copy.dskd.state_dict()) == before


# The release's gradient
def release_by_differences(student: Tensor, teacher: Tensor, w: np.ndarray) -> np.ndarray:
    """Central differences of the loss with U and sigma of the student frozen; V keeps its signs."""
    student, low_rank = flat(student), oracle.weighted(flat(teacher), w)
    left, sigma, right = np.linalg.svd(student, full_matrices=False)

    def loss(matrix: np.ndarray) -> float:
        moved = np.linalg.svd(matrix, full_matrices=False)[2]
        signs = np.sign((moved * right).sum(1, keepdims=True))
        return (((left * (np.sqrt(w) * sigma)) @ (signs * moved) - low_rank) ** 2).sum()

    return oracle.finite_difference(loss, student)


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("steps", [0, 1], ids=["before_a_choice", "after_a_choice"])
def test_the_released_gradient_is_that_of_the_right_vectors_alone(rank, steps):
    run = Run(direction="released", rank=rank)
    run.train(steps)
    gradients = torch.autograd.grad(run.dskd(), list(run.students.values()))
    for (name, W), gradient in zip(run.students.items(), gradients, strict=True):
        expected = release_by_differences(W, run.teachers[name], run.weights()[name].numpy()) / len(SHAPES)
        np.testing.assert_allclose(flat(gradient), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_beside_the_released_gradient_is_the_exact_one():
    run = Run(direction="released")
    run.train()
    losses = [
        oracle.own_loss(flat(W), flat(run.teachers[name]), run.weights()[name].numpy())
        for name, W in run.students.items()
    ]
    assert run.dskd().item() == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("student", [torch.zeros(4, 3), torch.eye(4, 3), torch.eye(3, 4)])
def test_the_released_gradient_is_zero_where_it_is_not_finite(student):
    teacher = draw(*student.shape, seed=1).float()
    weights = torch.linspace(1, 0, 3)
    gradient = released_gradient(student, teacher, weights)
    assert gradient.isfinite().all()
    assert (gradient == 0).any()


def all_gradients(run: Run) -> list[Tensor]:
    return list(torch.autograd.grad(run.dskd(), list(run.students.values())))


# The shuffled teacher
def seen_teachers(seed: int) -> dict[str, Tensor]:
    """The matrices that the control pulls to. While all directions weigh alike the loss is mean ||W_s - W||^2 / r, and
    its gradient at W_s = 0 is -2 W / r / pairs."""
    run = Run(direction="shuffled", rank=0, seed=seed)
    with torch.no_grad():
        for W in run.students.values():
            W.zero_()
    gradients = all_gradients(run)
    ranks = {name: min(flat(W).shape) for name, W in run.students.items()}
    return {name: D * ranks[name] * len(SHAPES) / -2 for (name, D) in zip(run.students, gradients, strict=True)}


def test_the_shuffled_teacher_is_the_teacher_with_rows_and_columns_in_another_order():
    for name, seen in seen_teachers(1).items():
        seen, teacher = flat(seen), flat(Run().teachers[name])
        assert not np.allclose(seen, teacher)
        rows = [int(np.isclose(np.sort(teacher), np.sort(row)).all(1).nonzero()[0].item()) for row in seen]
        columns = [int(np.isclose(np.sort(teacher.T), np.sort(column)).all(1).nonzero()[0].item()) for column in seen.T]
        np.testing.assert_allclose(seen, teacher[np.ix_(rows, columns)], rtol=1e-6)


def test_the_order_follows_the_seed_of_the_run():
    first, again, other = seen_teachers(1), seen_teachers(1), seen_teachers(2)
    for name, seen in first.items():
        assert_close(seen, again[name])
        assert not torch.allclose(seen, other[name])


@every_singular_basis
def test_the_control_is_dskd_towards_the_shuffled_teacher(basis):
    run, same = Run(direction="shuffled", basis=basis), Run(basis=basis)
    for name, seen in seen_teachers(1).items():
        same.teachers[name].copy_(seen)
    for arm in (run, same):
        arm.train(2)
    assert run.dskd().item() == pytest.approx(same.dskd().item(), rel=1e-6)
    assert_close(all_gradients(run), all_gradients(same), rtol=1e-5, atol=1e-8)


# Without a teacher
@every_singular_basis
def test_shrinking_is_dskd_towards_zeros_and_asks_nothing_of_the_teacher(basis):
    run, same, other = Run(direction="shrink", basis=basis), Run(basis=basis), Run(direction="shrink", basis=basis)
    for arm, change in ((same, Tensor.zero_), (other, Tensor.neg_)):
        for W in arm.teachers.values():
            change(W)
    for arm in (run, same, other):
        arm.train(2)
    for arm in (same, other):
        assert run.dskd().item() == pytest.approx(arm.dskd().item(), rel=1e-6)
        assert_close(all_gradients(run), all_gradients(arm), rtol=1e-5, atol=1e-8)


def test_shrinking_pulls_every_singular_value_by_its_weight_and_turns_no_vector():
    run = Run(direction="shrink", rank=0)
    run.train(2)
    gradients = dict(zip(run.students, all_gradients(run), strict=True))
    for name, w in run.dskd.direction_weights().items():
        U, sigma, Vt = np.linalg.svd(flat(run.students[name]).astype(np.float64), full_matrices=False)
        expected = (U * (2 * w.numpy() * sigma / len(SHAPES))) @ Vt
        np.testing.assert_allclose(flat(gradients[name]), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{"direction": "random"}, {"score": "random"}, {"direction": "shuffled"}])
def test_a_resumed_run_repeats_the_draws_whatever_the_seed_of_its_process(settings):
    run = Run(**settings)
    run.train(2)
    resumed = Run(**settings)
    torch.manual_seed(2)
    resumed.dskd.load_state_dict(run.dskd.state_dict())
    resumed.step = run.step
    with torch.no_grad():
        for name, W in resumed.students.items():
            W.copy_(run.students[name])
    for each in (run, resumed):
        each.train()
    assert_close(all_gradients(resumed), all_gradients(run), rtol=0, atol=0)


# Refusals
@pytest.mark.parametrize("alpha", [1.1, -0.1, math.nan])
def test_an_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match=rf"alpha must lie in \[0, 1\], got {alpha}"):
        ConstantProgress(Own(), alpha)


@pytest.mark.parametrize("reading", [Update(3), Curvature(), Plain(Own())], ids=repr)
def test_the_released_gradient_is_one_of_own_alone(reading):
    with pytest.raises(ValueError, match="one of Own") as caught:
        ReleasedGradient(reading)
    assert str(caught.value) == f"the released gradient is one of Own, not of {reading!r}"


@pytest.mark.parametrize("control", [Plain, ReleasedGradient])
def test_a_control_without_a_seed_takes_none(control):
    with pytest.raises(TypeError, match="seed"):
        control(Own(), seed=1)


# What a control leaves as it is
CONTROLS = {
    "plain": Plain,
    "random": RandomDirection,
    "released": ReleasedGradient,
    "constant": ConstantProgress,
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_has_the_span_of_its_reading(control):
    for span in ("step", "interval"):
        assert CONTROLS[control](Own(span=span)).span == span


def test_a_control_is_gradual_where_its_reading_is():
    assert ShuffledFactors(Curvature()).gradual
    assert not Plain(Own()).gradual


@pytest.mark.parametrize("control", ["plain", "random", "released"])
def test_a_control_chooses_the_directions_of_its_reading(control):
    run, same = Run(direction=control), Run()
    for each in (run, same):
        each.train()
    assert_close(run.weights(), same.weights(), rtol=0, atol=0)
    assert_close(run.dskd.update_spectra(), same.dskd.update_spectra(), rtol=0, atol=0)


def test_a_control_is_named_with_its_reading_and_its_seed():
    reading = ConstantProgress(RandomDirection(Own(3, score=Dealt(sensitivity, 7)), 5), 0.5)
    inner = "Own(rank=3, smoothing=0.0, driver='gram', score=Dealt(sensitivity, seed=7), span='step')"
    assert repr(reading) == f"ConstantProgress(reading=RandomDirection(reading={inner}, seed=5), alpha=0.5)"


@pytest.mark.parametrize("settings", [{"direction": "random"}, {"score": "random"}])
def test_a_state_of_another_seed_is_refused(settings):
    run, other = Run(**settings), Run(**settings, seed=2)
    with pytest.raises(ValueError, match=r"seed=1.* not .*seed=2"):
        other.dskd.load_state_dict(run.dskd.state_dict())


# Random gradients
def test_random_gradients_follow_the_seed_and_the_numbers_alone():
    reading, student, teacher = Own(RANK), draw(3, 6, 5, seed=1), draw(3, 6, 5, seed=2)
    chosen = reading.start(student)

    def drawn(seed: int, shift: float = 0.0) -> Tensor:
        control = RandomDirection(reading, seed)
        target = control.target(teacher, chosen, {})
        return control.value_and_gradient(student + shift, target, chosen)[1]

    first = drawn(1)
    torch.manual_seed(99)
    assert torch.equal(drawn(1), first)
    for other in (drawn(2), drawn(1, 1e-3)):
        assert not torch.allclose(other, first, rtol=1e-2)
    cosines = torch.nn.functional.normalize(first.flatten(1), dim=1)
    assert (cosines @ cosines.T).fill_diagonal_(0).abs().max() < 0.6


def test_a_control_of_no_rows_gives_none():
    nothing = torch.zeros(0, 6, 5, dtype=torch.float64)
    for control in (Plain(Own(2)), RandomDirection(Own(2)), ReleasedGradient(Own(2)), ConstantProgress(Own(2))):
        chosen = control.start(nothing)
        value, gradient = control.value_and_gradient(nothing, control.target(nothing, chosen, {}), chosen)
        assert (value.shape, gradient.shape) == ((0,), (0, 6, 5))


# The diagonal Fisher of EWC
def test_ewc_pulls_every_entry_by_its_mean_squared_gradient():
    shape, memory = (2, 6, 5), 0.8
    student, teacher = draw(*shape, seed=1), draw(*shape, seed=2)
    reading, fisher = DiagonalFisher(memory), np.ones(shape)
    chosen = reading.start(student)
    for seed in (3, 4, 5):
        G = draw(*shape, seed=seed)
        chosen = reading.choose(G, G, 0.5, chosen)
        squares = G.numpy() ** 2
        fisher = memory * fisher + (1 - memory) * squares / squares.mean((1, 2), keepdims=True)
    value, gradient = reading.value_and_gradient(student, reading.target(teacher, chosen, {}), chosen)
    D = (student - teacher).numpy()
    norm = np.linalg.norm
    scale = norm(D, axis=(1, 2)) / norm(fisher * D, axis=(1, 2)) / 5
    np.testing.assert_allclose(value, scale * (fisher * D**2).sum((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(gradient, 2 * scale[:, None, None] * fisher * D, rtol=1e-12)
    np.testing.assert_allclose(norm(gradient, axis=(1, 2)), 2 * norm(D, axis=(1, 2)) / 5, rtol=1e-12)


def test_ewc_starts_as_the_plain_difference_and_is_zero_at_the_teacher():
    reading, teacher = DiagonalFisher(), draw(1, 4, 3, seed=1)
    chosen = reading.start(teacher)
    target = reading.target(teacher, chosen, {})
    value, gradient = reading.value_and_gradient(teacher + 0.5, target, chosen)
    assert_close(gradient, torch.full_like(teacher, 2 * 0.5 / 3))
    value, gradient = reading.value_and_gradient(teacher, target, chosen)
    assert not value.any()
    assert not gradient.any()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_fisher_does_not_depend_on_the_size_of_gradients(size):
    gradient, reading = draw(1, 4, 3, seed=1), DiagonalFisher(0.5)
    fisher = [
        reading.choose(scaled, scaled, 0.5, reading.start(scaled))["fisher"]
        for scaled in (gradient.float(), gradient.float() * size)
    ]
    assert_close(*fisher)


def test_the_weights_of_ewc_are_the_shares_of_the_shorter_side():
    fisher = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 6.0, 0.0]]])
    assert_close(DiagonalFisher().weights({"fisher": fisher}), torch.tensor([[1.0, 1.0]]))
    assert_close(DiagonalFisher().weights({"fisher": fisher.mT * 1.0}), torch.tensor([[1.0, 1.0]]))
    fisher[0, 1, 1] = 18.0
    assert_close(DiagonalFisher().weights({"fisher": fisher}), torch.tensor([[3.0, 1.0]]))


@pytest.mark.parametrize("memory", [-0.1, 1.0, float("nan")])
def test_a_memory_outside_its_range_is_refused(memory):
    with pytest.raises(ValueError, match="memory must lie in"):
        DiagonalFisher(memory)
