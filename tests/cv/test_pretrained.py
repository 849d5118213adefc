"""Weights that a library publishes: from it, a file or a folder, and images normalised as these were trained on."""

import json

import pytest
import torch
from accelerate.utils import set_seed
from cv_fixtures import column, same_tensors, save_teacher, short_config, short_run
from safetensors.torch import load_file, save_file

import cv.trainer
from common.run.errors import UserError
from common.torchvision_repair import repair_torchvision
from cv.convert_teacher import convert
from cv.data import load_dataset, normalize
from cv.export import load_model, save_model
from cv.methods.kd import kd_loss
from cv.models import build_model
from cv.models.pretrained import published_normalisation
from cv.normalisation import Normalisation, Renormalise
from cv.teachers import load_teacher
from cv.trainer import train

SMALL = "timm/test_resnet"  # published with mean and std 0.5
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalisation((0.5,) * 3, (0.5,) * 3)
VANILLA = f"DISTILLER.TYPE vanilla DISTILLER.STUDENT {SMALL} DATASET.IMAGE_SIZE 32 SOLVER.BATCH_SIZE 64"

repair_torchvision()


def network(name: str = SMALL, classes: int = 10, seed: int = 3):
    torch.manual_seed(seed)
    return build_model(name, classes)


def published(folder, classes: int = 10, **how):
    """A safetensors file by the library's names."""
    save_file(network(SMALL, classes, **how).net.state_dict(), folder / "w.safetensors")
    return folder / "w.safetensors"


def refusal(cfg, **how) -> str:
    with pytest.raises(UserError) as caught:
        train(cfg, **how)
    return str(caught.value)


def seen_images(monkeypatch) -> list:
    """(images of the student, of the teacher) in the first step of the run that follows."""
    seen = []
    forward = cv.methods.Distiller.forward

    def look(self, images, labels, indices):
        if not seen:
            seen.extend([indices, images, *[change(images) for change in self.teacher_images]])
        return forward(self, images, labels, indices)

    monkeypatch.setattr(cv.methods.Distiller, "forward", look)
    return seen


# What the weights were trained on


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/resnet18", IMAGENET),
        ("timm/vit_tiny_patch16_224", HALF),
        ("timm/vit_tiny_patch16_224.augreg_in21k", HALF),
        ("timm/vit_base_patch16_224.augreg_in21k", HALF),
        ("timm/vit_base_patch16_224.dino", IMAGENET),  # the same network, other weights
        ("torchvision/resnet50", IMAGENET),
    ],
)
def test_the_normalisation_is_that_of_the_weights(name, expected):
    assert published_normalisation(name) == expected


def test_what_torchvision_transforms_within_the_network_is_normalised_for_it():
    """Its weights come with `transform_input`, which a network that is built without them lacks."""
    from torchvision.models import googlenet

    torch.manual_seed(0)
    theirs = googlenet(weights=None, transform_input=True, aux_logits=False, init_weights=False, num_classes=5).eval()
    ours = build_model("torchvision/googlenet", 5).eval()
    ours.net.load_state_dict(theirs.state_dict())
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = theirs(normalize(pixels, *IMAGENET))
    torch.testing.assert_close(ours(normalize(pixels, *published_normalisation("torchvision/googlenet"))), expected)


def test_a_network_may_be_named_with_the_tag_of_its_weights():
    names = build_model("timm/resnet18.tv_in1k", 10).state_dict().keys()
    assert names == build_model("timm/resnet18", 10).state_dict().keys()
    with pytest.raises(UserError, match="timm has no network 'resnet18"):
        build_model("timm/resnet18.nope", 10)


def test_renormalised_images_are_those_normalised_for_the_other_network():
    pixels = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    changed = Renormalise(IMAGENET, HALF)(normalize(pixels, *IMAGENET))
    torch.testing.assert_close(changed, normalize(pixels, *HALF))


# Students


def test_a_pretrained_student_sees_images_as_its_weights_did_and_says_so_in_its_export(tmp_path, monkeypatch):
    seen = seen_images(monkeypatch)
    file = published(tmp_path)
    short_run(tmp_path / "run", None, f"{VANILLA} DATASET.AUGMENT false DISTILLER.STUDENT_CKPT '{file}'")
    indices, images, _ = seen
    pixels = load_dataset("digits", "", image_size=32, subset=128).train.images[indices]
    assert torch.equal(images, normalize(pixels, *HALF))
    info = load_model(tmp_path / "run" / "student")[1]
    assert (info["mean"], info["std"]) == ([0.5] * 3, [0.5] * 3)


