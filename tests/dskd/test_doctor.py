"""`python -m dskd doctor`: what it looks at, and what it says of what is missing."""

import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common import ROOT
from dskd import doctor
from dskd.__main__ import main


@pytest.fixture
def found(monkeypatch):
    """Runs the examination without waiting for hosts; gives its lines by state."""

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)

    def examine() -> dict[str, list[str]]:
        lines = doctor.examine()
        return {state: [str(line) for line in lines if line.state == state] for state in ("ok", "note", "fault")}

    return examine


def test_a_healthy_machine_has_no_fault(found):
    lines = found()
    assert not lines["fault"]
    assert any(torch.__version__ in line for line in lines["ok"])
    assert "ok    cpu: eigenvectors in float32" in lines["ok"]


def test_hosts_that_are_out_of_reach_say_what_to_give_instead(found):
    [line] = [line for line in found()["note"] if "huggingface.co" in line]
    assert "--data_dir" in line


def test_little_disk_space_is_noted(found, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert any(line.startswith("note  1 GiB free") for line in found()["note"])


def test_missing_libraries_of_the_programs_are_named_with_the_command(found, monkeypatch):
    monkeypatch.setattr(doctor, "_PROGRAMS", ("no-such-library",))
    assert any("not installed: no-such-library" in line and "[programs]" in line for line in found()["note"])


def test_a_device_that_cannot_decompose_is_a_fault(found, monkeypatch):
    def fails(_):
        raise RuntimeError("no kernel\nsecond line")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert found()["fault"] == [
        "fault cpu: eigenvectors in float32 fail: no kernel; the method needs them: use another device"
    ]


def test_anything_else_than_doctor_is_refused(capsys):
    assert main(["nurse"]) == 2
    assert capsys.readouterr().err == "usage: python -m dskd doctor\n"


def test_the_command_runs():
    done = subprocess.run(
        [sys.executable, "-m", "dskd", "doctor"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ok    Python ")
