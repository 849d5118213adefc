"""A resumed run continues bit for bit, and states of other losses are refused."""

import io
import pickle
from copy import deepcopy

import pytest
import torch
from losses import loss_of, move
from runs import Run, dumped, every_basis, overflow, rank_of
from torch import Tensor


def save(run: Run) -> io.BytesIO:
    buffer = io.BytesIO()
    state = {"students": run.students, "optimizer": run.optimizer.state_dict(), "dskd": run.dskd.state_dict()}
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def resume(buffer: io.BytesIO, step: int, **settings) -> Run:
    run, state = Run(**settings), torch.load(buffer, weights_only=True)
    with torch.no_grad():
        for name, weight in run.students.items():
            weight.copy_(state["students"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    run.dskd.load_state_dict(state["dskd"])
    run.step = step
    return run


def train_with_overflow(run: Run, until: int) -> list[float]:
    losses = []
    while run.step < until:
        if run.step == 7:
            losses.append(run.dskd().item())
            overflow(run)
        else:
            losses += run.train(1)
    return losses


@pytest.mark.filterwarnings("ignore:DSKD")
@every_basis
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "step", [0, 2, 4, 5, 8, 9], ids=["start", "before_first", "after_first", "between", "postponed", "made_up"]
)
def test_a_resumed_run_continues_bit_for_bit(basis, dtype, layout, step):
    settings = {
        "dtype": dtype,
        "layout": layout,
        "rank": rank_of(basis),
        "svd_steps": 4,
        "grad_steps": 3,
        "basis": basis,
    }
    whole = Run(**settings)
    train_with_overflow(whole, step)
    resumed = resume(save(whole), step, **settings)
    assert train_with_overflow(resumed, 14) == train_with_overflow(whole, 14)
    for name, weight in whole.students.items():
        assert torch.equal(resumed.students[name], weight)
        assert torch.equal(resumed.dskd.direction_weights()[name], whole.dskd.direction_weights()[name])


@every_basis
def test_a_loaded_state_is_not_shared_with_its_source(basis):
    run, copy = (Run(rank=rank_of(basis), svd_steps=2, basis=basis) for _ in range(2))
    run.train(3)
    copy.dskd.load_state_dict(run.dskd.state_dict())
    before = dumped(copy.dskd.state_dict())
    run.train(4)
    assert dumped(copy.dskd.state_dict()) == before


@every_basis
def test_a_state_in_memory_is_not_changed_by_further_training(basis):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    run.train(3)
    state = run.dskd.state_dict()
    before = dumped(state)
    run.train(4)
    assert dumped(state) == before


def test_a_state_of_other_names_is_refused():
    state = Run(shapes={"a": (4, 4)}).dskd.state_dict()
    with pytest.raises(ValueError, match="other layer pairs"):
        Run(shapes={"b": (4, 4)}).dskd.load_state_dict(state)


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["held", "held_after_steps", "refreshed"])
@pytest.mark.parametrize("other", [(5, 4), (4, 3), (8, 8)])
def test_a_state_of_another_shape_is_refused(steps, other):
    run = Run(shapes={"a": (4, 4)}, rank=2, svd_steps=2)
    run.train(steps)
    run.dskd()
    with pytest.raises(ValueError, match="shape"):
        Run(shapes={"a": other}, rank=2, svd_steps=2).dskd.load_state_dict(run.dskd.state_dict())


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": 2},
        {"basis": "update"},
        {"direction": "random"},
        {"smoothing": 0.1},
        {"driver": "svd"},
        {"alpha": 0.0},
        {"score": "random"},
        {"score": "tempered"},
        {"span": "interval"},
    ],
    ids=str,
)
def test_a_state_of_another_reading_is_refused_with_both(changed):
    run, other = Run(rank=3, svd_steps=2), Run(**{"rank": 3, "svd_steps": 2} | changed)
    run.train(3)
    with pytest.raises(ValueError, match="the saved DSKD state is of") as caught:
        other.dskd.load_state_dict(run.dskd.state_dict())
    assert str(caught.value) == f"the saved DSKD state is of {run.dskd.reading!r}, not {other.dskd.reading!r}"
    assert repr(run.dskd.reading) != repr(other.dskd.reading)


