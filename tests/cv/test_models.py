"""The CIFAR networks: published sizes, the blocks against torchvision's, the `Features` contract."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import mobilenetv2 as tv_mobilenetv2
from torchvision.models import resnet as tv_resnet
from torchvision.models import shufflenetv2 as tv_shufflenetv2
from torchvision.models import vgg11_bn

from common.run.errors import UserError
from cv.models import MODELS, build_model
from cv.models.mobilenetv2 import InvertedResidual
from cv.models.resnet import BasicBlock
from cv.models.shufflenet import DownUnitV2, UnitV1, UnitV2

# Millions of parameters with 100 classes, as published (CRD's and later tables; some round, some truncate).
PUBLISHED = {
    "resnet8": "0.08",
    "resnet14": "0.18",
    "resnet20": "0.28",
    "resnet32": "0.47",
    "resnet44": "0.67",
    "resnet56": "0.86",
    "resnet110": "1.74",
    "resnet8x4": "1.23",
    "resnet32x4": "7.43",
    "wrn_16_1": "0.18",
    "wrn_16_2": "0.70",
    "wrn_40_1": "0.57",
    "wrn_40_2": "2.26",
    "vgg8": "3.96",
    "vgg11": "9.28",
    "vgg13": "9.46",
    "vgg16": "14.8",
    "vgg19": "20.1",
    "mobilenetv2": "0.81",
    "shufflenetv1": "0.95",
    "shufflenetv2": "1.36",
}
# (channels, size) of every map for 32x32 images
NARROW = [(16, 32), (16, 32), (32, 16), (64, 8)]
VGG = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]
MAPS = {
    "resnet20": NARROW,
    "resnet8x4": [(32, 32), (64, 32), (128, 16), (256, 8)],
    "wrn_16_1": NARROW,
    "wrn_40_2": [(16, 32), (32, 32), (64, 16), (128, 8)],
    "vgg8": VGG,
    "vgg19": VGG,
    "mobilenetv2": [(16, 16), (12, 16), (16, 8), (48, 4), (1280, 2)],
    "shufflenetv1": [(24, 32), (240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(24, 32), (116, 16), (232, 8), (1024, 4)],
}
ONE_PER_FAMILY = ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomise_norms(module: nn.Module) -> nn.Module:
    """Eval mode with batch norms that are not the identity, in float64."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.double().eval()


