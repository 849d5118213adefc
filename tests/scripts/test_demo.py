"""The demo's tables, differences, plot and next steps, from runs that left their records; how a failed run ends it."""

import json

import pytest
import torch

from common import ROOT
from common.run.errors import UserError
from cv.config import load_config
from cv.export import save_model
from cv.models import build_model
from scripts.lib.demo.report import Part, plot, write_part
from scripts.lib.demo.runs import Run, launch


@pytest.fixture
def part(tmp_path):
    """A part of three kinds of runs on images, two seeds each, and their teacher."""

    def run(name: str, seed: int, last: float) -> Run:
        folder = tmp_path / f"{name}_{seed}"
        torch.manual_seed(seed)
        save_model(build_model("resnet8", 10), "resnet8", folder / "student", image_size=8)
        (folder / "result.json").write_text(json.dumps({"last": last, "parameters": 78_000, "metric": "top1"}))
        return Run(name, seed, folder, ("train.py",))

    students = {
        "KD": [run("kd", 1, 90.0), run("kd", 2, 92.0)],
        "KD + DSKD": [run("dskd", 1, 93.0), run("dskd", 2, 91.0)],
        "no teacher": [],
    }
    return Part("few", "Few images: 20 digits", "the teacher", [run("teacher", 1, 99.0)], students)


def test_a_part_ends_with_its_table_the_difference_and_what_to_do_next(part, tmp_path):
    said = write_part(tmp_path, part)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line[:1] == "|"]
    assert [row[:3] for row in rows] == [
        ["run", "test top-1, %", "seeds"],
        [rows[1][0], rows[1][1], rows[1][2]],
        ["the teacher", "99.00", "1"],
        ["chance", "10.00", ""],
        ["KD", "91.00 ± 1.41", "2"],
        ["KD + DSKD", "92.00 ± 1.41", "2"],
    ]
    assert "KD + DSKD minus KD: +1.00 ± 2.83, higher in 1 of 2 seeds" in said
    student = tmp_path / "dskd_1" / "student"
    assert f"report:  python scripts/report.py {student.parent}" in said
    assert f'load:    cv.export.load_model("{student}")' in said
    assert f"predict: python cv/predict.py {student} IMAGE" in said
    assert said.startswith((tmp_path / "few.md").read_text())


def test_the_plot_has_points_and_no_bars(part, tmp_path):
    plot(tmp_path, [part, part])
    text = (tmp_path / "demo.svg").read_text()
    assert (tmp_path / "demo.png").stat().st_size > 5000
    assert "mean ± std" in text
    assert "KD + DSKD" in text
    assert "no teacher" not in text


def test_a_run_that_fails_ends_the_demo_with_its_output(tmp_path, capsys):
    script = tmp_path / "broken.py"
    script.write_text("print('what went wrong'); raise SystemExit(3)")
    with pytest.raises(UserError, match=r"kd_seed1 failed \(exit code 3\)"):
        launch(Run("kd", 1, tmp_path / "kd_seed1", (script, "--flag")))
    assert "what went wrong" in capsys.readouterr().out


def test_the_demo_has_the_recipe_of_few_images():
    """The settings of configs/few/ that do not depend on the data."""
    ours, theirs = load_config("configs/demo/few_dskd.yaml"), load_config("configs/few/cifar100_res56_res8.yaml")
    assert ours.DISTILLER.START == theirs.DISTILLER.START == "teacher"
    assert ours.DATASET.SUBSET_SEED == theirs.DATASET.SUBSET_SEED == -1
    keys = ("LAMBDA", "BASIS", "SVD_STEPS", "RANK", "DIRECTION")
    assert [ours.DSKD[key] for key in keys] == [theirs.DSKD[key] for key in keys]
    assert (ROOT / "configs" / "demo" / "few.yaml").is_file()