def test_a_student_from_random_weights_sees_images_by_the_statistics_of_its_data(tmp_path):
    short_run(tmp_path, None, VANILLA)
    data = load_dataset("digits", "", image_size=32)
    assert load_model(tmp_path / "student")[1]["mean"] == list(data.mean)


def test_a_student_starts_from_a_saved_network_and_its_normalisation(tmp_path):
    save_model(network(classes=4), SMALL, tmp_path / "saved", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    short_run(tmp_path / "run", None, f"{VANILLA} DISTILLER.STUDENT_CKPT '{tmp_path / 'saved'}' SOLVER.LR 1e-9")
    weights, info = load_model(tmp_path / "run" / "student")
    assert (info["mean"], info["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    expected = network(classes=4).state_dict()["net.conv1.0.weight"]
    torch.testing.assert_close(weights.state_dict()["net.conv1.0.weight"], expected, atol=1e-6, rtol=0)


def test_a_run_does_not_go_on_with_another_normalisation(tmp_path):
    overrides = f"{VANILLA} DISTILLER.STUDENT_CKPT '{published(tmp_path)}'"
    short_run(tmp_path / "run", None, overrides)
    message = refusal(short_config(tmp_path / "run", None, f"{VANILLA} SOLVER.EPOCHS 2"), resume=True)
    assert message.endswith("give DISTILLER.STUDENT_CKPT as it was")
    assert "was written with images normalised by mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)" in message
    short_run(tmp_path / "run", None, f"{overrides} SOLVER.EPOCHS 2", resume=True)


# Teachers


KD = f"DISTILLER.TYPE kd DISTILLER.STUDENT resnet8 DISTILLER.TEACHER {SMALL} DATASET.IMAGE_SIZE 32"


def test_a_teacher_sees_images_as_it_was_trained_on_them(tmp_path, monkeypatch, capsys):
    seen = seen_images(monkeypatch)
    save_model(network(), SMALL, tmp_path / "t", mean=list(IMAGENET.mean), std=list(IMAGENET.std))
    short_run(tmp_path / "run", tmp_path / "t", f"{KD} DATASET.AUGMENT false")
    data = load_dataset("digits", "", image_size=32, subset=128)
    indices, of_student, of_teacher = seen
    pixels = data.train.images[indices]
    assert torch.equal(of_student, normalize(pixels, data.mean, data.std))
    torch.testing.assert_close(of_teacher, normalize(pixels, *IMAGENET))
    assert "note: the teacher's images are normalised as those that it was trained on: mean (0.485," in (
        capsys.readouterr().out
    )


def test_a_teacher_of_this_data_gets_the_very_images_of_the_student(tmp_path, monkeypatch):
    seen = seen_images(monkeypatch)
    data = load_dataset("digits", "", image_size=32)
    in_last_bits = [value * (1 + 1e-12) for value in data.mean]  # of another machine
    save_model(network(), SMALL, tmp_path / "t", mean=in_last_bits, std=list(data.std))
    short_run(tmp_path / "run", tmp_path / "t", KD)
    assert seen[1] is seen[2]


def test_a_copied_student_takes_over_the_teachers_normalisation(tmp_path):
    torch.manual_seed(7)
    save_model(build_model("resnet14", 10), "resnet14", tmp_path / "t", mean=[0.1] * 3, std=[0.9] * 3)
    short_run(tmp_path / "run", tmp_path / "t", "DISTILLER.START teacher")
    assert load_model(tmp_path / "run" / "student")[1]["mean"] == [0.1] * 3


def test_a_librarys_file_teaches_as_the_library_normalises(tmp_path, monkeypatch):
    seen = seen_images(monkeypatch)
    file = published(tmp_path)
    run = short_run(tmp_path / "run", file, f"{KD} DATASET.AUGMENT false")
    pixels = load_dataset("digits", "", image_size=32, subset=128).train.images[seen[0]]
    torch.testing.assert_close(seen[2], normalize(pixels, *HALF))
    assert len(run.result["teacher_sha256"]) == 64
    teacher = load_teacher(short_config(tmp_path, file, KD), 10, 3).network
    assert same_tensors(teacher.net.state_dict(), load_file(file))


def test_a_librarys_teacher_of_other_classes_is_refused_with_the_way_out(tmp_path):
    message = refusal(short_config(tmp_path / "run", published(tmp_path, 7), KD))
    assert "the checkpoint's num_classes is 7, this run needs 10; fine-tune it on this data set first" in message


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("mean", [0.5, 0.5], "expected 3 finite numbers"),
        ("mean", [0.5, 0.5, float("nan")], "expected 3 finite numbers"),
        ("std", [0.5, 0.5, 0], "expected 3 finite numbers above 0"),
        ("std", ["a", "b", "c"], "expected 3 finite numbers above 0"),
        ("mean", 0.5, "expected a number per channel"),
    ],
)
def test_a_normalisation_that_is_none_is_refused(tmp_path, key, value, told):
    save_teacher(tmp_path)
    described = json.loads((tmp_path / "model.json").read_text()) | {key: value}
    (tmp_path / "model.json").write_text(json.dumps(described))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert told in str(caught.value) or "NaN is not a number in JSON" in str(caught.value)


# From the library itself


@pytest.fixture
def hub(monkeypatch):
    """A hub that gives a network of 1000 classes for each name."""
    import timm

    create = timm.create_model

    def give(name, pretrained=False, **settings):
        if not pretrained:
            return create(name, **settings)
        torch.manual_seed(11)
        return create(name)

    monkeypatch.setattr(timm, "create_model", give)


@pytest.mark.usefixtures("hub")
def test_a_student_starts_from_the_published_weights(tmp_path, capsys):
    run = short_run(tmp_path, None, f"{VANILLA} DISTILLER.STUDENT_CKPT pretrained SOLVER.LR 1e-9")
    torch.manual_seed(11)
    expected = build_model(SMALL, 1000).state_dict()
    ours = run.weights["net.conv1.0.weight"]
    torch.testing.assert_close(ours, expected["net.conv1.0.weight"], atol=1e-6, rtol=0)
    assert run.weights["net.fc.weight"].shape[0] == 10
    assert f"note: {SMALL} starts from its published weights, and images are" in capsys.readouterr().out


@pytest.mark.usefixtures("hub")
def test_published_weights_of_other_classes_are_no_teacher(tmp_path):
    assert "num_classes is 1000, this run needs 10" in refusal(short_config(tmp_path, "pretrained", KD))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            SMALL,
            "download model.safetensors of https://huggingface.co/timm/test_resnet.r160_in1k elsewhere, and give it",
        ),
        (
            "torchvision/resnet18",
            "download https://download.pytorch.org/models/resnet18-f37072fd.pth elsewhere as resnet18.pth, convert it "
            "by `python -m cv.convert_teacher resnet18.pth --architecture torchvision/resnet18`, and give the folder",
        ),
    ],
)
def test_without_a_network_it_is_said_what_to_do(tmp_path, monkeypatch, name, told):
    import timm
    import torchvision

    def offline(*args, pretrained=True, **how):
        if pretrained:
            raise OSError("no\nnetwork")
        return create(*args, **how)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    settings = f"{VANILLA} DISTILLER.STUDENT {name} DISTILLER.STUDENT_CKPT pretrained"
    message = refusal(short_config(tmp_path, None, settings))
    assert message.startswith(
        f"DISTILLER.STUDENT_CKPT pretrained: the weights of {name} are not to be had here (no net"
    )
    assert told in message
    assert "\n" not in message


