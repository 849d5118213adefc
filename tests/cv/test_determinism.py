"""SOLVER.DETERMINISTIC: which kernels a run asks torch for, and what is left of that afterwards."""

import pytest
import torch
from cv_fixtures import save_teacher, short_run
from torch import nn

import cv.trainer
from common.run.errors import UserError
from cv.determinism import kernels


def asked() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


@pytest.mark.gpu
@pytest.mark.parametrize(("setting", "inside"), [("true", (True, True, False)), ("false", (False, False, True))])
def test_a_run_takes_the_kernels_that_it_asks_for_and_leaves_none_behind(tmp_path, monkeypatch, setting, inside):
    seen, step = [], cv.trainer._Run._step

    def look(self, *batch):
        seen.append(asked())
        return step(self, *batch)

    monkeypatch.setattr(cv.trainer._Run, "_step", look)
    before = asked()
    short_run(tmp_path / "run", save_teacher(tmp_path / "teacher"), f"SOLVER.DETERMINISTIC {setting}")
    assert set(seen) == {inside}
    assert asked() == before


def test_an_operation_without_such_a_kernel_is_named():
    with (
        pytest.raises(UserError, match=r"^SOLVER.DETERMINISTIC: kthvalue_cuda has no deterministic kernel"),
        kernels(True),
    ):
        raise RuntimeError("kthvalue_cuda does not have a deterministic implementation, but you set 'torch.use_...'")
    assert not torch.are_deterministic_algorithms_enabled()


def test_torch_words_its_refusal_as_expected():
    """On the CPU `put_` without accumulation is one of the few operations that it refuses."""
    where, what = torch.tensor([0]), torch.ones(1)
    with pytest.raises(UserError, match="put_ has no deterministic kernel"), kernels(True):
        torch.zeros(2).put_(where, what)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), kernels(True):
        nn.Linear(2, 2)(torch.ones(1, 3))
