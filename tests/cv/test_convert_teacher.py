"""A pickled teacher becomes one that is read; nothing but tensors is loaded, and what does not fit is named."""

import pickle
import re

import pytest
import torch

from common.run.errors import UserError
from cv.convert_teacher import convert
from cv.export import load_model
from cv.models import build_model


def as_published(state: dict) -> dict:
    """The names that mdistiller and RepDistiller give to a ResNet, without the newer counters."""
    found = {}
    for name, value in state.items():
        name = re.sub(r"^stages\.(\d)", lambda match: f"layer{int(match[1]) + 1}", name)
        name = name.replace("shortcut", "downsample").replace("classifier", "fc")
        if not name.endswith("num_batches_tracked"):
            found[name] = value
    return found


def network():
    torch.manual_seed(3)
    return build_model("resnet8", 7).eval()


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        convert(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("wrap", [dict, lambda state: {"model": state, "epoch": 240}], ids=["alone", "entry"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_checkpoint_gives_the_same_logits(tmp_path, wrap, prefix):
    model = network()
    published = {prefix + name: value for name, value in as_published(model.state_dict()).items()}
    torch.save(wrap(published), tmp_path / "res8.pth")
    convert(tmp_path / "res8.pth", "resnet8", tmp_path / "out", [], dataset="cifar100")
    loaded, info = load_model(tmp_path / "out")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert (info["num_classes"], info["dataset"]) == (7, "cifar100")


def test_names_can_be_replaced(tmp_path):
    state = {name.replace("classifier", "head"): value for name, value in network().state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    assert "no classifier.weight" in refusal(tmp_path / "x.pt", "resnet8", tmp_path / "out", [])
    convert(tmp_path / "x.pt", "resnet8", tmp_path / "out", ["head=classifier"])
    assert "saved network already" in refusal(tmp_path / "x.pt", "resnet8", tmp_path / "out", ["head=classifier"])


def test_another_network_is_refused_with_the_first_difference(tmp_path):
    torch.save(network().state_dict(), tmp_path / "x.pth")
    message = refusal(tmp_path / "x.pth", "resnet14", tmp_path / "out", [])
    assert message.endswith(
        "is not a resnet14: stages.0.1.conv1.weight is absent in it and (16, 16, 3, 3) in the network"
    )
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/dskd-evil", "w"))


@pytest.mark.parametrize("content", [{"model": Evil()}, {"net": 3}, {}, b"junk"])
def test_what_holds_no_weights_alone_is_refused(tmp_path, content):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif "model" in content:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert refusal(path, "resnet8", tmp_path / "out", []).startswith(str(path))
    assert not (tmp_path / "out").exists()


def test_a_pickled_teacher_is_told_how_to_convert_it(tmp_path):
    torch.save(network().state_dict(), tmp_path / "res8.pth")
    for given in (tmp_path, tmp_path / "res8.pth"):
        with pytest.raises(UserError) as caught:
            load_model(given)
        assert str(caught.value).startswith(f"{tmp_path / 'res8.pth'} is not read: a teacher is a folder with")
        assert f"python -m cv.convert_teacher {tmp_path / 'res8.pth'} --architecture NAME" in str(caught.value)
