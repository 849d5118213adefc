"""scripts/heal.py: what it refuses, in one line and before anything is trained."""

import sys

import pytest

from common.run.errors import UserError
from scripts import heal


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs it with some words on a folder of GLUE files of one line; gives its complaint."""
    for file, column in (heal.TRAIN, *heal.TESTS.values()):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"{column}\nA line.\n", encoding="utf-8")

    def complaint(words: str) -> str:
        folders = ["--glue", str(tmp_path), "--output_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["heal.py", *folders, *words.split()])
        with pytest.raises(UserError) as raised:
            heal.main()
        return str(raised.value).replace(str(tmp_path), "DATA")

    return complaint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model x --arm kd --weight 1", "--weight 1: --arm kd takes none"),
        ("--model x --arm curvature", "--weight 0: --arm curvature takes a weight above 0"),
        ("--model x --arm kd --glue nowhere", "--glue: there is no nowhere/RTE/train.tsv"),
        ("--model nowhere/at/all --arm kd", "--model nowhere/at/all cannot be loaded: "),
    ],
)
def test_it_says_what_is_wrong(refused, words, said):
    assert refused(words).startswith(said)
