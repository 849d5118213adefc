"""BERT-of-Theseus: groups of a frozen predecessor's layers are replaced, at random, by trainable successor layers.

Takes the stack of layers of a transformers model, wherever it keeps it, and copies none of its code. A forward runs the
model itself, with another stack.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from common.run.errors import UserError, user_errors
from dskd import pairing
from dskd.pairing import linear_names
from dskd.pairing.layers import layers_of
from dskd.pairing.stacks import stacks_of

SUPPORTED = (
    "BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT, DeBERTa, MPNet, BigBird, ModernBERT and encoders like them"
)
_AS = f"; module replacing and students with fewer layers are made of {SUPPORTED}"
_PER_LAYER = ("layer_types", "attention_window")  # lists in configs with an entry for every layer


def depth(model: nn.Module) -> int:
    """How many layers a transformers model runs, by its config."""
    return getattr(model.config, "num_hidden_layers", 0)


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of encoder layers of a transformers model.

    Raises:
        UserError: the model has none that could be replaced or made shorter, and why.
    """
    return model.base_model.get_submodule(_stack_name(model))


def last_of_group(teacher_layers: int, student_layers: int) -> list[int]:
    """As `dskd.pairing.last_of_group`; a UserError where the layers do not divide."""
    with user_errors():
        return pairing.last_of_group(teacher_layers, student_layers)


def with_layers(model: nn.Module, chosen: Sequence[int]) -> nn.Module:
    """The model with those of its encoder layers alone, in place; its config follows."""
    layers = encoder_layers(model)
    _set_stack(model, _stack_name(model), [layers[i] for i in chosen])
    _fit_config(model, chosen)
    return model


def copied_layers(model: nn.Module, count: int, start: str = "first") -> nn.Module:
    """A trainable copy of a model that keeps `count` of its encoder layers: its first ones, or the "paired" ones.

    Those that are paired are the layers that `layer_pairs` pairs the copy's with.
    """
    available = len(encoder_layers(model))
    if not 0 < count <= available:
        raise UserError(f"--num_successor_layers {count}: the model has {available} layers")
    chosen = last_of_group(available, count) if start == "paired" else range(count)
    return with_layers(copy.deepcopy(model).requires_grad_(True), list(chosen))


def layer_pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Weight pairs of two transformers models: every linear matrix of every student layer, by `last_of_group`."""
    student_layers, teacher_layers = encoder_layers(student), encoder_layers(teacher)
    chosen = last_of_group(len(teacher_layers), len(student_layers))
    names = [(f"{i}.{name}", f"{k}.{name}") for i, k in enumerate(chosen) for name in linear_names(student_layers[i])]
    with user_errors():
        return pairing.pair_weights(student_layers, teacher_layers, names)


def check_export(evaluated: nn.Module, student: nn.Module, batch: dict[str, Tensor]) -> None:
    """See that the student, saved and loaded, will give the outputs of the model that is evaluated (UserError).

    Args:
        evaluated: what the Trainer evaluates.
        student: the plain transformers model that is saved of it.
        batch: some inputs, without labels.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        fresh = type(student)(copy.deepcopy(student.config)).eval()
        state = student.state_dict()
        shapes = {name: value.shape for name, value in fresh.state_dict().items()}
        fits = shapes == {name: value.shape for name, value in state.items()}
        if fits:
            fresh.load_state_dict(state)
            was, ours = evaluated.training, evaluated.eval()(**batch)["logits"]
            evaluated.train(was)
            fits = torch.allclose(ours, fresh(**batch)["logits"], rtol=1e-4, atol=1e-5)
    if not fits:
        raise UserError(
            f"{type(student).__name__} makes its layers by their place, so that a student of these ones "
            "(--num_successor_layers, --start) would be another one when it is saved and loaded; try --start first"
        )


def _stack_name(model: nn.Module) -> str:
    """Where the base model keeps its layers, "encoder.layer" say."""
    config, kind, count = model.config, type(model).__name__, depth(model)
    if hasattr(config, "num_hidden_groups"):
        raise UserError(
            f"{kind} shares weights among its {count} layers, so there are none to replace or to leave out{_AS}"
        )
    layers = layers_of(model.base_model)
    found = [stack.name for stack in stacks_of(model.base_model, layers) if len(stack) == count]
    if len(found) != 1:
        kept = f"its {count} layers in {len(found)} stacks" if found else f"no stack of {count} layers"
        raise UserError(f"{kind} has {kept}{_AS}")
    if any(getattr(module, "is_causal", False) for module in model.base_model.get_submodule(found[0]).modules()):
        raise UserError(f"{kind} is a decoder, whose layers keep a cache by their number{_AS}")
    return found[0]


