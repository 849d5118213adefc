"""What pairs are refused, in words that help, and how they are grouped."""

import pytest
import torch
from losses import loss_of, move
from torch import Tensor, nn
from torch.testing import assert_close

from dskd import Curvature, DirectionSensitivityLoss, groups
from dskd.checks import check_pairs
from dskd.groups import group_by_shape


def weight(*shape: int, **how) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), **how)


def refusal(*pairs, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        check_pairs(pairs)
    return str(caught.value)


def test_pairs_that_fit_are_taken_as_tuples_or_lists():
    check_pairs([("a", weight(3, 2), torch.ones(3, 2)), ["b", weight(4, 2, 3, 3), torch.ones(4, 2, 3, 3)]])


def test_the_loss_checks_its_pairs():
    with pytest.raises(ValueError, match="pair a: the student's weight is frozen"):
        DirectionSensitivityLoss([("a", torch.ones(3, 2), torch.ones(3, 2))])


# Refusals
def test_no_pairs_are_refused():
    assert refusal() == "DSKD needs at least one pair of layers"


def test_a_repeated_name_is_refused():
    pair = ("layer.0", weight(2, 2), torch.ones(2, 2))
    assert refusal(pair, pair) == "the pair name 'layer.0' occurs 2 times"


def test_shapes_that_differ_are_refused_by_name():
    message = refusal(("layer.1", weight(2, 3), torch.ones(4, 3)))
    expected = "pair layer.1: student (2, 3) and teacher (4, 3) must match"
    assert message == f"{expected}; the reading Spectrum takes pairs of unequal shape"


def test_a_transposed_teacher_is_pointed_out():
    message = refusal(("layer.1", weight(2, 3), torch.ones(3, 2)))
    assert message.startswith("pair layer.1: student (2, 3) and teacher (3, 2) must match; ")
    assert message.endswith("give the transpose of the teacher's")


def test_reversed_shapes_of_convolutions_are_no_transposes():
    assert "transpose" not in refusal(("conv", weight(2, 3, 4, 5), torch.ones(5, 4, 3, 2)))


def test_a_vector_is_refused():
    assert refusal(("bias", weight(5), torch.zeros(5))).startswith("pair bias: (5,) is no matrix")


def test_a_frozen_weight_is_refused_with_what_to_do():
    message = refusal(("layer.2", weight(3, 2, requires_grad=False), torch.ones(3, 2)))
    assert message.startswith("pair layer.2: the student's weight is frozen (requires_grad is False)")
    assert all(word in message for word in ("leave the pair out", "LoRA"))


@pytest.mark.parametrize(
    "computed", [lambda W: W * 2, lambda W: W[:, :1], lambda W: W.mT, lambda W: W.double()], ids=range(4)
)
def test_a_weight_that_is_computed_is_refused(computed):
    student: Tensor = computed(weight(3, 2))
    message = refusal(("layer.3", student, torch.ones_like(student)))
    assert message.startswith("pair layer.3: the student's weight is computed from other tensors")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_module_is_refused_with_its_weight_to_give_instead(role):
    linear = nn.Linear(2, 3)
    pair = ("layer.4", linear, torch.ones(3, 2)) if role == "student" else ("layer.4", weight(3, 2), linear)
    assert refusal(pair, kind=TypeError) == f"pair layer.4: the {role} is a Linear; give its weight, a tensor"


@pytest.mark.parametrize("value", [None, [[1.0, 2.0]], 3])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_is_no_tensor_is_refused_by_its_type(role, value):
    pair = ("x", value, torch.ones(3, 2)) if role == "student" else ("x", weight(3, 2), value)
    assert refusal(pair, kind=TypeError) == f"pair x: the {role}'s weight is a {type(value).__name__}, not a tensor"


@pytest.mark.parametrize(
    ("pair", "got"),
    [
        (lambda: (weight(3, 2), weight(3, 2)), "2 items: Parameter, Parameter"),
        (lambda: ("a", weight(3, 2)), "2 items: str, Parameter"),
        (lambda: (0, weight(3, 2), torch.ones(3, 2)), "3 items: int, Parameter, Tensor"),
        (lambda: ("a", weight(3, 2), torch.ones(3, 2), 1), "4 items: str, Parameter, Tensor, int"),
        (lambda: "abc", "str"),
        (lambda: weight(3, 2), "Parameter"),
    ],
    ids=["without_a_name", "without_a_teacher", "a_number_for_a_name", "four", "a_text", "a_weight"],
)
def test_what_is_no_pair_is_refused_with_what_it_is(pair, got):
    assert refusal(pair(), kind=TypeError) == f"a pair is (name, student weight, teacher weight), got {got}"


# Groups
def test_pairs_of_one_shape_precision_and_device_share_a_group():
    def pair(name: str, *shape: int, dtype=torch.float32):
        return name, nn.Parameter(torch.ones(shape, dtype=dtype)), torch.ones(shape, dtype=dtype)

    found = group_by_shape(
        [
            pair("a", 4, 18),
            pair("b", 18, 4),
            pair("c", 4, 2, 3, 3),
            pair("d", 4, 18, dtype=torch.bfloat16),
            pair("e", 4, 18, dtype=torch.float64),
        ]
    )
    assert [(group.index, group.m, group.n, group.dtype) for group in found] == [
        ([0, 2, 3], 4, 18, torch.float32),  # bfloat16 is worked on in float32
        ([1], 18, 4, torch.float32),
        ([4], 4, 18, torch.float64),
    ]


def test_a_stack_has_the_matrices_of_its_rows_in_the_working_precision():
    weights = [nn.Parameter(torch.full((4, 2, 3, 3), float(i), dtype=torch.bfloat16)) for i in range(3)]
    (group,) = group_by_shape([(str(i), W, W.detach()) for i, W in enumerate(weights)])
    stack = group.stack(weights, [2, 0])
    assert (stack.shape, stack.dtype, stack.requires_grad) == ((2, 4, 18), torch.float32, False)
    assert stack.mean((1, 2)).tolist() == [2.0, 0.0]


def test_a_stack_of_no_rows_has_none():
    (group,) = group_by_shape([("a", weight(4, 3), torch.ones(4, 3))])
    assert group.stack([], []).shape == (0, 4, 3)


@pytest.mark.parametrize(("basis", "rank"), [("own", 3), ("update", 3), ("curvature", 0)])
def test_the_parts_of_a_refresh_do_not_change_it(basis, rank, monkeypatch):
    results = []
    for at_once in (10**9, 1):  # all matrices of a shape together, or one at a time
        monkeypatch.setattr(groups, "_AT_ONCE", at_once)
        dskd, students = loss_of([(9, 6), (6, 9), (9, 6), (6, 6), (6, 6)], rank=rank, svd_steps=2, basis=basis)
        for _ in range(5):
            move(dskd, students, 0.01)
        results.append((dskd().detach(), [W.grad for W in students], list(dskd.direction_weights().values())))
    assert_close(*results, rtol=1e-9, atol=1e-12)


# What has no values that could be compared
@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("unfit", "kind", "why"),
    [
        (lambda: nn.Linear(3, 0).weight, ValueError, "weight (0, 3) is empty"),
        (lambda: nn.LazyLinear(3).weight, ValueError, "weight is lazy and without a shape"),
        (lambda: torch.ones(3, 3, dtype=torch.int8), TypeError, "weight is of torch.int8"),
        (lambda: torch.ones(3, 3, dtype=torch.complex64), TypeError, "weight is of torch.complex64"),
    ],
    ids=["empty", "lazy", "quantised", "complex"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Initializing zero-element")
def test_a_weight_without_numbers_to_compare_is_refused(role, unfit, kind, why):
    pair = ("a", unfit(), weight(3, 3)) if role == "student" else ("a", weight(3, 3), unfit())
    assert refusal(pair, kind=kind).startswith(f"pair a: the {role}'s {why}")


@pytest.mark.parametrize("alias", [lambda W: W, lambda W: W.detach(), lambda W: W.data.view(2, 6)])
def test_a_teacher_in_the_students_memory_is_refused(alias):
    W = weight(2, 6)
    assert refusal(("a", W, alias(W))).startswith("pair a: the teacher's weight is the student's own")


def test_parts_of_one_memory_may_pair():
    whole = torch.ones(4, 6)
    check_pairs([("a", nn.Parameter(whole[:2]), whole[2:])])


def test_pairs_may_come_from_an_iterator():
    students, teachers = [weight(3, 2), weight(3, 2)], [torch.zeros(3, 2), torch.zeros(3, 2)]
    dskd = DirectionSensitivityLoss(zip("ab", students, teachers, strict=True), Curvature())
    assert dskd.names == ["a", "b"]
    assert dskd().item() == 3.0


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("driver", ["gram", "svd"])
def test_a_matrix_that_is_not_finite_is_named(role, driver):
    dskd, students = loss_of([(5, 4), (5, 4)], driver=driver)
    with torch.no_grad():
        (students if role == "student" else dskd.teachers)[1][0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=f"pair 1: the {role}'s weight is not finite"):
        dskd()


@pytest.mark.parametrize("basis", ["own", "update", "curvature"])
@pytest.mark.parametrize("choices", [0, 1, 2])
def test_a_teacher_that_changes_in_place_is_read_anew(basis, choices):
    dskd, students = loss_of([(5, 4), (5, 4)], basis=basis, svd_steps=1)
    for _ in range(choices):
        move(dskd, students, 0.1)
    dskd()
    with torch.no_grad():
        dskd.teachers[1].lerp_(students[1], 0.5)
    if choices:
        move(dskd, students, 0.1)
    dskd.held = None
    fresh, _ = loss_of([(5, 4), (5, 4)], basis=basis, svd_steps=1)
    fresh.students, fresh.teachers, fresh.pairs = dskd.students, dskd.teachers, dskd.pairs
    fresh.load_state_dict(dskd.state_dict())
    assert_close(dskd(), fresh(), rtol=1e-12, atol=0)


def test_a_teacher_made_in_inference_is_fine():
    with torch.inference_mode():
        teacher = torch.zeros(3, 2)
    assert DirectionSensitivityLoss([("a", weight(3, 2), teacher)], Curvature())().item() == 3.0
