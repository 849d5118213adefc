"""`benchmark.py exactness`: the held gradient's measurements on a pair with a closed form, and what is made of them."""

import json
import sys

import numpy as np
import pytest
import torch
from nlp_fixtures import write_model, write_rte
from torch import nn

from common import ROOT
from cv import trainer
from dskd import DirectionSensitivityLoss, Own
from dskd.matrices import DRIVERS

sys.path.append(str(ROOT / "scripts"))
from scripts import benchmark
from scripts.lib.benchmark import exactness
from scripts.lib.benchmark.held_gradient import HeldGradient, Reference, applied
from scripts.lib.benchmark.loops import random_images


@pytest.fixture(scope="module")
def observed() -> tuple[HeldGradient, list[np.ndarray], np.ndarray]:
    """5 steps on one 4 x 3 pair, directions chosen after 3, gradients kept after 0, 1 and 3; the weights after every
    step, and the teacher's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator) for _ in range(2))
    student = nn.Parameter(student)
    noise = torch.randn(6, 4, 3, generator=generator)
    dskd = DirectionSensitivityLoss([("a", student, teacher)], Own(rank=0), svd_steps=3)
    optimizer = torch.optim.SGD([student], lr=0.1)
    held = HeldGradient(dskd, {"first": [0, 1], "second": [3]})
    weights = [student.detach().double().numpy().copy()]
    for step in range(5):
        optimizer.zero_grad()
        (dskd() + (student * noise[step]).sum()).backward()
        with dskd.observe(step / 6):
            optimizer.step()
        weights.append(student.detach().double().numpy().copy())
    return held, weights, teacher.double().numpy()


# Before the first choice of all directions the loss is ||W_s - W_t||^2 / 3
def test_the_cosine_is_that_of_the_exact_gradients(observed):
    held, weights, teacher = observed
    gaps = [(W - teacher).ravel() for W in weights[:3]]
    expected = [gaps[0] @ gap / np.linalg.norm(gaps[0]) / np.linalg.norm(gap) for gap in gaps]
    np.testing.assert_allclose(np.ravel(held.references[0].cosine["own, 0"]), expected, rtol=1e-6)


def test_a_gradient_is_compared_at_every_age_until_directions_are_chosen_anew(observed):
    ages = {(r.stage, r.step): len(r.cosine["own, 0"]) for r in observed[0].references}
    assert ages == {("first", 0): 3, ("first", 1): 2, ("second", 3): 3}


def test_every_driver_is_compared_where_directions_were_chosen(observed):
    for driver in DRIVERS:
        assert observed[0].overlap[driver] == pytest.approx([1.0], abs=1e-4)
        assert observed[0].references[-1].gradient[driver] == pytest.approx([1.0], abs=1e-6)


COSINES = [[1.0, 1.0], [0.9, 1.0], [0.7, 0.9], [0.5, 0.8]]
REFERENCE = Reference("stage", 0, cosine={"own, 0": COSINES})
SHORT = Reference("stage", 2, cosine={"own, 0": COSINES[:2]})


def test_the_applied_gradient_is_averaged_over_the_interval():
    np.testing.assert_allclose(applied(COSINES, 1), [1.0, 1.0])
    np.testing.assert_allclose(applied(COSINES, 3), [(1.0 + 0.9 + 0.7) / 3, (1.0 + 1.0 + 0.9) / 3])


def test_an_interval_that_a_choice_cuts_short_is_no_part_of_the_mean(monkeypatch):
    monkeypatch.setattr(exactness, "INTERVALS", (1, 2, 4, 8))
    found = exactness.by_interval([REFERENCE, SHORT])["own, 0"]
    assert found.keys() == {"1", "2", "4"}
    assert found["2"] == {"mean": pytest.approx(np.mean(COSINES[:2])), "worst": pytest.approx(0.95)}
    assert found["4"] == {"mean": pytest.approx(np.mean(COSINES)), "worst": pytest.approx(0.775)}


def test_the_basis_update_is_compared_along_the_last_choice(observed):
    held, weights, teacher = observed
    w = held.dskd.direction_weights()["a"].double().numpy()
    U, _, Vh = np.linalg.svd(weights[3] - weights[2], full_matrices=False)
    gradients = [
        sum(w[i] * (U[:, i] @ (W - teacher) @ Vh[i]) * np.outer(U[:, i], Vh[i]) for i in range(3)).ravel()
        for W in weights[3:6]
    ]
    expected = [gradients[0] @ g / np.linalg.norm(gradients[0]) / np.linalg.norm(g) for g in gradients]
    np.testing.assert_allclose(np.ravel(held.references[-1].cosine["update"]), expected, rtol=1e-4)


def test_it_trains_by_both_programs_and_writes_its_tables(tmp_path, monkeypatch, capsys, fresh_accelerator):
    write_rte(tmp_path / "RTE", train=24, dev=12)
    monkeypatch.setattr(trainer, "load_dataset", lambda *_, **__: random_images(16))
    words = ["--quick", "--output", tmp_path, "--glue", tmp_path, "--model", write_model(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "exactness", *map(str, words)])
    benchmark.main()
    written = json.loads((tmp_path / "exactness.json").read_text())
    for result in (written["cv"], written["nlp"]):
        assert [(r["step"], r["steps"]) for r in result["references"]] == [
            (step, 4 if step % 4 == 0 else 2) for step in (0, 2, 4, 6, 8, 10)
        ]
        for stage in result["by_grad_steps"].values():
            assert stage["own, 0"]["1"] == {"mean": pytest.approx(1.0), "worst": pytest.approx(1.0)}
            assert stage.keys() == {"own, 0", "own, 0.003", "own, 0.01", "own, 0.03", "update"}
    assert (tmp_path / "exactness.svg").is_file()
    shown = capsys.readouterr().out
    assert "| CIFAR, beginning |" in shown
    assert "gradient, authors' release" in shown
