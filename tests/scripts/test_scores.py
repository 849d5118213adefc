"""The study of the release's choice of directions, on matrices whose answer is known."""

import json
import sys

import pytest
import torch

from common import ROOT

sys.path.append(str(ROOT / "scripts"))
from scripts.lib.benchmark.loops import random_images
from scripts.study import observed_runs, scores
from scripts.study.scores import NAMES, ScoreOverlaps


def observed(update: torch.Tensor, grad: torch.Tensor, step: int = 10) -> dict[str, list[float]]:
    """Overlaps at one choice, all directions, in the last of 10 steps unless said otherwise."""
    student = torch.nn.Parameter(torch.zeros(4, 4))
    overlaps = ScoreOverlaps([("layer", student, torch.ones(4, 4))], rank=0, svd_steps=step, total=10)
    student.grad = grad
    overlaps.before_step(step)
    with torch.no_grad():
        student += update
    overlaps.after_step(step)
    return overlaps.overlaps


def test_both_agree_with_the_method_where_curvature_is_diagonal_and_scores_fall_with_the_singular_value():
    falling = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert observed(falling, falling) == {name: [pytest.approx(1.0)] for name in NAMES}


def test_the_order_of_the_release_misses_a_small_singular_value_of_large_score():
    update, grad = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), torch.diag(torch.tensor([0.0, 0.0, 0.0, 9.0]))
    found = observed(update, grad)
    assert found["order"] == [pytest.approx(0.0)]  # all weight on the fourth direction, given to the first
    assert found["curvature"] == [pytest.approx(1.0)]


def test_the_release_mixes_directions_where_the_curvature_is_not_diagonal():
    update = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    (share,) = observed(update, grad)["curvature"]
    assert 0.0 < share < 0.99


def test_the_beginning_of_training_has_no_curvature_to_differ_in():
    update = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert observed(update, grad, step=1)["curvature"] == [pytest.approx(1.0)]


def test_the_study_trains_and_writes_both_overlaps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(observed_runs, "load_dataset", lambda name, root: random_images(32))
    monkeypatch.setattr(sys, "argv", ["scores", "--quick", "--output", str(tmp_path)])
    scores.main()
    text = capsys.readouterr().out
    written = json.loads((tmp_path / "scores.json").read_text())["overlap_of_the_direction_weights"]
    assert written.keys() == NAMES.keys()
    for overlap in written.values():
        assert 0.0 <= overlap["worst"] <= overlap["mean"] <= 1.0
        assert overlap["n"] == 2 * 18  # choices and pairs
        assert f"{overlap['mean']:.3f}" in text
