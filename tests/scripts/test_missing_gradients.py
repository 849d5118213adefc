"""The script that leaves successor layers without a gradient where they were not sampled."""

import subprocess
import sys

import pytest
import torch
from theseus_fixtures import batch, choose, theseus

from bert_of_theseus import modeling
from common import ROOT
from scripts.missing_gradients import NoGradients

SCRIPT = ROOT / "scripts" / "missing_gradients.py"


@pytest.mark.parametrize("replaced", [[True, False], [False, False]])
def test_layers_that_were_not_sampled_have_no_gradient(monkeypatch, replaced):
    monkeypatch.setattr(modeling, "_ZeroGradients", NoGradients)
    model = choose(theseus(), replaced)
    model(**batch()).loss.backward()
    for module, sampled in zip(model.theseus_modules, replaced, strict=True):
        assert all((parameter.grad is not None) == sampled for parameter in module.successor.parameters())


def test_the_loss_stays_the_same(monkeypatch):
    model = choose(theseus(), [True, False])
    before = model(**batch()).loss
    monkeypatch.setattr(modeling, "_ZeroGradients", NoGradients)
    torch.testing.assert_close(model(**batch()).loss, before, rtol=0, atol=0)


def test_a_wrong_flag_is_refused_in_one_line():
    words = [sys.executable, str(SCRIPT), "--missing", "nothing", "--task_name", "RTE"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: argument --missing: invalid choice: 'nothing'")
