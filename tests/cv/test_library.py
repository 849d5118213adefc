"""Networks of torchvision and timm by name, AdamW and cosine, and folders of pictures at 224 pixels."""

import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cv_fixtures import column, same_tensors, short_config, short_run
from PIL import Image
from safetensors.torch import save_file

import cv.trainer
from common.run.errors import UserError
from common.run.stopping import Stopped
from cv.config import load_config
from cv.data import load_dataset
from cv.export import load_model, save_model
from cv.models import build_model
from cv.trainer import learning_rate, train

SMALL = "timm/test_resnet"
PLAIN = "DISTILLER.TYPE vanilla"


def network(name: str, classes: int = 10, seed: int = 3):
    torch.manual_seed(seed)
    return build_model(name, classes)


def refusal(cfg, **how) -> str:
    with pytest.raises(UserError) as caught:
        train(cfg, **how)
    return str(caught.value)


# Features


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_maps_of_a_resnet_are_its_stem_and_stages(library):
    model = network(f"{library}/resnet18").eval()
    net, images = model.net, torch.randn(2, 3, 64, 64)
    x = net.bn1(net.conv1(images)).relu()
    maps = [x.clone()]
    x = net.maxpool(x)
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        maps.append(x.clone())
    features = model.features(images)
    assert [torch.equal(ours, theirs) for ours, theirs in zip(features.maps, maps, strict=True)] == [True] * 5
    assert torch.equal(features.pooled, x.mean((2, 3)))
    assert torch.equal(features.logits, net(images))
    assert torch.equal(model(images), features.logits)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("torchvision/mobilenet_v3_small", [16, 16, 24, 48, 576]),
        ("torchvision/convnext_tiny", [96, 192, 384, 768]),
        ("timm/convnext_atto", [40, 80, 160, 320]),
        ("torchvision/swin_t", []),  # channels last
        ("timm/vit_tiny_patch16_224", []),
    ],
)
def test_the_maps_are_the_last_of_every_resolution(name, channels):
    model = network(name).eval()
    with torch.no_grad():
        features = model.features(torch.randn(1, 3, 224, 224))
    assert [each.shape[1] for each in features.maps] == channels
    assert torch.equal(features.logits, model.classifier(features.pooled))


def test_nothing_is_left_on_the_network():
    model = network(SMALL)
    model.features(torch.randn(2, 3, 32, 32))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_statistics_change_once_a_step_although_the_maps_are_looked_for():
    model = network(SMALL)
    model.features(torch.randn(2, 3, 32, 32))
    assert {int(value) for name, value in model.state_dict().items() if name.endswith("batches_tracked")} == {1}


# Names


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("torchvision/resnet19", "torchvision has no network 'resnet19'; did you mean torchvision/resnet1"),
        ("timm/resnet_18", "timm has no network 'resnet_18'; did you mean timm/resnet"),
        ("torchvision/fasterrcnn_resnet50_fpn", "torchvision has no network"),
        ("torchvision/squeezenet1_0", "torchvision/squeezenet1_0 does not end in one linear layer"),
        ("resnet18", "torchvision/<name> and timm/<name>"),
    ],
)
def test_a_name_that_no_library_has_is_refused(name, told):
    with pytest.raises(UserError) as caught:
        network(name)
    assert told in str(caught.value)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs timm: pip install timm"):
        network(SMALL)
    assert network("torchvision/resnet18").classifier.out_features == 10


def test_a_saved_network_loads_again(tmp_path):
    model = network("torchvision/resnet18", 4).eval()
    save_model(model, "torchvision/resnet18", tmp_path)
    loaded, info = load_model(tmp_path)
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(loaded(images), model(images))
    assert info["architecture"] == "torchvision/resnet18"


# Runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten classes of three pictures a split, of which two have other sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(30):
            path = folder / split / f"class{number // 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (240, 300, 3) if number < 2 else (64, 64, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_model(network(SMALL), SMALL, folder)
    return folder


def on(pictures: Path, size: int, more: str) -> str:
    places = f"DATASET.NAME folder DATASET.ROOT '{pictures}' DATASET.IMAGE_SIZE {size} DATASET.SUBSET 20"
    return f"{places} SOLVER.BATCH_SIZE 10 {more}"


