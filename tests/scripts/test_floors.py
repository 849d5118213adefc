"""scripts/study/floors.py reads the lowest versions out of setup.py."""

from common import ROOT
from scripts.study.floors import floors


def test_every_range_has_its_lowest_version():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = floors(text)
    assert found["torch"] == "2.5"
    assert found["transformers"] == "4.48.3"
    assert found["scikit-learn"] == "1.4"
    assert len(found) == text.count(">=") - len(("python_requires", "ruff", "mypy"))
