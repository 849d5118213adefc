"""Batch norms that are folded into convolutions: the same outputs, and no copy where they would be others."""

import pytest
import torch
from torch import nn

from cv.folding import folded
from cv.models import MODELS, build_model
from cv.models.features import Features
from cv.models.library import build_library_network


def trained(network: nn.Module) -> nn.Module:
    """With statistics and scales of batch norms that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.2), (module.running_var, 0.5), (module.weight.data, 0.6)):
                tensor.uniform_(low, low + 0.8, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
    return network.requires_grad_(False).eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", MODELS)
def test_all_outputs_of_every_network_stay(name):
    torch.manual_seed(0)
    network = trained(build_model(name, 10)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    lean = folded(network, (3, 32, 32))
    assert norms(lean) < norms(network)
    for outputs, expected in zip(lean.features(images), network.features(images), strict=True):
        torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)


def test_every_norm_of_a_resnet_goes_and_its_weights_stay_as_they_are():
    network = trained(build_model("resnet8", 10))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert norms(folded(network, (3, 32, 32))) == 0
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet", "mobilenetv3_small_050"])
def test_norms_of_timm_that_have_an_activation_go_and_all_outputs_stay(name):
    torch.manual_seed(0)
    network = trained(build_library_network(f"timm/{name}", 10)).double()
    assert any(type(module).__name__ == "BatchNormAct2d" for module in network.modules())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    lean = folded(network, (3, 64, 64))
    assert norms(lean) == 0
    found, expected = lean.features(images), network.features(images)
    torch.testing.assert_close(
        [found.logits, found.pooled, *found.maps],
        [expected.logits, expected.pooled, *expected.maps],
        rtol=1e-9,
        atol=1e-9,
    )


class Twice(nn.Module):
    """Gives a convolution's output out, and a batch norm of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def features(self, images: torch.Tensor) -> Features:
        raw = self.conv(images)
        return Features(raw.mean((2, 3)), (raw,), (self.norm(raw),), raw.mean((2, 3)))


def test_a_norm_stays_where_the_convolution_is_used_otherwise_too():
    assert norms(folded(trained(Twice()), (3, 8, 8))) == 1