def test_torchvisions_download_becomes_a_start_by_conversion(tmp_path):
    model = network("torchvision/resnet18", 4).eval()
    torch.save(model.net.state_dict(), tmp_path / "resnet18.pth")
    convert(tmp_path / "resnet18.pth", "torchvision/resnet18", tmp_path / "out", [])
    loaded, info = load_model(tmp_path / "out")
    assert same_tensors(loaded.state_dict(), model.state_dict())
    assert (tuple(info["mean"]), tuple(info["std"])) == IMAGENET


def test_library_teachers_distil_by_their_own_images(tmp_path):
    """The loss of the first step is that of the teacher's logits on images normalised as its weights were."""
    file = published(tmp_path)
    overrides = f"{KD} DATASET.AUGMENT false KD.CE_WEIGHT 0 KD.KD_WEIGHT 1 DATASET.SUBSET 20 SOLVER.BATCH_SIZE 20"
    run = short_run(tmp_path / "run", file, overrides)
    data = load_dataset("digits", "", image_size=32, subset=20)
    teacher = network().eval()
    set_seed(short_config(tmp_path, file, overrides).SOLVER.SEED)
    student = build_model("resnet8", 10)
    with torch.no_grad():
        ours = student(normalize(data.train.images, data.mean, data.std))
        theirs = teacher(normalize(data.train.images, *HALF))
    assert column(run, "loss_kd")[0] == pytest.approx(kd_loss(ours, theirs, 4.0).item(), rel=1e-4)
