"""Set-up that every test shares: the torchvision repair, one thread a worker, where real data may lie."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common import ROOT
from common.torchvision_repair import repair_torchvision

repair_torchvision()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
torch.set_num_threads(1)  # tests run in parallel workers; the tensors are tiny
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the programs that they start, too


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """What has been imported stays: leave it out of garbage collections, of which a Trainer does one after training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real GLUE and CIFAR-100 files; tests that want it skip where there is none."""
    folder = Path(os.environ.get("DSKD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set DSKD_DATA to a folder with glue/ and cifar100/")
    return folder


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps precision and processes of a training for the next one; forget those before and after."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()
