"""BERT-of-Theseus: groups of a frozen predecessor's layers are replaced, at random, by trainable successor layers.

Wraps the layers of a transformers model (`<base model>.encoder.layer`: BERT, MiniLM, RoBERTa, ELECTRA, ...) and copies
none of its code.
"""

import copy

import torch
from torch import Tensor, nn

from common.run.errors import UserError, user_errors
from dskd import pairing
from dskd.pairing import linear_names


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of encoder layers of a transformers model.

    Raises:
        UserError: the model keeps its layers elsewhere.
    """
    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"{type(model).__name__} has no encoder.layer stack; module replacing needs a BERT-like encoder "
            "(BERT, MiniLM, RoBERTa, ELECTRA)"
        )
    return layers


def last_of_group(teacher_layers: int, student_layers: int) -> list[int]:
    """As `dskd.pairing.last_of_group`; a UserError where the layers do not divide."""
    with user_errors():
        return pairing.last_of_group(teacher_layers, student_layers)


def with_layers(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The model with another stack of encoder layers, in place; its config follows."""
    model.base_model.encoder.layer = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model


def copied_layers(model: nn.Module, count: int, start: str = "first") -> nn.Module:
    """A trainable copy of a model that keeps `count` of its encoder layers: its first ones, or the "paired" ones.

    Those that are paired are the layers that `layer_pairs` pairs the copy's with.
    """
    available = len(encoder_layers(model))
    if not 0 < count <= available:
        raise UserError(f"--num_successor_layers {count}: the model has {available} layers")
    chosen = last_of_group(available, count) if start == "paired" else range(count)
    student = copy.deepcopy(model).requires_grad_(True)
    layers = encoder_layers(student)
    return with_layers(student, [layers[i] for i in chosen])


def layer_pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Weight pairs of two transformers models: every linear matrix of every student layer, by `last_of_group`."""
    student_layers, teacher_layers = encoder_layers(student), encoder_layers(teacher)
    chosen = last_of_group(len(teacher_layers), len(student_layers))
    names = [(f"{i}.{name}", f"{k}.{name}") for i, k in enumerate(chosen) for name in linear_names(student_layers[i])]
    with user_errors():
        return pairing.pair_weights(student_layers, teacher_layers, names)


class TheseusModule(nn.Module):
    """One group of predecessor layers and the successor layer that may stand in for it."""

    def __init__(self, predecessors: list[nn.Module], successor: nn.Module):
        super().__init__()
        self.predecessors = nn.ModuleList(predecessors)
        self.successor = successor
        self.replaced = True

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        # the encoder calls this as it calls a layer; layers return a tensor or, in older releases, a tuple
        layers = [self.successor] if self.replaced else self.predecessors
        for layer in layers:
            output = layer(hidden_states, *args, **kwargs)
            hidden_states = output[0] if isinstance(output, tuple) else output
        return output


class TheseusModel(nn.Module):
    """A predecessor whose modules are replaced with probability `replacing_probability` in every training forward.

    Evaluation runs the successor alone. Only successor layers train; those that a forward did not sample get zero
    gradients rather than none, as in the torch that the recipe was made with: AdamW then keeps moving them by their
    momentum (docs/deviations.md).

    Args:
        predecessor: a fine-tuned transformers model for sequence classification; it is taken over and frozen.
        num_successor_layers: l, a divisor of the predecessor's layers L.
        seed: of the Bernoulli draws, which are the same on every rank.
        start: the layers that successors start as: "first", the predecessor's first l; "paired", the last ones of the
            groups that they replace, with which DSKD pairs them.
    """

    def __init__(self, predecessor: nn.Module, num_successor_layers: int, seed: int = 0, start: str = "first"):
        super().__init__()
        layers = list(encoder_layers(predecessor))
        ends = last_of_group(len(layers), num_successor_layers)
        predecessor.requires_grad_(False)
        modules, first = [], 0
        for i, end in enumerate(ends):
            successor = copy.deepcopy(layers[end if start == "paired" else i]).requires_grad_(True)
            modules.append(TheseusModule(layers[first : end + 1], successor))
            first = end + 1
        predecessor.base_model.encoder.layer = nn.ModuleList(modules)
        self.model = predecessor
        self.config = predecessor.config
        self.replacing_probability = 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.sampled: set[int] = set()  # modules replaced since the trainer last cleared it

    @property
    def theseus_modules(self) -> list[TheseusModule]:
        return list(encoder_layers(self.model))

    def forward(self, **inputs):
        replaced = self._draw() if self.training else [True] * len(self.theseus_modules)
        unsampled = []
        for i, (module, is_replaced) in enumerate(zip(self.theseus_modules, replaced, strict=True)):
            module.replaced = is_replaced
            if is_replaced:
                self.sampled.add(i)
            else:
                unsampled += module.successor.parameters()
        output = self.model(**inputs)
        if self.training and output.get("loss") is not None:
            output["loss"] = _ZeroGradients.apply(output["loss"], *unsampled)
        return output

    def pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """Weight pairs for DSKD: each successor layer with the last layer of the group that it replaces."""
        modules = self.theseus_modules
        successors = nn.ModuleList(module.successor for module in modules)
        last = nn.ModuleList(module.predecessors[-1] for module in modules)
        names = [f"{i}.{name}" for i, layer in enumerate(successors) for name in linear_names(layer)]
        with user_errors():
            return pairing.pair_weights(successors, last, [(name, name) for name in names])

    def unsampled_pairs(self) -> set[str]:
        """Names of the pairs whose successor layer was not sampled since `sampled` was last cleared."""
        unsampled = set(range(len(self.theseus_modules))) - self.sampled
        return {f"{i}.{name}" for i in unsampled for name in linear_names(self.theseus_modules[i].successor)}

    def successor(self) -> nn.Module:
        """The compressed model, a plain transformers model: the predecessor's other parts and the successor layers."""
        encoder = self.model.base_model.encoder
        modules = encoder.layer
        encoder.layer = nn.ModuleList(module.successor for module in modules)
        try:  # the predecessor's layers need not be copied
            student = copy.deepcopy(self.model)
        finally:
            encoder.layer = modules
        student.config.num_hidden_layers = len(modules)
        return student

    def _draw(self) -> list[bool]:
        draws = torch.rand(len(self.theseus_modules), generator=self.generator)
        return (draws < self.replacing_probability).tolist()


class _ZeroGradients(torch.autograd.Function):
    """Passes a loss through and gives zero gradients to parameters that it does not depend on."""

    @staticmethod
    def forward(ctx, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