def test_a_library_network_trains_on_a_folder_at_224_pixels(tmp_path, pictures):
    run = short_run(tmp_path, None, on(pictures, 224, f"{PLAIN} DISTILLER.STUDENT torchvision/resnet18"))
    assert load_dataset("folder", pictures, image_size=224).train.images.shape == (30, 3, 224, 224)
    assert all(map(math.isfinite, column(run, "loss")))
    assert load_model(tmp_path / "student")[1]["image_size"] == 224


@pytest.mark.parametrize("method", ["kd", "dkd", "expkd", "fitnet", "at", "sp", "crd", "reviewkd"])
def test_every_method_distils_library_networks(tmp_path, pictures, teacher, method):
    networks = f"DISTILLER.STUDENT {SMALL} DISTILLER.TEACHER {SMALL} DISTILLER.TYPE {method} CRD.NCE_K 8"
    pairs = "DSKD.ENABLED true DSKD.SVD_STEPS 1 DSKD.PAIRS '[[net.layer*.*.conv1, net.layer*.*.conv1]]'"
    run = short_run(tmp_path, teacher, on(pictures, 64, f"{networks} {pairs}"))
    assert all(map(math.isfinite, column(run, "loss")))
    assert all(value > 0 for value in column(run, "dskd_loss"))


def test_pairs_of_other_shapes_are_left_out(tmp_path, pictures, capsys):
    save_model(network("torchvision/resnet50"), "torchvision/resnet50", tmp_path / "t")
    pairs = load_config("configs/own/resnet50_resnet18.yaml").DSKD.PAIRS
    networks = "DISTILLER.STUDENT torchvision/resnet18 DISTILLER.TEACHER torchvision/resnet50 DISTILLER.TYPE kd"
    more = f"{networks} DSKD.ENABLED true DSKD.BASIS update DSKD.RANK 4 DSKD.PAIRS '{pairs}' DATASET.SUBSET 10"
    assert "shapes" in refusal(short_config(tmp_path / "no", tmp_path / "t", on(pictures, 32, more)))
    short_run(tmp_path / "run", tmp_path / "t", on(pictures, 32, f"{more} DSKD.SKIP_MISMATCHED true"))
    lines = [line for line in capsys.readouterr().out.splitlines() if " <- " in line]
    assert len(lines) == 16
    assert all(("conv1" in line) == line.endswith("(left out: shapes differ)") for line in lines)


@pytest.mark.parametrize("method", ["at", "fitnet", "sp", "reviewkd", "expkd"])
def test_a_network_without_maps_is_refused_where_they_are_compared(tmp_path, method, teacher):
    settings = f"DISTILLER.STUDENT timm/test_vit DISTILLER.TEACHER {SMALL} DATASET.IMAGE_SIZE 160"
    message = refusal(short_config(tmp_path, teacher, f"DISTILLER.TYPE {method} {settings}"))
    assert message.startswith(f"method {method} compares feature maps, and the student has none of height and width")


def test_transformers_train_with_dskd_on_their_linear_layers(tmp_path):
    save_model(network("timm/test_vit"), "timm/test_vit", tmp_path / "t")
    networks = "DISTILLER.STUDENT timm/test_vit DISTILLER.TEACHER timm/test_vit DISTILLER.TYPE kd"
    pairs = "DSKD.ENABLED true DSKD.PAIRS '[[net.blocks.*.mlp.fc1, net.blocks.*.mlp.fc1]]'"
    more = f"{networks} {pairs} DATASET.IMAGE_SIZE 160 DATASET.SUBSET 20 SOLVER.BATCH_SIZE 10"
    run = short_run(tmp_path / "run", tmp_path / "t", more)
    assert all(value > 0 for value in column(run, "dskd_loss"))


def test_a_size_that_a_transformer_does_not_take_is_refused(tmp_path):
    message = refusal(short_config(tmp_path, None, f"{PLAIN} DISTILLER.STUDENT timm/vit_tiny_patch16_224"))
    assert message.startswith("timm/vit_tiny_patch16_224 cannot take images of 8x8 pixels; set a larger DATASET.IMAGE")


def test_blocks_of_a_library_network_are_not_copied(tmp_path, teacher):
    networks = f"DISTILLER.STUDENT {SMALL} DISTILLER.TEACHER {SMALL} DISTILLER.START teacher"
    message = refusal(short_config(tmp_path, teacher, networks))
    assert message.startswith("DISTILLER.START teacher: the student")
    assert message.endswith("use START random")


