"""Predictions of all tasks as one zip, or what is wrong with them in a line."""

import zipfile
from pathlib import Path

import pytest

from bert_of_theseus.tasks import DIAGNOSTICS, TASKS
from common.run.errors import UserError
from scripts import glue_submission as script
from scripts.glue_submission import ROWS, collect


def write(folder: Path, name: str, rows: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{i}\t1\n" for i in range(ROWS[name] if rows is None else rows)]
    (folder / name).write_text("".join(["index\tprediction\n", *lines]))


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[Path]:
    """A run of each file, with tests of three examples."""
    monkeypatch.setattr(script, "ROWS", dict.fromkeys(ROWS, 3))
    for name in ROWS:
        write(tmp_path / Path(name).stem / "predictions", name, 3)
    return [tmp_path / Path(name).stem for name in ROWS]


def test_the_files_are_those_that_the_program_writes():
    written = [name for task in (*TASKS, DIAGNOSTICS) for name in task.predictions.values()]
    assert sorted(written) == sorted(ROWS)


def test_the_zip_holds_all_files_and_nothing_else(runs, tmp_path, monkeypatch):
    (runs[0] / "predictions" / "CoLA.probabilities.tsv").write_text("index\t0\t1\n")
    monkeypatch.setattr("sys.argv", ["glue_submission.py", *map(str, runs), "--output", str(tmp_path / "all.zip")])
    script.main()
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert sorted(archive.namelist()) == sorted(ROWS)
        assert archive.read("RTE.tsv").decode() == "index\tprediction\n0\t1\n1\t1\n2\t1\n"


def test_missing_files_are_named_and_no_zip_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["glue_submission.py", *map(str, runs[2:]), "--output", str(tmp_path / "all.zip")])
    with pytest.raises(UserError, match=r"all 11 files, and these are missing: CoLA\.tsv, SST-2\.tsv;"):
        script.main()
    assert not (tmp_path / "all.zip").exists()


def test_a_file_of_two_runs_is_refused(runs, tmp_path):
    write(tmp_path / "again", "RTE.tsv", 3)
    with pytest.raises(UserError, match=r"RTE\.tsv is there twice.*RTE/predictions.*again/RTE\.tsv"):
        collect([*runs, tmp_path / "again"])


@pytest.mark.parametrize("rows", [276, 3001])
def test_predictions_of_another_set_are_refused(tmp_path, rows):
    write(tmp_path, "RTE.tsv", rows)
    with pytest.raises(UserError, match=rf"has {rows:,} predictions, the test set 3,000 examples"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line is ''"),
        ("id\tlabel\n0\t1\n", "its first line is"),
        ("index\tprediction\n1\t1\n", "line 2: '1\\\\t1'; 0, a tab and a prediction"),
        ("index\tprediction\n0\t1\n1\t\n", "line 3"),
        ("index\tprediction\n0\t1\t0.9\n", "line 2"),
    ],
)
def test_a_file_that_the_server_would_refuse_is_named(tmp_path, text, message):
    (tmp_path / "RTE.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        collect([tmp_path])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        collect([tmp_path / "gone"])
