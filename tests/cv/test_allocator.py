"""What `keep_freed_memory` spares a process: pages that are cleared anew for every large tensor."""

import ctypes
import subprocess
import sys

import pytest

from common import ROOT
from cv import allocator

PAGES = """
import resource, sys, torch
from cv.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def steps(number):
    for _ in range(number):
        torch.ones(2**24)  # 64 MB, more than glibc keeps by itself
steps(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def cleared(how: str) -> int:
    """Pages that more tensors of a size ask of the system, in a new process."""
    words = [sys.executable, "-c", PAGES, how]
    return int(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_memory_is_not_cleared_again():
    assert cleared("kept") < 100 < cleared("given back")


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch, error):
    def none(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert allocator.keep_freed_memory() is None
