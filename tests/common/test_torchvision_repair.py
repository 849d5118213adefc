"""`repair_torchvision` in fresh interpreters, as an entry point calls it, and its way with other failures."""

import builtins
import importlib.util
import subprocess
import sys

import pytest

from common import ROOT, torchvision_repair
from common.torchvision_repair import repair_torchvision


def run(code: str) -> str:
    """Standard output of a fresh interpreter in the repository's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchvision_works_after_a_repair_and_a_second_one_changes_nothing():
    code = """
from common import torchvision_repair as module
module.repair_torchvision()
once = len(module._kept_alive)
module.repair_torchvision()
assert len(module._kept_alive) == once <= 1
import torch
from torchvision.transforms import v2
flip = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.ToDtype(torch.float32, scale=True)])
print(flip(torch.tensor([[[0, 255]]], dtype=torch.uint8)).tolist())
"""
    assert run(code).split("\n")[-2] == "[[[1.0, 0.0]]]"


def test_operators_that_are_missing_are_declared():
    """A torchvision whose extension did not load asks for its operators at import: played by a module that does."""
    code = """
import sys, types, builtins
real, asked = builtins.__import__, []
def imports(name, *rest):
    if name == "torchvision" and not asked:
        asked.append(name)
        raise RuntimeError("operator torchvision::nms does not exist")
    return real(name, *rest)
builtins.__import__ = imports
from torch.library import Library
defined = []
Library.define = lambda self, schema, *rest, **kwargs: defined.append((self.ns, self.kind, schema.split("(")[0]))
from common.torchvision_repair import repair_torchvision
repair_torchvision()
print(defined)
"""
    expected = [("torchvision", "FRAGMENT", "nms"), ("torchvision", "FRAGMENT", "qnms")]
    assert run(code).split("\n")[-2] == str(expected)


def test_nothing_is_imported_where_torchvision_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    repair_torchvision()
    assert "torchvision" not in sys.modules


def test_another_failure_is_not_hidden(monkeypatch):
    real = builtins.__import__

    def fail(name, *rest):
        if name == "torchvision":
            raise RuntimeError("some other trouble")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    before = len(torchvision_repair._kept_alive)
    with pytest.raises(RuntimeError, match="some other trouble"):
        repair_torchvision()
    assert len(torchvision_repair._kept_alive) == before