def _set_stack(model: nn.Module, name: str, layers: Sequence[nn.Module]) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.base_model.get_submodule(parent), child, nn.ModuleList(layers))


def _fit_config(model: nn.Module, chosen: Sequence[int]) -> None:
    """Let the config tell of the layers that were chosen."""
    config, available = model.config, depth(model)
    for key in _PER_LAYER:
        values = getattr(config, key, None)
        if isinstance(values, list | tuple) and len(values) == available:
            setattr(config, key, [values[i] for i in chosen])
    config.num_hidden_layers = len(chosen)


class TheseusModule(nn.Module):
    """One group of predecessor layers and the successor layer that may stand in for it."""

    def __init__(self, predecessors: list[nn.Module], successor: nn.Module):
        super().__init__()
        self.predecessors = nn.ModuleList(predecessors)
        self.successor = successor


class TheseusModel(nn.Module):
    """A predecessor whose modules are replaced with probability `replacing_probability` in every training forward.

    Evaluation runs the successor alone. Only successor layers train; those that a forward did not sample get zero
    gradients rather than none, as in the torch that the recipe was made with: AdamW then keeps moving them by their
    momentum (docs/deviations.md).

    Args:
        predecessor: a fine-tuned transformers model for sequence classification; it is taken over and frozen.
        num_successor_layers: l, a divisor of the predecessor's layers L.
        seed: of the Bernoulli draws, which are the same on every process.
        start: the layers that successors start as: "first", the predecessor's first l; "paired", the last ones of the
            groups that they replace, with which DSKD pairs them.
    """

    def __init__(self, predecessor: nn.Module, num_successor_layers: int, seed: int = 0, start: str = "first"):
        super().__init__()
        self._stack = _stack_name(predecessor)
        layers = list(encoder_layers(predecessor))
        ends = last_of_group(len(layers), num_successor_layers)
        predecessor.requires_grad_(False)
        self._chosen = ends if start == "paired" else list(range(len(ends)))
        modules, first = [], 0
        for i, end in zip(self._chosen, ends, strict=True):
            successor = copy.deepcopy(layers[i]).requires_grad_(True)
            modules.append(TheseusModule(layers[first : end + 1], successor))
            first = end + 1
        _set_stack(predecessor, self._stack, modules)
        self.model = predecessor
        self.config = predecessor.config
        self.replacing_probability = 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.sampled: set[int] = set()  # modules replaced since the trainer last cleared it

    @property
    def theseus_modules(self) -> list[TheseusModule]:
        return list(self.model.base_model.get_submodule(self._stack))

    @contextmanager
    def running(self, replaced: Sequence[bool]) -> Iterator[nn.Module]:
        """The transformers model with the successor of each module that is replaced, the predecessors of every other.

        A plain model of its kind meanwhile: what it does between its layers, or with each by its own kind, stays right.
        """
        modules = self.theseus_modules
        layers = [
            layer
            for module, is_replaced in zip(modules, replaced, strict=True)
            for layer in ([module.successor] if is_replaced else module.predecessors)
        ]
        _set_stack(self.model, self._stack, layers)
        try:
            yield self.model
        finally:
            _set_stack(self.model, self._stack, modules)

    def predecessor(self) -> AbstractContextManager[nn.Module]:
        """As `running`, with no module replaced."""
        return self.running([False] * len(self.theseus_modules))

    def forward(self, **inputs):
        modules = self.theseus_modules
        replaced = self._draw() if self.training else [True] * len(modules)
        unsampled = []
        for i, (module, is_replaced) in enumerate(zip(modules, replaced, strict=True)):
            if is_replaced:
                self.sampled.add(i)
            else:
                unsampled += module.successor.parameters()
        with self.running(replaced) as model:
            output = model(**inputs)
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
        with self.running([True] * len(self.theseus_modules)) as model:  # the predecessor's layers need not be copied
            student = copy.deepcopy(model)
        _fit_config(student, self._chosen)
        return student

    def _draw(self) -> list[bool]:
        draws = torch.rand(len(self.theseus_modules), generator=self.generator)
        return (draws < self.replacing_probability).tolist()


class _ZeroGradients(torch.autograd.Function):
    """Passes a loss through and gives zero gradients to parameters that it does not depend on."""

    @staticmethod
    def forward(ctx, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return loss.clone()  # a view could not be divided in place, as older Trainers do

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
