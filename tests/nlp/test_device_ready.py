"""What a GPU asks of a step of the GLUE program, shown on the meta device, whose tensors have no values."""

import copy
from collections.abc import Callable

import pytest
import torch
from theseus_fixtures import batch, bert, theseus
from torch import nn

from bert_of_theseus.distillation import DistilledModel
from bert_of_theseus.modeling import copied_layers, layer_pairs
from dskd import Curvature, DirectionSensitivityLoss, Own
from dskd.groups import Pairs

Made = tuple[nn.Module, Callable[[], Pairs]]


def replacing() -> Made:
    model = theseus(probability=0.5)
    return model, model.pairs


def distilling(beta: float = 0.0) -> Made:
    teacher = bert()
    model = DistilledModel(copied_layers(copy.deepcopy(teacher), 2), teacher, alpha=0.5, temperature=10.0, beta=beta)
    return model, lambda: layer_pairs(model.student, model.teacher)


def patient() -> Made:
    return distilling(100.0)


@pytest.mark.parametrize("make", [replacing, distilling, patient])
def test_no_step_mixes_devices_or_reads_a_value(make, monkeypatch):
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **how: autocast("cpu", **how))  # it knows no meta device
    model, pairs = make()
    model.to("meta").train()
    # without the mask, of which transformers itself reads once a step whether it hides anything
    inputs = {name: tensor.to("meta") for name, tensor in batch().items() if name != "attention_mask"}
    alignments = [DirectionSensitivityLoss(pairs(), reading) for reading in (Own(2), Curvature())]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(**inputs)["loss"] + sum(alignment() for alignment in alignments)).backward()
        optimizer.step()
