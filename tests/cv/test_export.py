"""Saved networks load again as they were, broken files are named, ONNX agrees with torch."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.run.errors import UserError
from cv.export import export_onnx, load_model, save_model
from cv.models import build_model


def trained(name="resnet8", num_classes=5, in_channels=3):
    """A network whose batch norms have seen data, so that its eval mode gives logits of ordinary size."""
    torch.manual_seed(0)
    model = build_model(name, num_classes, in_channels)
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(8, in_channels, 16, 16))
    return model


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved resnet8 of 5 classes."""
    save_model(trained(), "resnet8", tmp_path / "net", image_size=16, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    return tmp_path / "net"


def edit_json(folder, **changes):
    path = folder / "model.json"
    info = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in info.items() if value is not None}))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "shufflenetv2"])
def test_loaded_model_gives_the_same_logits_bit_for_bit(tmp_path, name):
    model = trained(name)
    save_model(model, name, tmp_path)
    loaded, _ = load_model(tmp_path)
    assert not loaded.training
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded(x), model.eval()(x))


def test_channels_last_model_is_saved_too(tmp_path):
    model = trained().to(memory_format=torch.channels_last)
    save_model(model, "resnet8", tmp_path)
    loaded, _ = load_model(tmp_path)
    assert torch.equal(loaded.conv1.weight, model.conv1.weight)


def test_json_describes_the_network(tmp_path):
    model = trained(num_classes=2, in_channels=1)
    metadata = {"image_size": 16, "mean": torch.tensor([0.5]), "std": np.array([0.25]), "class_names": ["Ä", "b"]}
    save_model(model, "resnet8", tmp_path, accuracy=np.float64(71.5), **metadata)
    expected = {"architecture": "resnet8", "num_classes": 2, "in_channels": 1, "image_size": 16}
    expected |= {"mean": [0.5], "std": [0.25], "class_names": ["Ä", "b"], "accuracy": 71.5}
    assert json.loads((tmp_path / "model.json").read_text(encoding="utf-8")) == expected
    assert load_model(tmp_path)[1] == expected


def test_json_of_another_name_finds_the_weights_beside_it(saved):
    for suffix in ("json", "safetensors"):
        (saved / f"model.{suffix}").rename(saved / f"teacher.{suffix}")
    loaded, info = load_model(saved / "teacher.json")
    assert info["architecture"] == "resnet8"
    assert loaded.classifier.out_features == 5


def test_only_the_two_files_are_left(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "model.safetensors"]


def test_interrupted_save_keeps_the_former_files(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full_disk(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(trained(num_classes=7), "resnet8", saved)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("resnet14", {}, r"not a resnet14: stages.0.1.conv1.weight is missing"),
        ("resnet8x4", {}, r"conv1.weight has shape \(16, 3, 3, 3\), expected \(32, 3, 3, 3\)"),
        ("resnet8", {"mean": [0.5]}, "mean has 1 entries, but in_channels is 3"),
        ("resnet8", {"class_names": ["a"]}, "class_names has 1 entries, but num_classes is 5"),
        ("resnet8", {"num_classes": 6}, "num_classes is 5 in the model, but 6 was given"),
    ],
)
def test_contradictions_are_not_saved(tmp_path, name, metadata, message):
    with pytest.raises(ValueError, match=message):
        save_model(trained(), name, tmp_path / "net", **metadata)
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        load_model(saved)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00"])
def test_malformed_json_is_named(saved, content):
    (saved / "model.json").write_bytes(content)
    with pytest.raises(UserError, match=r"model.json is not (valid JSON|UTF-8)"):
        load_model(saved)


