"""What a run says before and after the training: warnings, the table at the end, predictions of its student."""

import re

import pytest
import torch
from cv_fixtures import save_teacher, short_config
from PIL import Image

from common.run.errors import UserError
from cv.data import DataSets, ImageSet
from cv.export import save_model
from cv.models import build_model
from cv.predict import predict
from cv.reporting import baseline, warnings_before
from cv.trainer import train


def data(side: int = 32, images: int = 128, labels: list[int] | None = None) -> DataSets:
    chosen = torch.tensor(labels) if labels else torch.arange(images) % 2
    pixels = torch.zeros(len(chosen), 3, side, side, dtype=torch.uint8)
    sets = ImageSet(pixels, chosen, 2)
    return DataSets(sets, sets, ["a", "b"], (0.5,) * 3, (0.5,) * 3, None)


def config(tmp_path, overrides: str = ""):
    return short_config(tmp_path, None, f"SOLVER.EPOCHS 240 {overrides}")


def test_what_hardly_was_meant_is_warned_of_in_a_line_each(tmp_path):
    assert warnings_before(config(tmp_path), data()) == []
    (late,) = warnings_before(config(tmp_path, "SOLVER.LR_DECAY_STAGES [100,240]"), data())
    assert late == "LR_DECAY_STAGES [240] lie behind the last epoch, 240"
    (large,) = warnings_before(config(tmp_path), data(side=224, images=2))
    assert "images of 224 cost 49 times the time" in large
    assert warnings_before(config(tmp_path, "DISTILLER.STUDENT timm/x DISTILLER.TEACHER ''"), data(224, 2)) == []


def test_epochs_that_do_not_fit_a_folder_are_said_with_those_that_do(tmp_path):
    (few,) = warnings_before(config(tmp_path, "DATASET.NAME folder"), data(images=128))
    assert few.startswith("240 epochs of 128 images are 960 steps; SOLVER.EPOCHS 500 SOLVER.LR_DECAY_STAGES")
    assert "[312,375,437] would be 2000" in few
    fits = config(tmp_path, "DATASET.NAME folder SOLVER.EPOCHS 500")
    assert warnings_before(fits, data(images=128)) == []
    (many,) = warnings_before(config(tmp_path, "DATASET.NAME folder"), data(side=8, images=40_000))
    assert "SOLVER.EPOCHS 150 SOLVER.LR_DECAY_STAGES [93,112,131]" in many


def test_the_guess_without_an_image_is_chance_or_the_most_frequent_class():
    assert baseline(data()) == ("chance", 50.0)
    name, share = baseline(data(labels=[0, 0, 0, 1]))
    assert (name, share) == ("majority", 75.0)


def test_a_run_ends_with_its_table_and_the_next_steps(tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher")
    folder = tmp_path / "run"
    train(short_config(folder, teacher, "DSKD.ENABLED true DSKD.SVD_STEPS 1000"))
    printed = capsys.readouterr().out
    assert re.search(r"^teacher +10\.00 +0\.1\d M +\d\.\d\d MB +\d+\.\d$", printed, re.MULTILINE)
    assert re.search(r"^student, last +\d+\.\d\d +0\.08 M +0\.31 MB +\d+\.\d$", printed, re.MULTILINE)
    assert re.search(r"^student, best +\d+\.\d\d$", printed, re.MULTILINE)
    assert "warning: no directions were chosen in the whole run" in printed
    assert f"python scripts/report.py {folder}" in printed
    assert f"python cv/predict.py {folder / 'student'} IMAGE" in printed


def test_the_student_predicts_image_files_of_any_size(tmp_path):
    torch.manual_seed(0)
    facts = {"image_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3, "class_names": list("abc")}
    save_model(build_model("resnet8", 3), "resnet8", tmp_path / "student", **facts)
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    Image.new("RGB", (20, 30), "red").save(files[0])
    Image.new("L", (8, 8), 200).save(files[1])
    found = predict(tmp_path / "student", files)
    assert all(name in "abc" and 1 / 3 <= probability <= 1 for name, probability in found)
    save_model(build_model("resnet8", 3), "resnet8", tmp_path / "bare")
    with pytest.raises(UserError, match="image_size"):
        predict(tmp_path / "bare", files)