# Weights to start from


@pytest.mark.parametrize(("classes", "said"), [(10, ""), (1000, "; its classifier starts from random weights")])
def test_a_student_starts_from_a_file_of_the_library(tmp_path, classes, said, monkeypatch, capsys):
    published = network(SMALL, classes, seed=9).net.state_dict()
    save_file(published, tmp_path / "w.safetensors")
    started = []
    step = cv.trainer._Run._step

    def look(self, *batch):
        if not started:
            started.append({name: value.clone() for name, value in self.distiller.student.net.state_dict().items()})
        return step(self, *batch)

    monkeypatch.setattr(cv.trainer._Run, "_step", look)
    overrides = f"{PLAIN} DISTILLER.STUDENT {SMALL} DISTILLER.STUDENT_CKPT '{tmp_path / 'w.safetensors'}'"
    short_run(tmp_path / "run", None, f"{overrides} DATASET.IMAGE_SIZE 32")
    same = {name for name, value in published.items() if torch.equal(value, started[0].get(name, torch.zeros(0)))}
    assert set(published) - same == (set() if classes == 10 else {"fc.weight", "fc.bias"})
    normalised = ", and images are normalised as for those: mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"
    assert f"note: {SMALL} starts from {tmp_path / 'w.safetensors'}{normalised}{said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("conv1.0.weight"), "conv1.0.weight is absent in it, "),
        (lambda state: state.update(more=torch.ones(1)), "more is (1,) in it, absent in the network"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, told):
    published = network(SMALL).net.state_dict()
    change(published)
    save_file(published, tmp_path / "w.safetensors")
    overrides = f"{PLAIN} DISTILLER.STUDENT_CKPT '{tmp_path / 'w.safetensors'}' DATASET.IMAGE_SIZE 32"
    assert told in refusal(short_config(tmp_path / "run", None, f"{overrides} DISTILLER.STUDENT {SMALL}"))
    assert "is for students of timm and torchvision" in refusal(short_config(tmp_path / "run", None, overrides))


# AdamW and cosine


def test_a_step_of_adamw_is_torchs(tmp_path, monkeypatch):
    states = []
    step = cv.trainer._Run._step

    def look(self, *batch):
        weight = self.distiller.student.conv1.weight
        before = weight.detach().clone()
        result = step(self, *batch)
        states.append((before, weight.grad.clone(), weight.detach().clone()))
        return result

    monkeypatch.setattr(cv.trainer._Run, "_step", look)
    short_run(tmp_path, None, f"{PLAIN} SOLVER.OPTIMIZER adamw SOLVER.LR 0.002 SOLVER.WEIGHT_DECAY 0.1")
    first = second = torch.zeros_like(states[0][0], dtype=torch.float64)
    for number, (before, gradient, after) in enumerate(states, 1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        update = (first / (1 - 0.9**number)) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        expected = before.double() * (1 - 0.002 * 0.1) - 0.002 * update
        torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_cosine_starts_at_the_rate_and_ends_near_zero():
    solver = load_config("configs/demo/base.yaml", ["SOLVER.SCHEDULE", "cosine", "SOLVER.EPOCHS", "4"]).SOLVER
    rates = [learning_rate(solver, epoch) / solver.LR for epoch in (1, 2, 3, 4)]
    assert rates == pytest.approx([1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2])


def test_adamw_and_cosine_resume_to_the_same_bits_and_not_to_another_schedule(tmp_path, monkeypatch):
    overrides = f"{PLAIN} SOLVER.OPTIMIZER adamw SOLVER.LR 0.01 SOLVER.SCHEDULE cosine SOLVER.EPOCHS 3"
    whole = short_run(tmp_path / "whole", None, overrides)
    step = cv.trainer._Run._step

    def stopped(self, *batch):
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(cv.trainer._Run, "_step", stopped)
        with pytest.raises(Stopped):
            train(short_config(tmp_path / "run", None, overrides))
    longer = refusal(short_config(tmp_path / "run", None, f"{overrides} SOLVER.EPOCHS 5"), resume=True)
    assert longer.endswith("on which the cosine schedule depends, and 5 is asked for now")
    assert same_tensors(short_run(tmp_path / "run", None, overrides, resume=True).weights, whole.weights)
