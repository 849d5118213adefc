"""scripts/study/weights.py: how close students came to their teachers."""

import sys

import pandas as pd
import pytest
import torch
from cv_fixtures import save_teacher, short_run

from common.run.errors import UserError
from scripts.study import weights


def test_cosine_and_distance_are_those_of_the_matrices():
    eye = torch.eye(2)
    turned = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = weights.closeness([("half", eye, 2 * eye), ("across", turned, eye)])
    # distances ||I - 2I|| / ||2I|| = 1/2 and ||X - I|| / ||I|| = sqrt(2); both students have two singular values 1
    sizes = {"norm": 2**0.5, "sigma_1": 1}
    assert found == pytest.approx({"cosine": 0.5, "lowest": 0, "highest": 1, "distance": (0.5 + 2**0.5) / 2, **sizes})


def test_a_convolution_is_measured_as_its_matrix():
    kernel = torch.ones(2, 3, 1, 1)  # of rank 1: one singular value, sqrt(6)
    found = weights.closeness([("conv", kernel, kernel)])
    assert found["sigma_1"] == pytest.approx(6**0.5)
    assert found["norm"] == pytest.approx(6**0.5)


def test_runs_with_a_teacher_get_a_line_each(tmp_path, monkeypatch, capsys):
    teacher = save_teacher(tmp_path / "teacher")
    short_run(tmp_path / "copied", teacher, "DISTILLER.START teacher DISTILLER.STUDENT resnet14 SOLVER.LR 1e-9")
    short_run(tmp_path / "random", teacher, "SOLVER.LR 1e-9")
    short_run(tmp_path / "vanilla", None, "DISTILLER.TYPE vanilla DISTILLER.TEACHER ''")
    folders = [str(tmp_path / name) for name in ("copied", "random", "vanilla")]
    monkeypatch.setattr(sys, "argv", ["weights.py", *folders, "--output", str(tmp_path / "weights.csv")])
    weights.main()
    lines = pd.read_csv(tmp_path / "weights.csv").set_index("run")
    assert lines["method"].to_dict() == {"copied": "kd, from the teacher", "random": "kd"}
    assert lines.loc["copied", "cosine"] == pytest.approx(1, abs=1e-3)
    assert abs(lines.loc["random", "cosine"]) < 0.1
    assert "copied" in capsys.readouterr().out


def test_another_teacher_than_the_runs_is_refused(tmp_path, monkeypatch):
    teacher = save_teacher(tmp_path / "teacher")
    short_run(tmp_path / "run", teacher)
    save_teacher(teacher, seed=8)
    monkeypatch.setattr(sys, "argv", ["weights.py", str(tmp_path / "run")])
    with pytest.raises(UserError, match="teacher is not the teacher that run was distilled from"):
        weights.main()


def test_an_output_that_is_a_folder_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["weights.py", "nowhere", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        weights.main()


def test_folders_without_a_teacher_are_refused(tmp_path, monkeypatch):
    short_run(tmp_path / "vanilla", None, "DISTILLER.TYPE vanilla DISTILLER.TEACHER ''")
    monkeypatch.setattr(sys, "argv", ["weights.py", str(tmp_path / "vanilla")])
    with pytest.raises(UserError, match="names a teacher"):
        weights.main()