def copy_in_order(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give `target` the state of `source`, whose tensors have other names but the same order and shapes."""
    target.load_state_dict(dict(zip(target.state_dict(), source.state_dict().values(), strict=True)))
    return target.double().eval()


def images(count: int, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, size, size, dtype=torch.float64)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_model_has_a_published_size():
    assert set(PUBLISHED) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_the_published_one_to_its_last_digit(name):
    millions = count_parameters(build_model(name, 100)) / 1e6
    last_digit = 10.0 ** -len(PUBLISHED[name].split(".")[1])
    assert abs(millions - float(PUBLISHED[name])) < last_digit


def test_parameter_count_of_resnet20_by_hand():
    stem = 3 * 16 * 9 + 2 * 16
    stage1 = 6 * (16 * 16 * 9 + 2 * 16)
    stage2 = (16 * 32 * 9 + 16 * 32) + 5 * 32 * 32 * 9 + 7 * 2 * 32  # the 1x1 shortcut has a batch norm of its own
    stage3 = (32 * 64 * 9 + 32 * 64) + 5 * 64 * 64 * 9 + 7 * 2 * 64
    assert count_parameters(build_model("resnet20", 100)) == stem + stage1 + stage2 + stage3 + 64 * 100 + 100


@pytest.mark.parametrize("name", MAPS)
def test_maps_have_the_published_channels_and_sizes(name):
    maps = build_model(name, 10).features(images(2).float()).maps
    assert [tuple(x.shape) for x in maps] == [(2, channels, size, size) for channels, size in MAPS[name]]


@pytest.fixture(scope="module", params=MODELS)
def outcome(request):
    """(name, model, images, features) of one forward pass, for each network."""
    torch.manual_seed(0)
    model = randomise_norms(build_model(request.param, 7)).requires_grad_(False)
    x = images(2, size=16)
    return request.param, model, x, model.features(x)


def test_forward_gives_the_logits_of_features(outcome):
    _, model, x, features = outcome
    assert features.logits.shape == (2, 7)
    assert torch.equal(model(x), features.logits)


def test_pooled_is_the_average_of_the_last_map(outcome):
    features = outcome[-1]
    torch.testing.assert_close(features.pooled, F.adaptive_avg_pool2d(features.maps[-1], 1).flatten(1))


def test_logits_are_the_classifier_of_pooled(outcome):
    _, model, _, features = outcome
    assert isinstance(model.classifier, nn.Linear)
    expected = features.pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(features.logits, expected)


def test_maps_are_the_relu_of_preacts(outcome):
    name, _, _, features = outcome
    assert len(features.maps) == len(features.preacts)
    linear = range(1, len(features.maps) - 1) if name == "mobilenetv2" else ()  # its inner stages end without a ReLU
    for index, (x, preact) in enumerate(zip(features.maps, features.preacts, strict=True)):
        assert preact.min() < 0
        assert torch.equal(x, preact if index in linear else preact.clamp(min=0))


def test_channels_last_gives_the_same_logits(outcome):
    _, model, x, features = outcome
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(x.to(memory_format=torch.channels_last)), features.logits)


@pytest.mark.parametrize("name", MODELS)
def test_backward_reaches_every_parameter(name):
    model = build_model(name, 7)
    F.cross_entropy(model(images(4, size=16).float()), torch.arange(4)).backward()
    unreached = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert unreached == []


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "shufflenetv2"])
def test_compiles_as_one_graph(name):
    model = randomise_norms(build_model(name, 7))
    x = images(2, size=16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # a graph break raises
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_takes_grey_images_of_other_sizes(name, size):
    assert build_model(name, 7, in_channels=1)(images(2, size, channels=1).float()).isfinite().all()


@pytest.mark.parametrize(("in_channels", "stride"), [(16, 1), (16, 2)])
def test_resnet_block_is_torchvisions(in_channels, stride):
    channels = in_channels * stride
    block = randomise_norms(BasicBlock(in_channels, channels, stride))
    shortcut = None
    if stride == 2:
        shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))
    reference = copy_in_order(block, tv_resnet.BasicBlock(in_channels, channels, stride, shortcut))
    x = images(2, size=8, channels=in_channels)
    torch.testing.assert_close(block(x).relu(), reference(x))


def test_vgg11_is_torchvisions():
    model = randomise_norms(build_model("vgg11", 10))
    reference = vgg11_bn().features
    names = [key for key in reference.state_dict() if not _is_conv_bias(reference, key)]
    state = dict(zip(names, model.stages.state_dict().values(), strict=True))
    biases = {key: torch.zeros_like(value) for key, value in reference.state_dict().items() if key not in state}
    reference.load_state_dict(state | biases)
    x = images(1, size=64)
    torch.testing.assert_close(F.max_pool2d(model.features(x).maps[-1], 2), reference.double().eval()(x))


def _is_conv_bias(sequence: nn.Sequential, key: str) -> bool:
    return key.endswith(".bias") and isinstance(sequence[int(key.split(".")[0])], nn.Conv2d)


@pytest.mark.parametrize(("channels", "stride"), [(12, 1), (16, 1), (12, 2)])
def test_mobilenetv2_block_is_torchvisions(channels, stride):
    block = randomise_norms(InvertedResidual(12, channels, stride, 6))
    reference = copy_in_order(block, tv_mobilenetv2.InvertedResidual(12, channels, stride, 6))
    x = images(2, size=8, channels=12) / 10  # small, as torchvision's ReLU6 cuts off at 6
    torch.testing.assert_close(block(x), reference(x))


def test_shufflenetv2_units_are_torchvisions():
    x = images(2, size=8, channels=24).relu()  # what a stage feeds them is never negative
    down, unit = randomise_norms(DownUnitV2(24, 32)), randomise_norms(UnitV2(24))
    torch.testing.assert_close(down(x).relu(), copy_in_order(down, tv_shufflenetv2.InvertedResidual(24, 32, 2))(x))
    torch.testing.assert_close(unit(x).relu(), copy_in_order(unit, tv_shufflenetv2.InvertedResidual(24, 24, 1))(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_shufflenetv1_unit_against_its_convolutions_group_by_group(stride):
    unit = randomise_norms(UnitV1(48, 48 * stride, stride, groups=3))
    x = images(2, size=8, channels=48)

    def grouped(layer, x, groups):
        parts = zip(x.chunk(groups, 1), layer[0].weight.chunk(groups), strict=True)
        return layer[1](torch.cat([F.conv2d(part, weight) for part, weight in parts], 1))

    out = grouped(unit.reduce, x, 3).relu()  # 12 channels: 0..3, 4..7, 8..11
    out = out[:, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]
    out = unit.depthwise[1](F.conv2d(out, unit.depthwise[0].weight, stride=stride, padding=1, groups=12)).relu()
    out = grouped(unit.expand, out, 3)
    expected = out + x if stride == 1 else torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)
    torch.testing.assert_close(unit(x), expected)


@pytest.mark.parametrize("name", ["wrn_16_1", "wrn_16_2"])
def test_wide_resnet_against_a_forward_pass_from_its_weights(name):
    model = randomise_norms(build_model(name, 7))
    state = model.state_dict()

    def norm(key, x):
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        return F.relu(F.batch_norm(x, mean, var, state[f"{key}.weight"], state[f"{key}.bias"]))

    images_ = images(2, size=16)
    x = F.conv2d(images_, state["conv1.weight"], padding=1)
    for stage in range(3):
        for block in range(2):
            key = f"stages.{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            out = norm(f"{key}.bn1", x)
            if f"{key}.shortcut.weight" in state:
                x = F.conv2d(out, state[f"{key}.shortcut.weight"], stride=stride)
            out = F.conv2d(out, state[f"{key}.conv1.weight"], stride=stride, padding=1)
            x = x + F.conv2d(norm(f"{key}.bn2", out), state[f"{key}.conv2.weight"], padding=1)
    pooled = norm("bn", x).mean((2, 3))
    torch.testing.assert_close(model(images_), pooled @ state["classifier.weight"].T + state["classifier.bias"])


@pytest.mark.parametrize(("name", "blocks"), [("resnet32", 5), ("resnet110", 18), ("wrn_40_2", 6)])
def test_residual_networks_name_their_weights_by_stage_and_block(name, blocks):
    names = [key for key in build_model(name, 10).state_dict() if key.startswith("stages.") and ".conv" in key]
    expected = [f"stages.{s}.{b}.conv{c}.weight" for s in range(3) for b in range(blocks) for c in (1, 2)]
    assert names == expected


def test_residual_convolutions_start_with_the_he_variance():
    weight = build_model("resnet32x4", 100).stages[2][0].conv1.weight  # 128 to 256 channels: 294,912 draws
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


def test_unknown_name_lists_the_names_and_the_nearest():
    message = r"unknown network 'ResNet-20'.*resnet8, .*shufflenetv2, .*; did you mean 'resnet20'"
    with pytest.raises(UserError, match=message):
        build_model("ResNet-20", 100)


@pytest.mark.parametrize("counts", [{"num_classes": 0}, {"num_classes": 10, "in_channels": 0}, {"num_classes": "10"}])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(UserError, match="must be a whole number of at least 1"):
        build_model("resnet8", **counts)
