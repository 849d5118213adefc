"""`attach`: a loss that follows the step hooks of optimizers sees what `observe` would, in any training loop."""

import io
import weakref

import pytest
import torch
from losses import make_loss
from torch import Tensor, nn
from torch.testing import assert_close

from dskd import DirectionSensitivityLoss, Own
from dskd.attach import add_gradient

SHAPES = {"square": (6, 6), "wide": (4, 7), "tall": (7, 4)}
TOTAL = 20
READINGS = ("own", "update", "curvature")
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Loop:
    """Three weights, a task, DSKD and an optimizer of all of them."""

    def __init__(self, optimizer: str = "sgd", dtype: torch.dtype = torch.float64, **settings):
        self.students = {
            name: nn.Parameter(draw(*shape, seed=i).to(dtype)) for i, (name, shape) in enumerate(SHAPES.items())
        }
        self.teachers = {name: draw(*shape, seed=50 + i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}
        pairs = [(name, W, self.teachers[name]) for name, W in self.students.items()]
        self.dskd = make_loss(pairs, **{"rank": 3, "svd_steps": 4, "grad_steps": 1} | settings)
        self.optimizer = OPTIMIZERS[optimizer](list(self.students.values()))
        self.number = 0

    def task(self) -> Tensor:
        """Another one in every step, with a gradient for every weight."""
        weights = self.students.values()
        return sum((W * draw(*W.shape, seed=1000 + self.number).to(W.dtype) - 0.5).square().sum() for W in weights)

    def backward(self, share: float = 0.1) -> None:
        loss = self.task()
        (loss + share * self.dskd() if share else loss).backward()

    def train(self, steps: int, share: float = 0.1) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.backward(share)
            self.optimizer.step()
            self.number += 1

    def train_observed(self, steps: int, share: float = 0.1) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.backward(share)
            with self.dskd.observe(self.number / TOTAL):
                self.optimizer.step()
            self.number += 1

    def weights(self) -> dict[str, Tensor]:
        return {name: W.detach().clone() for name, W in self.students.items()}

    def directions(self) -> dict[str, Tensor]:
        return {name: row.clone() for name, row in self.dskd.direction_weights().items()}


def assert_alike(one: Loop, other: Loop, rtol: float = 0.0) -> None:
    assert_close(one.weights(), other.weights(), rtol=rtol, atol=rtol / 1000)
    assert_close(one.directions(), other.directions(), rtol=rtol, atol=rtol / 1000)
    assert (one.dskd.steps, one.dskd.choices) == (other.dskd.steps, other.dskd.choices)


# The same as observe
@pytest.mark.parametrize("basis", READINGS)
@every_optimizer
def test_a_loop_without_a_bracket_is_one_with_it_bit_for_bit(optimizer, basis):
    attached, observed = (Loop(optimizer, basis=basis) for _ in range(2))
    attached.dskd.attach(attached.optimizer, TOTAL)
    attached.train(11)
    observed.train_observed(11)
    assert_alike(attached, observed)
    assert attached.dskd.choices >= 2


def test_an_interval_is_followed_from_its_start():
    attached, observed = (Loop(span="interval") for _ in range(2))
    attached.dskd.attach(attached.optimizer, TOTAL)
    attached.train(9)
    observed.train_observed(9)
    assert_alike(attached, observed)


def told(dskd: DirectionSensitivityLoss) -> list[tuple[float, set[str]]]:
    """The progress and the skipped pairs of every step from now on."""
    seen, begin = [], dskd.begin_step
    dskd.begin_step = lambda progress, skip=(): seen.append((progress, set(skip))) or begin(progress, skip)
    return seen


@pytest.mark.filterwarnings("ignore:DSKD. the training takes more")
def test_progress_is_the_share_of_the_planned_steps_and_ends_at_one():
    loop = Loop()
    loop.dskd.attach(loop.optimizer, 5)
    seen = told(loop.dskd)
    loop.train(7)
    assert [progress for progress, _ in seen] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_pairs_to_skip_are_asked_for_where_directions_are_due_and_keep_theirs():
    loop, asked = Loop(svd_steps=3), []
    loop.dskd.attach(loop.optimizer, TOTAL, skip=lambda: asked.append(loop.dskd.steps) or ["wide"])
    start = loop.directions()
    loop.train(7)
    assert asked == [2, 5]
    assert {name: torch.equal(row, start[name]) for name, row in loop.directions().items()} == {
        "square": False,
        "wide": True,
        "tall": False,
    }


def test_an_unknown_pair_to_skip_is_refused():
    loop = Loop(svd_steps=1)
    loop.dskd.attach(loop.optimizer, TOTAL, skip=lambda: ["narrow"])
    with pytest.raises(ValueError, match="skip names no pair: narrow"):
        loop.train(1)


def test_a_pair_whose_weight_got_no_gradient_keeps_its_directions():
    loop = Loop(svd_steps=1)
    loop.dskd.attach(loop.optimizer, TOTAL)
    start = loop.directions()
    for name in ("square", "tall"):
        loop.students[name].square().sum().backward()
    loop.optimizer.step()
    changed = {name for name, row in loop.directions().items() if not torch.equal(row, start[name])}
    assert changed == {"square", "tall"}


def test_gradients_are_those_after_clipping():
    loop = Loop(svd_steps=1)
    loop.dskd.attach(loop.optimizer, TOTAL)
    seen, choose = [], loop.dskd._choose
    loop.dskd._choose = lambda step: seen.extend(G.clone() for G in step.gradients) or choose(step)
    loop.backward()
    nn.utils.clip_grad_value_(list(loop.students.values()), 0.01)
    loop.optimizer.step()
    assert max(G.abs().max().item() for G in seen) == pytest.approx(0.01)


# Steps that are taken
def test_batches_that_accumulate_are_one_step():
    loop = Loop()
    loop.dskd.attach(loop.optimizer, TOTAL)
    for _ in range(3):
        loop.optimizer.zero_grad()
        for _ in range(4):
            loop.backward()
        loop.optimizer.step()
    assert loop.dskd.steps == 3


def scaled_steps(loop: Loop, steps: int, overflows=()) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(steps):
        loop.optimizer.zero_grad()
        scaler.scale(loop.task() + 0.1 * loop.dskd()).backward()
        if loop.number in overflows:
            loop.students["wide"].grad[0, 0] = float("inf")
        scaler.step(loop.optimizer)
        scaler.update()
        loop.number += 1


def test_a_step_that_a_scaler_leaves_out_is_none():
    loop = Loop(svd_steps=2)
    loop.dskd.attach(loop.optimizer, TOTAL)
    scaled_steps(loop, 6, overflows=(1, 2))
    assert (loop.dskd.steps, loop.dskd.choices) == (4, 2)


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_a_scale_of_the_gradients_changes_nothing(optimizer):
    scaled, plain = (Loop(optimizer, dtype=torch.float32) for _ in range(2))
    for loop in (scaled, plain):
        loop.dskd.attach(loop.optimizer, TOTAL)
    scaled_steps(scaled, 9)
    plain.train(9)
    assert_alike(scaled, plain, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:DSKD")
def test_a_choice_is_made_up_for_where_a_fused_optimizer_leaves_its_step_out():
    loop = Loop("fused", dtype=torch.float32, svd_steps=3)
    loop.dskd.attach(loop.optimizer, TOTAL)
    scaled_steps(loop, 3, overflows=(2,))
    assert loop.dskd.choices == 0
    scaled_steps(loop, 1)
    assert loop.dskd.choices == 1


@pytest.mark.parametrize("weight", [None, 0.1])
@pytest.mark.parametrize("at", [1, 2], ids=["between", "due"])
def test_a_step_that_raises_is_none_and_training_may_go_on(at, weight):
    loop, same = Loop(svd_steps=3), Loop(svd_steps=3)
    for each in (loop, same):
        each.dskd.attach(each.optimizer, TOTAL, weight)
        each.train(at)
    loop.optimizer.zero_grad()
    loop.backward()
    lr, loop.optimizer.param_groups[0]["lr"] = loop.optimizer.param_groups[0]["lr"], "fast"
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        loop.optimizer.step()
    loop.optimizer.param_groups[0]["lr"] = lr
    for each in (loop, same):
        each.train(5)
    assert_alike(loop, same)


class Perturbed(torch.optim.SGD):
    """Calls its closure twice in a step, as sharpness-aware optimizers do."""

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            with torch.enable_grad():
                closure()
            for group in self.param_groups:
                for W in group["params"]:
                    W -= group["lr"] * W.grad


def test_a_step_with_two_backward_passes_is_refused():
    loop = Loop(svd_steps=1)
    loop.optimizer = Perturbed(list(loop.students.values()), lr=0.01)
    loop.dskd.attach(loop.optimizer, TOTAL)

    def closure() -> None:
        loop.optimizer.zero_grad()
        loop.backward()

    with pytest.raises(RuntimeError, match="a backward pass ran inside"):
        loop.optimizer.step(closure)


# Closures
@pytest.mark.parametrize("by_name", [False, True], ids=["by_place", "by_name"])
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_closure_is_followed_like_any_other_step(optimizer, set_to_none, by_name):
    closed, plain = (Loop(optimizer) for _ in range(2))
    for loop in (closed, plain):
        loop.dskd.attach(loop.optimizer, TOTAL)
    for _ in range(9):

        def closure() -> Tensor:
            closed.optimizer.zero_grad(set_to_none=set_to_none)
            loss = closed.task() + 0.1 * closed.dskd()
            loss.backward()
            return loss.detach()

        result = closed.optimizer.step(closure=closure) if by_name else closed.optimizer.step(closure)
        closed.number += 1
        assert result.item() > 0
    plain.train(9)
    assert_alike(closed, plain)
    assert closed.dskd.choices == 2


# Several groups and optimizers
def test_the_weights_may_lie_in_several_groups_beside_others():
    loop, same, other = Loop(), Loop(), nn.Parameter(torch.ones(3))
    square, *rest = loop.students.values()
    loop.optimizer = torch.optim.SGD([{"params": [other, square]}, {"params": rest}], lr=0.05)
    for each in (loop, same):
        each.dskd.attach(each.optimizer, TOTAL)
        each.train(9)
    assert_alike(loop, same)


class Two:
    """Two optimizers that step one after the other."""

    def __init__(self, loop: Loop, make=OPTIMIZERS["sgd"]):
        square, *rest = loop.students.values()
        self.both = [make([square]), make(rest)]

    def zero_grad(self) -> None:
        for optimizer in self.both:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()


@pytest.mark.parametrize("basis", READINGS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "nesterov"])
def test_one_step_of_each_of_several_optimizers_is_a_step(optimizer, basis):
    two, one = (Loop(optimizer, basis=basis) for _ in range(2))
    two.optimizer = Two(two, OPTIMIZERS[optimizer])
    two.dskd.attach(two.optimizer.both, TOTAL)
    one.dskd.attach(one.optimizer, TOTAL)
    for loop in (two, one):
        loop.train(9)
    assert_alike(two, one, rtol=1e-9)


def test_an_optimizer_without_a_paired_weight_does_not_count():
    loop, other = Loop(), nn.Parameter(torch.ones(3))
    beside = torch.optim.SGD([other], lr=0.1)
    loop.dskd.attach([loop.optimizer, beside], TOTAL)
    loop.train(5)
    other.sum().backward()
    beside.step()
    assert loop.dskd.steps == 5


def test_an_optimizer_that_is_left_out_of_a_step_does_not_stop_the_count():
    loop = Loop(svd_steps=2)
    loop.optimizer = two = Two(loop)
    loop.dskd.attach(two.both, TOTAL)
    start = loop.directions()
    for step in range(6):
        two.zero_grad()
        loop.backward()
        two.both[0].step()
        if step in (0, 5):
            two.both[1].step()
        if step == 3:  # two choices have been made, of the first optimizer's pair alone; the second is still open
            kept = {name: torch.equal(row, start[name]) for name, row in loop.directions().items()}
            assert kept == {"square": False, "wide": True, "tall": True}
    assert loop.dskd.steps == 6
    assert not any(torch.equal(row, start[name]) for name, row in loop.directions().items())


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_backward_pass_between_two_optimizers_is_allowed(set_to_none):
    loop = Loop(svd_steps=2)
    first, second = Two(loop).both
    loop.dskd.attach([first, second], TOTAL)
    for _ in range(8):
        for optimizer in (first, second):
            first.zero_grad(set_to_none=set_to_none)
            second.zero_grad(set_to_none=set_to_none)
            loop.backward()
            optimizer.step()
    assert loop.dskd.steps == 8
    assert loop.dskd.choices >= 3


# The loss's gradient added by the attachment
@pytest.mark.parametrize("settings", [{}, {"grad_steps": 4}, {"grad_steps": 3, "svd_steps": 5}], ids=str)
@pytest.mark.parametrize("basis", READINGS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_term_in_the_loss_and_the_weight_give_one_trajectory(optimizer, basis, settings):
    term, weight = (Loop(optimizer, basis=basis, **settings) for _ in range(2))
    term.dskd.attach(term.optimizer, TOTAL)
    weight.dskd.attach(weight.optimizer, TOTAL, weight=0.1)
    for _ in range(12):
        term.train(1)
        weight.train(1, share=0.0)
        assert_alike(term, weight, rtol=1e-9)
    assert term.dskd.choices >= 2


@pytest.mark.parametrize("grad_steps", [1, 4])
def test_so_they_do_with_several_optimizers(grad_steps):
    term, weight = (Loop(grad_steps=grad_steps) for _ in range(2))
    for loop, share in ((term, None), (weight, 0.1)):
        loop.optimizer = Two(loop)
        loop.dskd.attach(loop.optimizer.both, TOTAL, weight=share)
    for _ in range(12):
        term.train(1)
        weight.train(1, share=0.0)
        assert_alike(term, weight, rtol=1e-9)
    assert term.dskd.expansions == weight.dskd.expansions


def test_so_they_do_in_a_closure():
    closed, term = Loop("adamw"), Loop("adamw")
    closed.dskd.attach(closed.optimizer, TOTAL, weight=0.1)
    term.dskd.attach(term.optimizer, TOTAL)

    def closure() -> Tensor:
        closed.optimizer.zero_grad()
        loss = closed.task()
        loss.backward()
        return loss

    for _ in range(9):
        closed.optimizer.step(closure)
        closed.number += 1
    term.train(9)
    assert_alike(closed, term, rtol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_so_they_do_under_a_scaler(optimizer):
    term, weight = (Loop(optimizer, dtype=torch.float32) for _ in range(2))
    term.dskd.attach(term.optimizer, TOTAL)
    weight.dskd.attach(weight.optimizer, TOTAL, weight=0.1)
    term.train(9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(9):
        weight.optimizer.zero_grad()
        scaler.scale(weight.task()).backward()
        scaler.unscale_(weight.optimizer) if optimizer == "sgd" else None
        scaler.step(weight.optimizer)
        scaler.update()
        weight.number += 1
    assert_alike(term, weight, rtol=1e-3)


def test_the_gradient_is_added_after_the_loops_clipping():
    loop = Loop()
    loop.dskd.attach(loop.optimizer, TOTAL, weight=0.1)
    before, own = loop.weights(), [D.clone() for D in loop.dskd.gradients()]
    loop.backward(0.0)
    nn.utils.clip_grad_norm_(list(loop.students.values()), 1e-12)
    loop.optimizer.step()
    for (name, W), D in zip(before.items(), own, strict=True):
        assert_close(loop.students[name].detach(), W - 0.05 * 0.1 * D, rtol=1e-9, atol=1e-12)


def test_a_weight_without_a_gradient_of_the_task_gets_that_of_the_loss():
    loop = Loop()
    loop.dskd.attach(loop.optimizer, TOTAL, weight=1.0)
    own = [D.clone() for D in loop.dskd.gradients()]
    loop.optimizer.step()
    assert_close([W.grad for W in loop.students.values()], own)


def test_a_weight_of_zero_follows_and_adds_nothing():
    loop, plain = Loop(), Loop()
    loop.dskd.attach(loop.optimizer, TOTAL, weight=0.0)
    for each in (loop, plain):
        each.train(9, share=0.0)
    assert_close(loop.weights(), plain.weights(), rtol=0, atol=0)
    assert loop.dskd.choices == 2


# Resuming
@pytest.mark.parametrize("weight", [None, 0.1])
@pytest.mark.parametrize("step", [0, 3, 4, 6])
def test_a_resumed_run_continues_bit_for_bit(step, weight):
    whole, resumed = (Loop("adamw", grad_steps=3) for _ in range(2))
    share = 0.1 if weight is None else 0.0
    whole.dskd.attach(whole.optimizer, TOTAL, weight)
    whole.train(step, share)
    buffer = io.BytesIO()
    state = {"weights": whole.weights(), "optimizer": whole.optimizer.state_dict(), "dskd": whole.dskd.state_dict()}
    torch.save(state, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    with torch.no_grad():
        for name, W in resumed.students.items():
            W.copy_(state["weights"][name])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.dskd.load_state_dict(state["dskd"])
    resumed.number = step
    resumed.dskd.attach(resumed.optimizer, TOTAL, weight)
    seen = told(resumed.dskd)
    for loop in (whole, resumed):
        loop.train(8, share)
    assert_alike(resumed, whole)
    assert seen[0][0] == step / TOTAL


def test_a_state_may_be_loaded_after_attaching():
    whole, resumed = Loop(), Loop()
    whole.dskd.attach(whole.optimizer, TOTAL)
    whole.train(5)
    resumed.dskd.attach(resumed.optimizer, TOTAL)
    with torch.no_grad():
        for name, W in resumed.students.items():
            W.copy_(whole.students[name])
    resumed.dskd.load_state_dict(whole.dskd.state_dict())
    resumed.number = 5
    for loop in (whole, resumed):
        loop.train(5)
    assert_alike(resumed, whole)


# Detaching
def test_a_detached_loss_follows_no_longer():
    loop = Loop(svd_steps=1)
    attachment = loop.dskd.attach(loop.optimizer, TOTAL, weight=0.1)
    loop.train(2, share=0.0)
    attachment.detach()
    before = loop.weights()
    loop.optimizer.zero_grad()
    loop.optimizer.step()
    assert loop.dskd.steps == 2
    assert_close(loop.weights(), before, rtol=0, atol=0)


def test_nothing_stays_on_the_optimizer_or_the_weights():
    loop = Loop(svd_steps=1)
    attachment = loop.dskd.attach(loop.optimizer, TOTAL)
    loop.train(2)
    attachment.detach()
    assert not loop.optimizer._optimizer_step_pre_hooks
    assert not loop.optimizer._optimizer_step_post_hooks
    assert not any(W._post_accumulate_grad_hooks for W in loop.students.values())
    gone = weakref.ref(attachment)
    del attachment
    assert gone() is None


def test_detaching_between_two_optimizers_leaves_no_hooks_on_the_weights():
    loop = Loop(svd_steps=1)
    first, second = Two(loop).both
    attachment = loop.dskd.attach([first, second], TOTAL)
    loop.backward()
    first.step()
    attachment.detach()
    assert not any(W._post_accumulate_grad_hooks for W in loop.students.values())
    second.step()
    assert loop.dskd.steps == 0


def test_a_detached_loss_may_attach_again():
    loop, whole = Loop(), Loop()
    for each in (loop, whole):
        attachment = each.dskd.attach(each.optimizer, TOTAL)
        each.train(3)
    attachment = loop.dskd.attachment
    attachment.detach()
    loop.dskd.attach(loop.optimizer, TOTAL)
    for each in (loop, whole):
        each.train(6)
    assert_alike(loop, whole)


def test_a_second_attachment_is_refused():
    loop = Loop()
    loop.dskd.attach(loop.optimizer, TOTAL)
    with pytest.raises(ValueError, match="follows an optimizer already"):
        loop.dskd.attach(loop.optimizer, TOTAL)
    loop.train(3)
    assert loop.dskd.steps == 3  # and not 6


# Wrappers
class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an optimizer itself, which holds another one and hands steps on to it."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None):
        self.optimizer, self.scaler = optimizer, scaler

    def step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def test_a_wrapped_optimizer_is_followed_once():
    wrapped, plain = Loop(), Loop()
    wrapped.optimizer = Wrapper(Wrapper(wrapped.optimizer))
    for loop in (wrapped, plain):
        loop.dskd.attach(loop.optimizer, TOTAL)
        loop.train(9)
    assert_alike(wrapped, plain)


def test_a_wrapper_may_be_one_of_several():
    loop = Loop()
    first, second = Two(loop).both
    loop.dskd.attach([Wrapper(first), second], TOTAL)
    loop.optimizer = type("Both", (), {"zero_grad": lambda _: None, "step": lambda _: (first.step(), second.step())})()
    loop.train(3)
    assert loop.dskd.steps == 3


def test_a_wrapper_that_leaves_a_step_out_is_not_counted():
    loop = Loop()
    loop.optimizer = Wrapper(loop.optimizer, torch.amp.GradScaler("cpu", init_scale=4.0))
    loop.dskd.attach(loop.optimizer, TOTAL)
    for step in range(4):
        loop.optimizer.zero_grad()
        loop.optimizer.scaler.scale(loop.task()).backward()
        if step == 1:
            loop.students["wide"].grad.fill_(float("nan"))
        loop.optimizer.step()
    assert loop.dskd.steps == 3


def test_the_optimizer_of_accelerate_is_followed():
    accelerate = pytest.importorskip("accelerate")
    prepared, plain = Loop(), Loop()
    prepared.optimizer = accelerate.Accelerator(cpu=True).prepare(prepared.optimizer)
    for loop in (prepared, plain):
        loop.dskd.attach(loop.optimizer, TOTAL)
        loop.train(9)
    assert_alike(prepared, plain)


def test_a_schedule_of_the_learning_rate_may_wrap_the_step():
    loop = Loop()
    schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1, 0.5)
    loop.dskd.attach(loop.optimizer, TOTAL)
    for _ in range(5):
        loop.train(1)
        schedule.step()
    assert loop.dskd.steps == 5


# Refusals
def test_lbfgs_is_refused():
    loop = Loop()
    with pytest.raises(ValueError, match="LBFGS takes several updates a step"):
        loop.dskd.attach(torch.optim.LBFGS(list(loop.students.values())), TOTAL)


def test_a_weight_that_no_optimizer_trains_is_named():
    loop = Loop()
    with pytest.raises(ValueError, match="pair wide: the student's weight is in no parameter group of the optimizer"):
        loop.dskd.attach(torch.optim.SGD([loop.students["square"], loop.students["tall"]], lr=0.1), TOTAL)


def test_a_copy_of_the_weight_is_not_the_weight():
    loop = Loop()
    copies = [nn.Parameter(W.detach().clone()) for W in loop.students.values()]
    with pytest.raises(ValueError, match="pair square"):
        loop.dskd.attach(torch.optim.SGD(copies, lr=0.1), TOTAL)


@pytest.mark.parametrize("optimizer", [3, "adamw", nn.Linear(2, 2)], ids=lambda value: type(value).__name__)
def test_what_is_no_optimizer_is_refused_by_its_type(optimizer):
    with pytest.raises(TypeError, match=f"takes an optimizer or a list of them, got a {type(optimizer).__name__}"):
        Loop().dskd.attach([optimizer], TOTAL)


@pytest.mark.parametrize("total", [0, -3, 10.0, True, None])
def test_a_total_that_is_no_number_of_steps_is_refused(total):
    loop = Loop()
    with pytest.raises(ValueError, match=rf"total_steps must be a whole number of at least 1, got {total!r}"):
        loop.dskd.attach(loop.optimizer, total)


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_a_weight_that_is_no_weight_is_refused(weight):
    loop = Loop()
    with pytest.raises(ValueError, match="weight must be 0 or a positive number"):
        loop.dskd.attach(loop.optimizer, TOTAL, weight)


def test_a_refused_attachment_leaves_nothing_behind():
    loop = Loop()
    with pytest.raises(ValueError, match="pair wide"):
        loop.dskd.attach(torch.optim.SGD([loop.students["square"]], lr=0.1), TOTAL)
    loop.dskd.attach(loop.optimizer, TOTAL)
    loop.train(2)
    assert loop.dskd.steps == 2


def test_the_readme_loop_lowers_the_loss():
    torch.manual_seed(0)
    student, teacher = nn.Linear(8, 6), nn.Linear(8, 6)
    dskd = DirectionSensitivityLoss([("layer", student.weight, teacher.weight)], Own(rank=3), svd_steps=5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    dskd.attach(optimizer, total_steps=20)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = dskd()
        (student(torch.ones(2, 8)).square().mean() + loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("weight", [None, 0.1], ids=["term", "added"])
def test_a_weight_that_is_frozen_later_stays(weight):
    loop = Loop()
    loop.dskd.attach(loop.optimizer, TOTAL, weight)
    loop.train(4, share=0.0 if weight else 0.1)
    frozen = loop.students["wide"].requires_grad_(False)
    before, directions = frozen.clone(), loop.dskd.direction_weights()["wide"].clone()
    loop.train(4, share=0.0 if weight else 0.1)
    assert torch.equal(frozen, before)
    assert loop.dskd.choices == 2
    assert torch.equal(loop.dskd.direction_weights()["wide"], directions)


def test_gradients_of_frozen_weights_alone_are_not_added():
    W = nn.Parameter(draw(3, 3, seed=0), requires_grad=False)
    add_gradient([(W, torch.ones(3, 3))], 0.1)
    assert W.grad is None


def test_an_optimizer_that_is_given_twice_counts_once():
    once, twice = Loop(), Loop()
    once.dskd.attach(once.optimizer, TOTAL, 0.1)
    twice.dskd.attach([twice.optimizer, twice.optimizer], TOTAL, 0.1)
    for loop in (once, twice):
        loop.train(6, share=0.0)
    assert twice.dskd.steps == 6
    assert all(torch.equal(once.students[name], twice.students[name]) for name in SHAPES)


def test_a_former_attachment_does_not_end_the_present_one():
    loop = Loop()
    former = loop.dskd.attach(loop.optimizer, TOTAL)
    former.detach()
    present = loop.dskd.attach(loop.optimizer, TOTAL)
    former.detach()
    assert loop.dskd.attachment is present


def test_a_loss_that_follows_an_optimizer_refuses_observe():
    loop = Loop()
    attachment = loop.dskd.attach(loop.optimizer, TOTAL)
    loop.backward()
    with pytest.raises(RuntimeError, match="follows an optimizer already"), loop.dskd.observe(0.5):
        loop.optimizer.step()
    assert loop.dskd.steps == 0
    attachment.detach()
    loop.train_observed(1)
    assert loop.dskd.steps == 1


# Decoupled
def train_by_hand(loop: Loop, steps: int, weight: float) -> None:
    """The weights are pulled beside each step, in which the optimizer sees the task's gradient alone."""
    for _ in range(steps):
        loop.optimizer.zero_grad()
        loop.backward(share=0.0)
        for W, D in zip(loop.students.values(), [D.clone() for D in loop.dskd.gradients()], strict=True):
            with torch.no_grad():
                W -= loop.optimizer.param_groups[0]["lr"] * weight * D
        with loop.dskd.observe(loop.number / TOTAL):
            loop.optimizer.step()
        loop.number += 1


@pytest.mark.parametrize("basis", READINGS)
@every_optimizer
def test_a_decoupled_loss_pulls_the_weights_beside_the_step(optimizer, basis):
    attached, by_hand = (Loop(optimizer, basis=basis) for _ in range(2))
    attached.dskd.attach(attached.optimizer, TOTAL, weight=0.3, decoupled=True)
    attached.train(11, share=0.0)
    train_by_hand(by_hand, 11, weight=0.3)
    assert_alike(attached, by_hand, rtol=1e-9)
    assert attached.dskd.choices >= 2


def test_a_decoupled_loss_has_the_rate_of_each_group():
    loop = Loop()
    before = loop.weights()
    loop.optimizer = torch.optim.SGD([{"params": [W], "lr": 0.1 * i} for i, W in enumerate(loop.students.values())])
    loop.dskd.attach(loop.optimizer, TOTAL, weight=0.5, decoupled=True)
    D = [D.clone() for D in loop.dskd.gradients()]
    for W in loop.students.values():
        W.grad = torch.zeros_like(W)
    loop.optimizer.step()
    for i, (name, W) in enumerate(loop.students.items()):
        assert_close(W.detach(), before[name] - 0.1 * i * 0.5 * D[i])


def test_a_decoupled_loss_is_the_added_one_where_the_optimizer_is_plain():
    added, decoupled = (Loop("sgd", svd_steps=99) for _ in range(2))
    added.dskd.attach(added.optimizer, 99, weight=0.3)
    decoupled.dskd.attach(decoupled.optimizer, 99, weight=0.3, decoupled=True)
    for loop in (added, decoupled):
        loop.train(6, share=0.0)
    assert_alike(added, decoupled, rtol=1e-9)


def test_a_weight_that_is_frozen_later_is_not_pulled():
    loop = Loop()
    loop.dskd.attach(loop.optimizer, TOTAL, weight=0.3, decoupled=True)
    before = loop.weights()["wide"]
    loop.students["wide"].requires_grad_(False)
    loop.train(2, share=0.0)
    assert torch.equal(loop.students["wide"], before)


def test_a_decoupled_loss_needs_a_weight():
    loop = Loop()
    with pytest.raises(ValueError, match="a decoupled loss needs a weight"):
        loop.dskd.attach(loop.optimizer, TOTAL, decoupled=True)


# A weight in two pairs
class Tied(Loop):
    """The square weight stands beside two teachers."""

    def __init__(self, **settings):
        super().__init__(**settings)
        pairs = [(name, W, self.teachers[name]) for name, W in self.students.items()]
        pairs.append(("again", self.students["square"], draw(6, 6, seed=60)))
        self.dskd = make_loss(pairs, **{"rank": 3, "svd_steps": 4, "grad_steps": 1} | settings)


@pytest.fixture
def at_once(monkeypatch):
    """Lists of tensors are worked on as a GPU may do it: all are read before one is written."""

    def replace(name: str, sign: int) -> None:
        def act(tensors: list[Tensor], others: list[Tensor], alpha: float) -> None:
            results = [one + sign * alpha * other for one, other in zip(tensors, others, strict=True)]
            for one, result in zip(tensors, results, strict=True):
                one.copy_(result)

        monkeypatch.setattr(torch, name, act)

    replace("_foreach_add_", 1)
    replace("_foreach_sub_", -1)


def by_pair(dskd: DirectionSensitivityLoss) -> dict[str, Tensor]:
    return {name: D.clone() for name, D in zip(dskd.names, dskd.gradients(), strict=True)}


@pytest.mark.parametrize("started", [False, True], ids=["no gradient yet", "beside the task's"])
@pytest.mark.parametrize("basis", READINGS)
def test_a_weight_in_two_pairs_gets_both_gradients(basis, started, at_once):
    loop = Tied(basis=basis)
    loop.dskd.attach(loop.optimizer, TOTAL, weight=0.3)
    D, before = by_pair(loop.dskd), loop.weights()
    task = draw(6, 6, seed=9) if started else torch.zeros(6, 6, dtype=torch.float64)
    loop.students["square"].grad = task.clone() if started else None
    loop.optimizer.step()
    assert_close(loop.students["square"].detach(), before["square"] - 0.05 * (task + 0.3 * (D["square"] + D["again"])))
    assert_close(loop.students["wide"].detach(), before["wide"] - 0.05 * 0.3 * D["wide"])


@pytest.mark.parametrize("basis", READINGS)
def test_a_decoupled_loss_pulls_a_weight_in_two_pairs_by_both(basis, at_once):
    loop = Tied(basis=basis)
    loop.dskd.attach(loop.optimizer, TOTAL, weight=0.3, decoupled=True)
    D, before = by_pair(loop.dskd), loop.weights()
    loop.optimizer.step()
    assert_close(loop.students["square"].detach(), before["square"] - 0.05 * 0.3 * (D["square"] + D["again"]))


@pytest.mark.parametrize("settings", [{}, {"grad_steps": 4}], ids=str)
def test_a_weight_in_two_pairs_is_trained_as_by_the_term_in_the_loss(settings, at_once):
    term, weight = Tied(**settings), Tied(**settings)
    term.dskd.attach(term.optimizer, TOTAL)
    weight.dskd.attach(weight.optimizer, TOTAL, weight=0.1)
    term.train(11)
    weight.train(11, share=0.0)
    assert_alike(term, weight, rtol=1e-9)


def test_the_scale_of_a_scaler_counts_for_both_pairs_of_a_weight(at_once):
    W, (one, other) = nn.Parameter(draw(3, 3, seed=0)), (draw(3, 3, seed=seed) for seed in (1, 2))
    add_gradient([(W, one), (W, other)], 0.1, torch.tensor(8.0))
    assert_close(W.grad, 0.8 * (one + other))
