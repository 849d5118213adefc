"""`pair_layers`: the weight pairs of two networks, by a rule, by patterns of names, or by what is found in them."""

from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .fit import why_not
from .layers import Layer, layers_of, shared_names
from .pairs import LayerPairs, LeftOut, Owner, reasons
from .plan import HINT, Rule, by_patterns, by_rule
from .stacks import stacks_of


def pair_layers(
    student: nn.Module,
    teacher: nn.Module,
    by: str | Rule | Sequence[tuple[str, str]] | None = None,
    *,
    any_shape: bool = False,
) -> LayerPairs:
    """The pairs of layers that `DirectionSensitivityLoss` takes; print them to see what was paired and what was not.

    By itself it looks for stacks of blocks in both networks (dskd/pairing/stacks.py) and pairs block with block, and in
    them linear layers, convolutions and recurrent layers by their names. Stacks of transformer layers: `last_of_group`
    where their depths divide, else `spread_evenly`. Stages of convolutional blocks: `spread_evenly` in each. Without
    stacks that match, it pairs layers of the same name.

    Every weight counts as one matrix, (out, everything else), as the network has it: a grouped or depthwise convolution
    (out, in / groups, kh, kw) too, `nn.MultiheadAttention`'s queries, keys and values (3 * width, width), and the gates
    of `nn.LSTM` (4 * hidden, in). Views of a part would be no parameters that an optimizer trains.

    Args:
        student, teacher: any networks.
        by: "names" for layers of the same name; "last_of_group", "spread_evenly" or a function of (teacher blocks,
            student blocks) that gives a teacher block for each of the student's, counted from 0; or a list of (student
            pattern, teacher pattern), where each "*" stands for one part of a name and is the same in both. A pattern
            without "*" must pair; what else does not fit is left out.
        any_shape: keep pairs of unequal shape, for readings that take them (`Spectrum`).

    Returns:
        The pairs; `left_out` has the student's layers without one, and why.

    Raises:
        ValueError: nothing pairs, a rule that is unknown or does not fit, a pattern without a match.
        TypeError: no network, or no pattern.
    """
    for role, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"pair_layers takes two networks, got a {type(network).__name__} as the {role}")
    student, teacher = _unwrapped(student), _unwrapped(teacher)
    ours, theirs = layers_of(student), layers_of(teacher)
    if by is None or isinstance(by, str) or callable(by):
        plan = by_rule(by, ours, stacks_of(student, ours), stacks_of(teacher, theirs))
        shared = shared_names(student)
    else:
        plan, shared = by_patterns(by, ours), {}  # a pattern says which layer of the teacher a shared weight pairs with
    pairs, paired = LayerPairs(how=plan.how), set[int]()
    for name, other in plan.names:
        layer, beside = ours[name], theirs.get(other)
        reason = why_not(layer, beside, shared, paired, any_shape)
        if reason is None and beside is not None:
            paired.add(id(layer.weight))
            pairs.append((name, layer.weight, beside.weight))
            pairs.teacher_names[name], pairs.owners[name] = other, (_owner(layer), _owner(beside))
        elif (name, other) in plan.required:
            raise ValueError(f"layers do not pair, student {name} and teacher {other}: {reason}")
        else:
            pairs.left_out.append(LeftOut(name, other if beside else "", reason or ""))
    if not pairs:
        raise ValueError(
            f"no layers of the student {type(student).__name__} and the teacher {type(teacher).__name__} pair "
            f"{plan.how} ({_why(pairs.left_out)}"
        )
    pairs.left_out += plan.outside
    return pairs


def _why(left_out: Sequence[LeftOut]) -> str:
    """The first reasons, and what to do where layers that fit have not been found."""
    found = reasons(left_out, named=1)[:3] or ["the student has no layers with a matrix"]
    trainable = [each for each in left_out if not each.reason.startswith("frozen")]
    return f"{'; '.join(found)})" + (f"; {HINT}" if trainable or not left_out else "")


def _owner(layer: Layer) -> Owner | None:
    """None for a weight that a parametrization computes anew whenever it is read."""
    return Owner(layer.module, layer.parameter) if isinstance(layer.weight, nn.Parameter) else None


def _unwrapped(network: nn.Module) -> nn.Module:
    """Without what torch wraps around a whole network, which would change all names."""
    inner = network.module if isinstance(network, DataParallel | DistributedDataParallel) else network
    inner = getattr(inner, "_orig_mod", inner)
    return network if inner is network else _unwrapped(inner)
