"""The alignment of `Update` along the directions of the update, beside the float64 oracle."""

import oracle
import pytest
import torch
from drawn import every_shape, random, random_weights
from torch.testing import assert_close

from dskd import Update


@every_shape
def test_update_loss_and_gradient_equal_the_oracle(shape):
    student, teacher, update = random(*shape, seed=1), random(*shape, seed=2), random(*shape, seed=3)
    w = random_weights(min(shape))
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    order = w.argsort(descending=True)  # directions come with the largest weight first
    chosen = {"weights": w[None], "left": left[None, :, order], "right": right.mT[None, :, order]}
    loss, actual = Update(0).value_and_gradient(student[None], {"teacher": teacher[None]}, chosen)
    assert loss.item() == pytest.approx(oracle.update_loss(student, teacher, update, w.numpy()))
    assert_close(actual[0], torch.from_numpy(oracle.update_gradient(student, teacher, update, w.numpy())))
