"""What `keep_freed_memory` spares a process: pages that are cleared anew for every large tensor."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from common import ROOT
from cv import allocator

PAGES = """
import resource, sys, torch
from cv.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
images = torch.randn(2**20, requires_grad=True)  # 4 MB, as every map of the network
def steps(number):
    for _ in range(number):
        maps = images
        for _ in range(20):
            maps = torch.sin(maps)
        maps.sum().backward()
        images.grad = None
steps(12)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(12)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def cleared(how: str) -> int:
    """Pages that training steps ask of the system, in a new process."""
    words = [sys.executable, "-c", PAGES, how]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_is_not_cleared_again():
    assert 4 * cleared("kept") < cleared("given back")


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch, error):
    def none(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert allocator.keep_freed_memory() is None


def test_a_library_that_refuses_the_first_threshold_is_left_as_it_was(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda which, value: asked.append(which) or 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    allocator.keep_freed_memory()
    assert len(asked) == 1
