"""What `python -m dskd doctor` looks at; nothing here is needed by the method."""

import importlib
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

_PROGRAMS = ("torchvision", "transformers", "accelerate", "datasets", "safetensors", "scikit-learn", "yacs")
_HOSTS = {"huggingface.co": "GLUE tasks and models", "www.cs.toronto.edu": "the CIFAR archives"}
_NEEDED_BYTES = 5 * 2**30  # a fine-tuned BERT-base with two checkpoints
_SECONDS = 3.0  # until a host counts as out of reach


class Finding(NamedTuple):
    """One line: "ok", "note" (works, but look at it) or "fault" (the method cannot run), and how to mend it."""

    state: str
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.state:<6}{self.what}" + (f"; {self.mend}" if self.mend else "")


def examine() -> list[Finding]:
    """All findings, in the order in which a reader wants them."""
    found = [Finding("ok", f"Python {platform.python_version()}, torch {torch.__version__}")]
    for device in _devices():
        found += _device(device)
    found += [*_torchvision(), *_programs(), *_disk(), *_hosts()]
    return found


def _devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        yield torch.device("cuda", i)
    if torch.backends.mps.is_available():
        yield torch.device("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        yield torch.device("xpu")


def _device(device: torch.device) -> Iterator[Finding]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    yield Finding("ok", f"{device}: {name}{threads}")

    def decomposes() -> None:
        matrix = torch.randn(64, 64, device=device)
        torch.linalg.eigh(matrix @ matrix.mT)

    yield _tried(f"{device}: eigenvectors in float32", decomposes, "fault", "the method needs them: use another device")
    for dtype in (torch.bfloat16, torch.float16):

        def multiplies(dtype: torch.dtype = dtype) -> None:
            torch.ones(8, 8, device=device, dtype=dtype) @ torch.ones(8, 8, device=device, dtype=dtype)

        short = str(dtype).removeprefix("torch.")
        yield _tried(f"{device}: products in {short}", multiplies, "note", "train in fp32 there")


def _tried(what: str, act: Callable[[], None], worse: str, mend: str) -> Finding:
    try:
        act()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return Finding(worse, f"{what} fail: {str(error).splitlines()[0]}", mend)
    return Finding("ok", what)


def _torchvision() -> Iterator[Finding]:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # `_programs` says that it is missing
    except RuntimeError:  # its operators were built for another torch
        mend = "the programs here mend it by themselves; elsewhere install the torchvision of this torch's build"
        yield Finding("note", "torchvision does not fit this torch", mend)
        return
    yield Finding("ok", "torchvision fits this torch")


def _programs() -> Iterator[Finding]:
    missing, found = [], []
    for name in _PROGRAMS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if found:
        yield Finding("ok", ", ".join(found))
    if missing:
        mend = "the method does not need them; for the programs: pip install '.[programs]' in a clone"
        yield Finding("note", f"not installed: {', '.join(missing)}", mend)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    what = f"{free / 2**30:.0f} GiB free in {os.getcwd()}"
    if free < _NEEDED_BYTES:
        yield Finding("note", what, f"checkpoints of a BERT-base take up to {_NEEDED_BYTES / 2**30:.0f} GiB")
    else:
        yield Finding("ok", what)


def _hosts() -> Iterator[Finding]:
    for host, what in _HOSTS.items():
        try:
            socket.create_connection((host, 443), timeout=_SECONDS).close()
        except OSError:
            mend = "give local folders (--data_dir, --model_name_or_path; DATASET.ROOT)"
            yield Finding("note", f"{host} is out of reach ({what})", mend)
        else:
            yield Finding("ok", f"{host} can be reached ({what})")
