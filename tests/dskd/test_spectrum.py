"""The reading `Spectrum` against float64 numpy, finite differences and degenerate matrices, alone and in the loss."""

import copy

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from dskd import Curvature, DirectionSensitivityLoss, Own, Spectrum, Update, pair_layers
from dskd.controls import ConstantProgress, Plain

SHAPES = [((7, 5), (12, 9)), ((5, 7), (4, 3)), ((6, 6), (9, 4)), ((4, 9), (9, 4)), ((5, 5), (5, 5))]
shapes = pytest.mark.parametrize(("ours", "theirs"), SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(drawn(*shape, seed=seed))


def trained(loss: DirectionSensitivityLoss, weight: nn.Parameter, gradient: torch.Tensor, progress: float = 0.5):
    """One step of gradient descent in which the loss chooses; the update that it made."""
    before, weight.grad = weight.detach().clone(), gradient.clone()
    with loss.observe(progress):
        torch.optim.SGD([weight], lr=0.1).step()
    return weight.detach() - before


@shapes
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("driver", ["gram", "svd", "randomized"])
def test_value_and_gradient_before_a_choice_are_the_oracles(ours, theirs, rank, driver):
    student, teacher = parameter(*ours), drawn(*theirs, seed=1)
    loss = DirectionSensitivityLoss([("layer", student, teacher)], Spectrum(rank, driver))
    value = loss()
    value.backward()
    w, scale = oracle.first_weights(min(ours), rank), oracle.spectrum_scale(student, teacher)
    assert value.item() == pytest.approx(oracle.spectrum_loss(student, teacher, w, scale), rel=1e-9)
    np.testing.assert_allclose(student.grad, oracle.spectrum_gradient(student, teacher, w, scale), atol=1e-9)


@shapes
@pytest.mark.parametrize("rank", [0, 3])
def test_value_and_gradient_after_a_choice_are_the_oracles(ours, theirs, rank):
    student, teacher, gradient = parameter(*ours), drawn(*theirs, seed=1), drawn(*ours, seed=2)
    loss = DirectionSensitivityLoss([("layer", student, teacher)], Spectrum(rank, "svd"), svd_steps=1)
    loss()
    scale = oracle.spectrum_scale(student, teacher)  # of the student before the step
    update = trained(loss, student, gradient)
    w = oracle.weights(oracle.scores(update, gradient, 0.5)[2], rank)
    np.testing.assert_allclose(loss.direction_weights()["layer"], w, atol=1e-6)
    student.grad = None
    value = loss()
    value.backward()
    assert value.item() == pytest.approx(oracle.spectrum_loss(student, teacher, w, scale), rel=1e-6)
    np.testing.assert_allclose(student.grad, oracle.spectrum_gradient(student, teacher, w, scale), atol=1e-6)


@shapes
def test_the_gradient_is_that_of_finite_differences(ours, theirs):
    student, teacher = parameter(*ours), drawn(*theirs, seed=1)
    loss = DirectionSensitivityLoss([("layer", student, teacher)], Spectrum(0))
    w, scale = oracle.first_weights(min(ours), 0), oracle.spectrum_scale(student, teacher)
    [D] = loss.gradients()
    differences = oracle.finite_difference(lambda W: oracle.spectrum_loss(W, teacher, w, scale), student)
    np.testing.assert_allclose(D, differences, atol=1e-6)


def test_the_scale_stays_what_it_was_at_the_first_computation():
    student, teacher = parameter(6, 4), drawn(8, 8, seed=1)
    loss = DirectionSensitivityLoss([("layer", student, teacher)], Spectrum(0))
    first = loss.groups[0]
    loss()
    before = {key: value.clone() for key, value in first.targets[(0,)].items()}
    with torch.no_grad():
        student.mul_(3)
    loss()
    torch.testing.assert_close(first.targets[(0,)], before, rtol=0, atol=0)


def test_student_and_scaled_rotated_copy_of_it_are_not_apart():
    """What the reading keeps is the spectrum: neither the scale nor the directions of the teacher count."""
    student = parameter(6, 4)
    left, right = torch.linalg.qr(drawn(9, 6, seed=1))[0], torch.linalg.qr(drawn(5, 4, seed=2))[0]
    loss = DirectionSensitivityLoss([("layer", student, 7 * left @ student.detach() @ right.T)], Spectrum(0))
    assert loss().item() == pytest.approx(0, abs=1e-20)
    assert loss.gradients()[0].abs().max() < 1e-10


def test_descent_brings_the_spectrum_to_the_teachers():
    student, teacher = parameter(6, 4), drawn(9, 7, seed=1)
    loss = DirectionSensitivityLoss([("layer", student, teacher)], Spectrum(0), svd_steps=10**6)
    optimizer = torch.optim.SGD([student], lr=0.5)
    wanted = oracle.spectrum_scale(student, teacher) * np.linalg.svd(teacher.numpy())[1][:4]
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        with loss.observe(0.0):
            optimizer.step()
    np.testing.assert_allclose(np.linalg.svd(student.detach().numpy())[1], wanted, rtol=1e-6)


@pytest.mark.parametrize("driver", ["gram", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param(torch.zeros(6, 4), torch.ones(3, 5), id="zero student"),
        pytest.param(torch.randn(6, 4), torch.zeros(3, 5), id="zero teacher"),
        pytest.param(torch.zeros(6, 4), torch.zeros(3, 5), id="zeros"),
        pytest.param(torch.eye(6, 4), torch.eye(9, 9), id="repeated singular values"),
        pytest.param(torch.ones(6, 4), torch.randn(9, 9), id="rank one"),
        pytest.param(torch.full((6, 4), 1e-15), torch.full((9, 9), 1e15), id="far apart in scale"),
    ],
)
def test_degenerate_matrices_have_finite_losses_and_gradients(student, teacher, dtype, driver):
    weight = nn.Parameter(student.to(dtype))
    loss = DirectionSensitivityLoss([("layer", weight, teacher.to(dtype))], Spectrum(3, driver))
    assert loss().isfinite()
    assert loss.gradients()[0].isfinite().all()


def test_a_zero_direction_is_pulled_nowhere():
    weight = nn.Parameter(torch.diag(torch.tensor([2.0, 1.0, 0.0])).double())
    loss = DirectionSensitivityLoss([("layer", weight, drawn(5, 5))], Spectrum(0, "svd"))
    D = loss.gradients()[0]
    assert D[2].abs().max() < 1e-12
    assert D[:2].abs().max() > 0.01


def test_directions_that_the_teacher_lacks_count_for_nothing():
    student, teacher = parameter(6, 5), drawn(9, 2, seed=1)
    D = DirectionSensitivityLoss([("layer", student, teacher)], Spectrum(0)).gradients()[0]
    assert np.linalg.matrix_rank(D.numpy(), tol=1e-9) == 2


def test_convolutions_of_unequal_kernels_count_as_matrices():
    student, teacher = parameter(4, 3, 3, 3), drawn(8, 3, 1, 1, seed=1)
    loss = DirectionSensitivityLoss([("layer", student, teacher)], Spectrum(0))
    loss().backward()
    ours, theirs = student.detach().reshape(4, 27), teacher.reshape(8, 3)
    expected = oracle.spectrum_gradient(ours, theirs, oracle.first_weights(4, 0), oracle.spectrum_scale(ours, theirs))
    np.testing.assert_allclose(student.grad.reshape(4, 27), expected, atol=1e-9)


@pytest.mark.parametrize("reading", [Own(), Update(), Curvature(), Plain(Spectrum()), ConstantProgress(Own())])
def test_other_readings_refuse_unequal_shapes_and_name_this_one(reading):
    pairs = [("layer", parameter(3, 4), drawn(5, 6))]
    with pytest.raises(ValueError, match=r"pair layer: student \(3, 4\) and teacher \(5, 6\) .* Spectrum"):
        DirectionSensitivityLoss(pairs, reading)


def test_a_teacher_without_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"pair layer: \(5,\) is no matrix"):
        DirectionSensitivityLoss([("layer", parameter(3, 4), drawn(5))], Spectrum())


