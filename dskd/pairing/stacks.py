"""Stacks of blocks: the layers of a transformer, the stages of a residual network, found by their structure alone.

A stack is an `nn.ModuleList` or `nn.Sequential` of modules of one class, each with two matrices or more. Where such
lists lie inside each other, the outer one is the stack if its blocks are alike (the layers of a transformer, whatever
lists of experts are in them); if it is a list of lists, or what they hold differs from block to block, its members are
stages and the inner lists the stacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..matrices import shape_of
from .layers import Layer, inside, joined

_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Stack:
    """A list of blocks by name; `layers` has those that pair by themselves, by block and by name in it."""

    name: str
    layers: dict[str, dict[str, Layer]]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def blocks(self) -> list[str]:
        return list(self.layers)

    @property
    def convolutional(self) -> bool:
        return any("convolution" in layer.dims for block in self.layers.values() for layer in block.values())

    def __str__(self) -> str:
        return f"{self.name} ({len(self)} blocks)"

    def beside(self, teacher: "Stack") -> str:
        """The two in words."""
        if self.name == teacher.name:
            return f"{self.name} ({len(self)} beside {len(teacher)} blocks)"
        return f"{self} beside {teacher}"


def stacks_of(network: nn.Module, layers: dict[str, Layer]) -> list[Stack]:
    """The stacks of a network in its order, none inside of another one."""
    return _stacks(network, "", {name: layer for name, layer in layers.items() if layer.common})


def matched_stacks(student: Sequence[Stack], teacher: Sequence[Stack]) -> list[tuple[Stack, Stack]]:
    """Stacks beside each other: as many in both by name or else in order; of one network's single one its likest.

    Empty where neither is so: networks with 3 and with 4 stages do not match.
    """
    if len(student) == len(teacher):
        by_name = {stack.name: stack for stack in teacher}
        named = all(stack.name in by_name for stack in student)
        return [(ours, by_name[ours.name] if named else theirs) for ours, theirs in zip(student, teacher, strict=True)]
    if len(student) == 1 and (found := _likest(student[0], teacher)):
        return [(student[0], found)]
    if len(teacher) == 1 and (found := _likest(teacher[0], student)):
        return [(found, teacher[0])]
    return []


def _likest(stack: Stack, others: Sequence[Stack]) -> Stack | None:
    """Of those whose blocks share a name with the stack's: the one of the same name, or the longest."""
    names = {name for block in stack.layers.values() for name in block}
    alike = [other for other in others if any(name in block for block in other.layers.values() for name in names)]
    return max(alike, key=lambda other: (other.name == stack.name, len(other)), default=None)


def _stacks(module: nn.Module, name: str, layers: dict[str, Layer]) -> list[Stack]:
    children = {joined(name, child): each for child, each in module._modules.items() if each is not None}
    deeper = [_stacks(each, child, layers) for child, each in children.items()]
    flat = [stack for stacks in deeper for stack in stacks]
    if not isinstance(module, _LISTS) or len({type(each) for each in children.values()}) != 1:
        return flat
    held = {child: inside(layers, child) for child in children}
    if any(len(block) < 2 for block in held.values()):
        return flat
    lists_of_lists = all(isinstance(each, _LISTS) for each in children.values())
    unlike = len(children) == 1 or any(_shapes(stacks) != _shapes(deeper[0]) for stacks in deeper)
    return flat if flat and (lists_of_lists or unlike) else [Stack(name, held)]


def _shapes(stacks: Sequence[Stack]) -> list[tuple[str, tuple[int, ...]]]:
    blocks = [block for stack in stacks for block in stack.layers.values()]
    return [
        (name, () if nn.parameter.is_lazy(layer.weight) else shape_of(layer.weight))
        for block in blocks
        for name, layer in block.items()
    ]