@pytest.mark.parametrize("state", [None, {}, {"pairs": {}, "settings": {}, "counters": {}, "groups": []}])
def test_what_is_no_state_of_this_version_is_refused(state):
    with pytest.raises(ValueError, match="not one of this version"):
        Run(rank=3).dskd.load_state_dict(state)


def test_a_refused_state_changes_nothing():
    run, other = Run(rank=3, svd_steps=2), Run(rank=2, svd_steps=2)
    run.train(3)
    before = dumped(other.dskd.state_dict())
    with pytest.raises(ValueError, match="is of Own"):
        other.dskd.load_state_dict(run.dskd.state_dict())
    assert dumped(other.dskd.state_dict()) == before


def test_a_state_is_plain_tensors_and_numbers():
    run = Run(rank=3, svd_steps=2, span="interval")
    run.train(3)
    run.dskd()
    loaded = torch.load(io.BytesIO(dumped(run.dskd.state_dict())), weights_only=True)
    assert dumped(loaded) == dumped(run.dskd.state_dict())


@every_basis
def test_what_was_chosen_is_a_tensor_with_a_row_a_pair(basis):
    run = Run(rank=rank_of(basis), svd_steps=2, basis=basis)
    run.train(2)
    for group in run.dskd.groups:
        assert group.chosen
        assert all(isinstance(value, Tensor) and len(value) == len(group) for value in group.chosen.values())


# Counters
def test_a_resumed_run_renews_at_the_same_steps():
    settings = {"svd_steps": 7, "grad_steps": 1, "drift": 0.02}
    dskd, students = loss_of([(24, 16), (16, 24)], **settings)
    for _ in range(5):
        move(dskd, students, 0.005)
    resumed, copies = loss_of([(24, 16), (16, 24)], **settings)
    resumed.load_state_dict(dskd.state_dict())
    for copy, W in zip(copies, students, strict=True):
        copy.data.copy_(W)
        copy.grad = W.grad.clone()
    for _ in range(12):
        move(dskd, students, 0.005)
        move(resumed, copies, 0.005)
        assert dskd.expansions == resumed.expansions
        assert dskd.choices == resumed.choices
    for copy, W in zip(copies, students, strict=True):
        assert torch.equal(copy, W)


def test_choices_are_counted_and_saved():
    dskd, students = loss_of([(6, 6)], svd_steps=3)
    for _ in range(7):
        move(dskd, students, 0.01)
    again, _ = loss_of([(6, 6)], svd_steps=3)
    again.load_state_dict(dskd.state_dict())
    assert dskd.choices == again.choices == 2


def test_a_state_whose_pairs_were_grouped_otherwise_is_refused():
    saved, _ = loss_of([(5, 4), (5, 4)])
    saved()
    other, students = loss_of([(5, 4), (5, 4)])
    students[1].data = students[1].data.float()
    other = type(other)(other.pairs, other.reading)
    other()
    before = dict(other.groups[0].chosen)
    with pytest.raises(ValueError, match="groups the layer pairs otherwise"):
        other.load_state_dict(saved.state_dict())
    assert other.groups[0].chosen == before


@pytest.mark.parametrize("copied", [deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_follows_no_optimizer_and_can_be_attached(copied):
    dskd, students = loss_of([(5, 4)], svd_steps=2)
    move(dskd, students, 0.1)
    attachment = dskd.attach(torch.optim.SGD(students, lr=0.1), 10)
    other = copied(dskd)
    assert dskd.attachment is attachment
    assert other.attachment is None
    assert torch.equal(other(), dskd())
    optimizer = torch.optim.SGD(other.students, lr=0.1)
    other.attach(optimizer, 10)
    other().backward()
    optimizer.step()
    assert (other.steps, other.choices, dskd.steps) == (2, 1, 1)