def test_pairs_are_grouped_by_both_shapes():
    pairs = [(str(i), parameter(4, 3, seed=i), drawn(*shape)) for i, shape in enumerate([(5, 6), (4, 3), (5, 6)])]
    loss = DirectionSensitivityLoss(pairs, Spectrum())
    assert [group.index for group in loss.groups] == [[0, 2], [1]]
    alone = [DirectionSensitivityLoss([pair], Spectrum())().item() for pair in pairs]
    assert loss().item() == pytest.approx(sum(alone) / 3)


@pytest.mark.parametrize("driver", ["gram", "svd"])
def test_a_process_without_rows_of_its_own_computes_none(driver):
    pairs = [("layer", parameter(6, 4), drawn(3, 5))]
    loss = DirectionSensitivityLoss(pairs, Spectrum(2, driver))
    loss()
    group = loss.groups[0]
    target, chosen = group.target(loss.reading, loss.teachers, []), group.of_rows([])
    value, D = loss.reading.value_and_gradient(group.stack(loss.students, []), target, chosen)
    assert (value.shape, D.shape, target["sigma"].shape) == ((0,), (0, 6, 4), (0, 3))


@pytest.mark.parametrize("span", ["step", "interval"])
def test_a_resumed_loss_continues_bit_for_bit(span):
    teacher = drawn(8, 8, seed=1)

    def steps(loss, weight, count):
        values = []
        for _ in range(count):
            trained(loss, weight, drawn(6, 4, seed=10 + loss.steps), progress=loss.steps / 10)
            values.append(loss().item())
        return values

    weight = parameter(6, 4)
    loss = DirectionSensitivityLoss([("layer", weight, teacher)], Spectrum(2, span=span), svd_steps=2)
    steps(loss, weight, 3)
    state, saved = copy.deepcopy(loss.state_dict()), nn.Parameter(weight.detach().clone())
    expected = steps(loss, weight, 4)
    resumed = DirectionSensitivityLoss([("layer", saved, teacher)], Spectrum(2, span=span), svd_steps=2)
    resumed.load_state_dict(state)
    assert steps(resumed, saved, 4) == expected


@pytest.mark.parametrize("settings", [{"rank": -1}, {"driver": "qr"}, {"span": "epoch"}])
def test_a_setting_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Spectrum(**settings)


def test_a_score_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="score must be a function"):
        Spectrum(score="magnitude")


def test_networks_of_unequal_width_train_with_it():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    pairs = pair_layers(student, teacher, any_shape=True)
    assert [name for name, _, _ in pairs] == ["0", "2"]
    loss = DirectionSensitivityLoss(pairs, Spectrum(4), svd_steps=2)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    loss.attach(optimizer, total_steps=8)
    before = loss().item()
    for _ in range(8):
        optimizer.zero_grad()
        (student(torch.randn(16, 8)).square().mean() + loss()).backward()
        optimizer.step()
    assert loss.choices == 4
    assert loss().item() < before
