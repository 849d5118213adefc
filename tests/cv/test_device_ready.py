"""What a GPU asks of every method's training step, shown on the meta device, whose tensors have no values.

An operation that mixes devices fails there as it does on a GPU, and so does every read of a value.
"""

import pytest
import torch

from cv.dskd import block_map
from cv.methods import METHODS, build_distiller, method_defaults
from cv.models import build_model
from dskd import Curvature, DirectionSensitivityLoss, Own, pair_weights

CLASSES, IMAGE, NUM_TRAIN, BATCH = 10, (3, 32, 32), 24, 4


@pytest.fixture
def meta_step(monkeypatch):
    """Takes two training steps with DSKD on the meta device, by the name of a method."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **how: autocast("cpu", **how))  # it knows no meta device

    def take(name: str) -> None:
        facts = {"num_classes": CLASSES, "image_shape": IMAGE, "num_train": NUM_TRAIN}
        student, teacher = build_model("resnet8", CLASSES), build_model("resnet14", CLASSES)
        distiller = build_distiller(name, student, teacher, method_defaults()[name.upper()], **facts).to("meta").train()
        images = torch.randn(BATCH, *IMAGE, device="meta")
        labels, indices = (torch.zeros(BATCH, dtype=torch.long, device="meta") for _ in range(2))
        pairs = pair_weights(student, teacher, block_map(student, teacher))
        alignments = [DirectionSensitivityLoss(pairs, reading) for reading in (Own(2), Curvature())]
        optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            logits, losses = distiller(images, labels, indices)
            (sum(losses.values()) + sum(alignment() for alignment in alignments)).backward()
            optimizer.step()
            assert logits.device.type == "meta"

    return take


@pytest.mark.parametrize("name", METHODS)
def test_no_method_mixes_devices_or_reads_a_value(name, meta_step):
    meta_step(name)


@pytest.mark.parametrize("wrong", [lambda logits: logits.sum().item(), lambda logits: logits + torch.zeros(CLASSES)])
def test_a_method_that_reads_a_value_or_mixes_devices_is_noticed(wrong, meta_step, monkeypatch):
    right = METHODS["kd"].losses

    def losses(self, student, *others):
        wrong(student.logits)
        return right(self, student, *others)

    monkeypatch.setattr(METHODS["kd"], "losses", losses)
    with pytest.raises(RuntimeError, match="meta"):
        meta_step("kd")