@pytest.mark.parametrize("key", ["architecture", "num_classes", "in_channels"])
def test_missing_key_of_the_json_is_named(saved, key):
    edit_json(saved, **{key: None})
    with pytest.raises(UserError, match=f"model.json: key '{key}' is missing"):
        load_model(saved)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("accuracy", "high", "accuracy is 'high'; expected a number, in percent"),
        ("accuracy", True, "accuracy is True; expected a number"),
        ("num_classes", 5.0, "num_classes is 5.0; expected a whole number"),
        ("num_classes", 10**9, "num_classes is 1000000000; expected 1 to 1000000"),
        ("in_channels", 0, "in_channels is 0; expected 1 to"),
        ("architecture", ["resnet8"], "architecture is ['resnet8']; expected a network's name"),
        ("class_names", 5, "class_names is 5; expected a list of names"),
        ("dataset", {}, "dataset is {}; expected a data set's name"),
        ("held_out", "x" * 500, "held_out is [...]; expected a number of images"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_named(saved, key, value, told):
    edit_json(saved, **{key: value})
    with pytest.raises(UserError) as caught:
        load_model(saved)
    assert str(caught.value).startswith(f"{saved / 'model.json'}: {told}")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"num_classes": 1' + "0" * 30 + "}", "[1]", '{"accuracy": NaN}'])
def test_json_without_bounds_is_one_line(saved, text):
    (saved / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.json "):
        load_model(saved)


def test_weights_that_are_not_finite_are_named(saved):
    state = load_file(saved / "model.safetensors")
    state["stages.1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: stages\.1\.0\.conv1\.weight is not finite; the file is "):
        load_model(saved)


def test_unknown_architecture_names_the_file_and_the_nearest(saved):
    edit_json(saved, architecture="resnet9")
    with pytest.raises(UserError, match=r"model.json: unknown network 'resnet9'.*did you mean"):
        load_model(saved)


def test_truncated_weights_are_named(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is not a safetensors file, or is cut off"):
        load_model(saved)


def test_weights_of_another_shape_are_named(saved):
    edit_json(saved, num_classes=6)
    with pytest.raises(UserError, match=r"classifier.weight has shape \(5, 64\), expected \(6, 64\)"):
        load_model(saved)


def test_missing_weight_is_named(saved):
    state = load_file(saved / "model.safetensors")
    del state["bn1.bias"]
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit resnet8 .*bn1.bias is missing"):
        load_model(saved)


def test_unexpected_weight_is_named(saved):
    save_file(load_file(saved / "model.safetensors") | {"fc.bias": torch.zeros(5)}, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"fc.bias is not expected"):
        load_model(saved)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, folder, returned difference) of one export."""
    folder = tmp_path_factory.mktemp("onnx")
    model = trained("shufflenetv1", in_channels=1)
    return model, folder, export_onnx(model, folder, (1, 16, 24))


def test_onnx_agrees_with_torch_at_any_batch_size(exported):
    model, folder, difference = exported
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(7, 1, 16, 24, generator=torch.Generator().manual_seed(1))
    (logits,) = session.run(["logits"], {"images": x.numpy()})
    model.eval()
    np.testing.assert_allclose(logits, model(x).detach().numpy(), atol=1e-4, rtol=0)
    assert 0 <= difference < 1e-4


def test_onnx_is_one_file_with_its_weights(exported):
    assert [path.name for path in exported[1].iterdir()] == ["model.onnx"]


def test_onnx_that_disagrees_is_not_kept(tmp_path, monkeypatch):
    class Wrong:
        def __init__(self, path, providers):
            assert path.read_bytes() == b"onnx"

        def run(self, names, inputs):
            return (np.zeros((len(inputs["images"]), 5), np.float32),)

    monkeypatch.setattr(torch.onnx, "export", lambda model, args, path, **settings: path.write_bytes(b"onnx"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    model = trained()
    with torch.no_grad():
        model.classifier.bias.fill_(3.0)
    with pytest.raises(RuntimeError, match="logits differ from torch's by"):
        export_onnx(model, tmp_path, (3, 16, 16))
    assert list(tmp_path.iterdir()) == []
    assert model.training


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_says_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}, .*pip install onnx onnxscript onnxruntime"):
        export_onnx(trained(), tmp_path, (3, 16, 16))
