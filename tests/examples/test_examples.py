"""Every program in examples/ runs and prints what the comment at its top says, but for the digits."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import ROOT

HEALING = ROOT / "examples" / "heal_causal_lm.py"  # a tool with flags: tests/examples/test_healing.py
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {HEALING})
ENVIRONMENT = ROOT / "tests/environment"  # the torchvision repair for a process of its own
LAUNCHED = {"accelerate_two_processes", "fsdp2"}


def shown(example: Path) -> str:
    """The last paragraph of the comment."""
    return ast.get_docstring(ast.parse(example.read_text())).split("\n\n")[-1]


def without_digits(text: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?", "#", text).strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_prints_what_it_says(example, tmp_path):
    words, paths = [sys.executable], [ENVIRONMENT, ROOT]
    if example.stem in LAUNCHED:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        paths = [ROOT]  # they do without torchvision
    settings = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    settings |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **settings}
    done = subprocess.run(
        [*words, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert without_digits(done.stdout) == without_digits(shown(example))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short(example):
    assert len(example.read_text().splitlines()) < 60
    imported = re.findall(r"^(?:from|import) (\w+)", example.read_text(), re.MULTILINE)
    assert not {"common", "cv", "nlp", "scripts"} & set(imported)


def test_there_are_examples():
    assert len(EXAMPLES) == 6
