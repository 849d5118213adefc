"""`dskd` as others get it: a wheel with nothing but the method, which imports nothing but torch."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dskd
from common import ROOT

SOURCES = ("dskd", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TRAINING = """
import torch
from torch import nn
from dskd import DirectionSensitivityLoss, Own

torch.manual_seed(0)
student, teacher = nn.Linear(6, 5), nn.Linear(6, 5)
loss = DirectionSensitivityLoss([("layer", student.weight, teacher.weight)], Own(rank=3), svd_steps=2)
optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
loss.attach(optimizer, total_steps=6)
before = loss().item()
for _ in range(6):
    optimizer.zero_grad()
    (student(torch.randn(4, 6)).square().mean() + loss()).backward()
    optimizer.step()
print(loss.choices, loss().item() < before)
"""


def run(code: str, folder: Path, path: Path) -> str:
    """What a fresh interpreter prints that starts in an empty folder with `path` to import from."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    words += ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    subprocess.run([*words, str(source)], check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return path


def test_a_wheel_holds_the_method_alone(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files} == {"dskd", f"dskd-{dskd.__version__}.dist-info"}
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "dskd").rglob("*.py")} | {"dskd/py.typed"}
    assert {name for name in files if name.startswith("dskd/")} == shipped


def test_a_wheel_names_torch_the_licence_and_the_readme(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(f"dskd-{dskd.__version__}.dist-info/METADATA").decode()
    needed = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needed == ["Requires-Dist: torch>=2.5"]
    assert "License-File: LICENSE" in text
    assert (ROOT / "README.md").read_text().splitlines()[0] in text


def test_what_is_installed_trains(wheel, tmp_path):
    place, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(place)
    assert run("import dskd; print(dskd.__file__)", empty, place) == str(place / "dskd" / "__init__.py")
    assert run(TRAINING, empty, place) == "3 True"


def test_importing_it_imports_torch_and_nothing_else(tmp_path):
    code = (
        "import sys, torch; before = set(sys.modules); import dskd; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(sorted(new - {'torch'}))"
    )
    assert run(code, tmp_path, ROOT) == "['dskd']"
