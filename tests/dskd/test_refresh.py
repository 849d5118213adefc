"""When the held gradient and the directions are renewed, in what parts, and how good the randomized driver is."""

import pytest
import torch
from losses import make_loss
from torch import Tensor, nn
from torch.testing import assert_close

from dskd import DirectionSensitivityLoss, direction_sensitivity, groups, select_directions
from dskd.matrices import right_singular

every_singular_basis = pytest.mark.parametrize("basis", ["own", "update"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(shapes: list[tuple], **settings) -> tuple[DirectionSensitivityLoss, list[nn.Parameter]]:
    students = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    pairs = [(str(i), W, random(*W.shape, seed=100 + i)) for i, W in enumerate(students)]
    return make_loss(pairs, **{"rank": 3} | settings), students


def move(dskd: DirectionSensitivityLoss, students: list[nn.Parameter], share: float) -> None:
    """A step in which every matrix moves by a share of its norm, in a direction that changes with the step."""
    dskd().backward()
    with dskd.observe(progress=0.5), torch.no_grad():
        for i, W in enumerate(students):
            along = random(*W.shape, seed=1000 * dskd.steps + i)
            W += share * W.norm() * along / along.norm()


def expanded_at(share: float, steps: int, **settings) -> list[int]:
    """Numbers of the steps whose gradient was computed and not held."""
    dskd, students = loss_of([(64, 48), (48, 64)], svd_steps=1000, **settings)
    at = []
    for step in range(steps):
        before = dskd.expansions
        move(dskd, students, share)
        at += [step] if dskd.expansions > before else []
    return at


def test_without_drift_the_gradient_is_renewed_every_grad_steps():
    assert expanded_at(0.001, 10, grad_steps=3) == [0, 3, 6, 9]


def test_weights_that_stand_still_keep_their_gradient():
    assert expanded_at(0.0, 10, grad_steps=3, drift=0.01) == [0]


def test_weights_that_move_fast_are_renewed_every_grad_steps():
    assert expanded_at(0.1, 10, grad_steps=3, drift=0.01) == [0, 3, 6, 9]


def test_drift_renews_after_the_step_in_which_a_matrix_has_moved_too_far():
    # steps of 1% in directions that are almost orthogonal: after k of them 1% sqrt(k), above 2.5% from 7 on
    renewed = expanded_at(0.01, 15, grad_steps=1, drift=0.025)
    assert renewed[1] in (6, 7, 8)


def test_one_matrix_that_moves_is_enough():
    dskd, students = loss_of([(24, 16), (16, 24)], svd_steps=1000, grad_steps=1, drift=0.01)
    dskd()
    with dskd.observe(progress=0.5), torch.no_grad():
        students[1] *= 1.1
    dskd()
    assert dskd.expansions == 2


def test_a_choice_of_directions_renews_the_gradient_whatever_the_drift():
    dskd, students = loss_of([(24, 16)], svd_steps=4, grad_steps=4, drift=10.0)
    for _ in range(9):
        move(dskd, students, 1e-4)
    assert (dskd.choices, dskd.expansions) == (2, 3)


def test_drift_below_zero_or_not_finite_is_refused():
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="drift"):
            loss_of([(4, 4)], drift=wrong)


def test_a_resumed_run_renews_at_the_same_steps():
    settings = {"svd_steps": 7, "grad_steps": 1, "drift": 0.02}
    dskd, students = loss_of([(24, 16), (16, 24)], **settings)
    for _ in range(5):
        move(dskd, students, 0.005)
    resumed, copies = loss_of([(24, 16), (16, 24)], **settings)
    resumed.load_state_dict(dskd.state_dict())
    for copy, W in zip(copies, students, strict=True):
        copy.data.copy_(W)
        copy.grad = W.grad.clone()
    for _ in range(12):
        move(dskd, students, 0.005)
        move(resumed, copies, 0.005)
        assert dskd.expansions == resumed.expansions
        assert dskd.choices == resumed.choices
    for copy, W in zip(copies, students, strict=True):
        assert torch.equal(copy, W)


@pytest.mark.parametrize(("basis", "rank"), [("own", 3), ("update", 3), ("curvature", 0)])
def test_the_parts_of_a_refresh_do_not_change_it(basis, rank, monkeypatch):
    results = []
    for at_once in (10**9, 1):  # all matrices of a shape together, or one at a time
        monkeypatch.setattr(groups, "_AT_ONCE", at_once)
        dskd, students = loss_of([(9, 6), (6, 9), (9, 6), (6, 6), (6, 6)], rank=rank, svd_steps=2, basis=basis)
        for _ in range(5):
            move(dskd, students, 0.01)
        results.append((dskd().detach(), [W.grad for W in students], list(dskd.direction_weights().values())))
    assert_close(*results, rtol=1e-9, atol=1e-12)


def test_choices_are_counted_and_saved():
    dskd, students = loss_of([(6, 6)], svd_steps=3)
    for _ in range(7):
        move(dskd, students, 0.01)
    again, _ = loss_of([(6, 6)], svd_steps=3)
    again.load_state_dict(dskd.state_dict())
    assert dskd.choices == again.choices == 2


def falling(m: int, n: int, rate: float) -> Tensor:
    """A matrix whose singular values fall as exp(-rate i)."""
    U, V = torch.linalg.qr(random(m, n))[0], torch.linalg.qr(random(n, n, seed=1))[0]
    return U @ torch.diag(torch.exp(-rate * torch.arange(n, dtype=torch.float64))) @ V.mT


def test_the_randomized_driver_finds_the_leading_directions_of_a_falling_spectrum():
    matrix = falling(150, 120, 0.1)
    expected_sigma, expected_V = right_singular(matrix, "svd")
    sigma, V = right_singular(matrix, "randomized", 8)
    assert V.shape == (120, 40)
    assert_close(sigma[:8], expected_sigma[:8], rtol=1e-6, atol=0)
    assert_close((V[:, :8] * expected_V[:, :8]).sum(0).abs(), torch.ones(8, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_randomized_driver_gives_the_same_in_every_call():
    matrix = falling(150, 120, 0.02)
    torch.manual_seed(1)
    first = right_singular(matrix, "randomized", 8)
    torch.manual_seed(2)
    assert_close(right_singular(matrix, "randomized", 8), first, rtol=0, atol=0)


def test_the_randomized_driver_takes_all_directions_where_few_are_left_out():
    matrix = random(50, 40)
    assert_close(right_singular(matrix, "randomized", 8), right_singular(matrix, "gram"), rtol=0, atol=0)


def test_randomized_scores_select_what_exact_scores_select():
    update, grad = falling(150, 120, 0.1), falling(150, 120, 0.05) + 0.01 * random(150, 120, seed=3)
    exact = select_directions(direction_sensitivity(update, grad, 0.3, "svd"), 8)
    randomized = select_directions(direction_sensitivity(update, grad, 0.3, "randomized", 8), 8)
    assert randomized.shape == exact.shape
    assert torch.minimum(exact, randomized).sum() > 0.98


@every_singular_basis
def test_a_run_with_the_randomized_driver_stays_close_to_the_exact_one(basis):
    losses = {}
    for driver in ("svd", "randomized"):
        W = nn.Parameter(falling(150, 120, 0.05))
        dskd = make_loss([("W", W, random(150, 120))], 8, 2, basis=basis, driver=driver)
        losses[driver] = []
        for step in range(6):
            loss = dskd()
            (loss + (W * falling(150, 120, 0.1)).sum()).backward()
            with dskd.observe(progress=step / 6), torch.no_grad():
                W -= 0.01 * W.grad
            W.grad = None
            losses[driver].append(loss.item())
    assert losses["randomized"] == pytest.approx(losses["svd"], rel=0.02)


def smoothed_gradient(student: Tensor, teacher: Tensor, w: Tensor, smoothing: float) -> Tensor:
    """D = H P + 2 A V (F o sym(V^T A^T H V)) V^T of a tall student, F with x / (x^2 + smoothing^2) for 1 / x."""
    U, sigma, Vh = torch.linalg.svd(student, full_matrices=False)
    teacher_U, teacher_sigma, teacher_Vh = torch.linalg.svd(teacher, full_matrices=False)
    p = w.sqrt()
    H = 2 * (U @ torch.diag(p * sigma) @ Vh - teacher_U @ torch.diag(p * teacher_sigma) @ teacher_Vh)
    squares = (sigma / sigma[0]) ** 2
    x = squares[:, None] - squares[None, :]
    F = (p[:, None] - p[None, :]) * (x / (x**2 + smoothing**2)).fill_diagonal_(0) / sigma[0] ** 2
    Q = Vh @ student.T @ H @ Vh.T
    return H @ Vh.T @ torch.diag(p) @ Vh + 2 * student @ Vh.T @ (F * (Q + Q.T) / 2) @ Vh


@pytest.mark.parametrize("rank", [2, 5, 0])
@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_a_smoothed_gradient_follows_its_formula(rank, smoothing):
    W, teacher = nn.Parameter(random(11, 8)), random(11, 8, seed=1)
    dskd = make_loss([("W", W, teacher)], rank, 1, smoothing=smoothing, driver="svd")
    (W * random(11, 8, seed=2)).sum().backward()
    with dskd.observe(progress=0.3), torch.no_grad():
        W -= 0.1 * W.grad
    (gradient,) = torch.autograd.grad(dskd(), W)
    expected = smoothed_gradient(W.detach(), teacher, dskd.direction_weights()["W"], smoothing)
    assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def test_smoothing_does_not_change_the_loss():
    losses = [loss_of([(9, 6)], smoothing=smoothing)[0]().item() for smoothing in (0.0, 0.1)]
    assert losses[0] == losses[1]


def test_smoothing_tames_close_singular_values():
    U, V = torch.linalg.qr(random(9, 6))[0], torch.linalg.qr(random(6, 6, seed=1))[0]
    W = nn.Parameter(U @ torch.diag(torch.tensor([5, 3, 2 + 1e-6, 2, 1, 0.5], dtype=torch.float64)) @ V.mT)
    norms = {}
    for smoothing in (0.0, 0.01):
        dskd = make_loss([("W", W, random(9, 6, seed=3))], 3, smoothing=smoothing)
        norms[smoothing] = torch.autograd.grad(dskd(), W)[0].norm().item()
    assert norms[0.0] > 1e3 * norms[0.01]


def test_smoothing_below_zero_or_not_finite_is_refused():
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="smoothing"):
            loss_of([(4, 4)], smoothing=wrong)


def test_an_optimizer_that_leaves_the_gradient_alone_needs_no_copy_of_it():
    dskd, students = loss_of([(9, 6)], svd_steps=2)
    seen = []
    choose = dskd._choose
    dskd._choose = lambda step: seen.extend(step.gradients) or choose(step)
    for _ in range(2):
        move(dskd, students, 0.01)
    assert [grad.data_ptr() for grad in seen] == [students[0].grad.data_ptr()]


def test_an_optimizer_that_changes_the_gradient_delays_the_first_choice_by_a_step():
    W = nn.Parameter(random(9, 6))
    optimizer = torch.optim.SGD([W], lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    dskd = make_loss([("W", W, random(9, 6, seed=1))], 3, svd_steps=4)
    chosen = []
    for step in range(12):
        optimizer.zero_grad()
        (dskd() + (W * random(9, 6, seed=2)).sum()).backward()
        before = dskd.choices
        with dskd.observe(progress=0.5):
            optimizer.step()
        chosen += [step + 1] if dskd.choices > before else []
    assert chosen == [5, 8, 12]
