"""What the readings have in common: their settings, and that they agree where they should."""

from dataclasses import dataclass

import pytest
import torch
from losses import make_loss
from runs import SHAPES, SINGULAR_BASES, Run
from torch import Tensor, nn
from torch.testing import assert_close

from dskd import Curvature, DirectionSensitivityLoss, Own, Update
from dskd.readings import Reading


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


# Bad settings
def one_pair() -> list[tuple[str, Tensor, Tensor]]:
    return [("layer", nn.Parameter(torch.ones(3, 2)), torch.zeros(3, 2))]


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


@pytest.mark.parametrize("reading", [Own, Update])
@pytest.mark.parametrize("score", ["tempered", None, 3])
def test_a_score_that_is_no_function_is_refused(reading, score):
    with pytest.raises(TypeError, match=f"score must be a function such as .*, got {score!r}"):
        reading(score=score)


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


# Those of one's own
@dataclass(frozen=True, repr=False)
class Nearest(Reading):
    """The squared difference, times the number of choices made."""

    factor: float = 1.0

    def start(self, student_mn):
        return {"weights": torch.ones(len(student_mn), 1, dtype=student_mn.dtype)}

    def choose(self, update_mn, gradient_mn, progress, chosen):
        return {"weights": chosen["weights"] + 1}

    def value_and_gradient(self, student_mn, target, chosen):
        gap_mn, scale = student_mn - target["teacher"], self.factor * chosen["weights"][..., None]
        return (scale * gap_mn.square()).sum((-2, -1)), 2 * scale * gap_mn


def test_a_reading_of_ones_own_is_chosen_with_compared_with_shown_and_saved():
    run, again = Run(rank=3), Run(rank=3)
    for each in (run, again):
        pairs = [(name, W, each.teachers[name]) for name, W in each.students.items()]
        each.dskd = DirectionSensitivityLoss(pairs, Nearest(0.5), svd_steps=2)
    run.train(5)
    gaps = [(W - run.teachers[name]).square().sum() for name, W in run.students.items()]
    assert_close(run.dskd(), 0.5 * 3 * sum(gaps) / len(SHAPES))
    assert_close(run.gradients()["tall"], 3 * (run.students["tall"] - run.teachers["tall"]).detach() / len(SHAPES))
    assert "Nearest(factor=0.5)" in repr(run.dskd)
    again.dskd.load_state_dict(run.dskd.state_dict())
    assert again.weights() == run.weights() == {name: torch.tensor([3.0]) for name in SHAPES}


def longest_rows(update_mn, gradient_mn, sigma_q, V_nq, progress):
    return sigma_q.flip(-1)


@pytest.mark.parametrize("reading", [Own, Update])
def test_a_score_of_ones_own_chooses_the_directions(reading):
    run = Run(rank=3)
    pairs = [(name, W, run.teachers[name]) for name, W in run.students.items()]
    run.dskd = DirectionSensitivityLoss(pairs, reading(2, score=longest_rows), svd_steps=1)
    run.train(1)
    for row in run.weights().values():
        assert row[-1] == 1  # the last one's score is the largest, and the second one's counts as the least
    assert "score=longest_rows" in repr(run.dskd)
