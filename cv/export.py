"""A trained network as files that need no pickle: safetensors with a JSON description, and ONNX."""

import copy
import importlib.util
import json
import math
import shlex
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from common.run.errors import UserError
from common.run.files import write_aside, write_text
from common.run.reading import read_json, read_safetensors
from cv.models import Network, build_model

NEEDED = ("architecture", "num_classes", "in_channels")
DESCRIBED = (  # keys that are read: type, in words
    ("architecture", str, "a network's name"),
    ("num_classes", int, "a whole number"),
    ("in_channels", int, "a whole number"),
    ("accuracy", (int, float), "a number, in percent"),
    ("held_out", int, "a number of images"),
    ("dataset", str, "a data set's name"),
    ("class_names", list, "a list of names"),
    ("mean", list, "a number per channel"),
    ("std", list, "a number per channel"),
)
LARGEST = 10**6  # of num_classes and in_channels
PICKLED = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".pkl")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TOLERANCE = 1e-4


def save_model(model: Network, name: str, folder: str | Path, **metadata: Any) -> None:
    """Write `folder`/model.safetensors and `folder`/model.json; each file is complete or not there.

    name: the network's name in `cv.models.MODELS`. metadata: what else belongs into the JSON, as plain values, arrays
    or tensors; the customary keys are image_size (pixels; [height, width] if they differ), mean and std (per channel,
    of images in [0, 1]), class_names and accuracy (percent). num_classes and in_channels are read from the model.
    Raises ValueError if the model is not the network `name`, or if metadata contradicts it.
    """
    state = model.state_dict()
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    facts = {"architecture": name, "num_classes": model.classifier.out_features, "in_channels": stem.in_channels}
    if difference := _difference(_expected_shapes(facts), {key: value.shape for key, value in state.items()}):
        raise ValueError(f"the model is not a {name}: {difference}")
    for key, length in (("mean", "in_channels"), ("std", "in_channels"), ("class_names", "num_classes")):
        if metadata.get(key) is not None and len(metadata[key]) != facts[length]:
            raise ValueError(f"{key} has {len(metadata[key])} entries, but {length} is {facts[length]}")
    for key in NEEDED:
        if key in metadata and metadata[key] != facts[key]:
            raise ValueError(f"{key} is {facts[key]!r} in the model, but {metadata[key]!r} was given")
    description = json.dumps(facts | metadata, indent=2, ensure_ascii=False, default=lambda value: value.tolist())
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    folder = Path(folder)
    write_aside(folder / "model.safetensors", lambda path: path.write_bytes(save(tensors, {"format": "pt"})))
    write_text(folder / "model.json", description + "\n")


def load_model(path: str | Path) -> tuple[Network, dict[str, Any]]:
    """Read what `save_model` wrote: the network in eval mode on the CPU, and everything that its JSON says.

    path: the folder, or a JSON file whose weights lie beside it under the same name with the suffix .safetensors.
    Raises UserError for missing or broken files, an unknown architecture and weights that do not fit it.
    """
    path = Path(path)
    description = path / "model.json" if path.is_dir() else path
    weights = description.with_suffix(".safetensors")
    _refuse_pickles(path, description)
    for file in (description, weights):
        if not file.is_file():
            raise UserError(f"{file}: no such file; a saved network is a model.json with a model.safetensors beside it")
    info = _read_description(description)
    state = read_safetensors(weights)
    try:
        expected = _expected_shapes(info)
    except UserError as error:
        raise UserError(f"{description}: {error}") from None
    if difference := _difference(expected, {key: value.shape for key, value in state.items()}):
        raise UserError(f"{weights}: does not fit {info['architecture']} in {description}: {difference}")
    if broken := next((key for key, value in state.items() if not value.isfinite().all()), None):
        raise UserError(f"{weights}: {broken} is not finite; the file is damaged, or of a training that diverged")
    model = build_model(*(info[key] for key in NEEDED))
    model.load_state_dict(state)
    return model.eval(), info


def _refuse_pickles(path: Path, description: Path) -> None:
    pickles = [path] if path.is_file() and path.suffix != ".json" else []
    if path.is_dir() and not description.exists():
        pickles = sorted(each for each in path.iterdir() if each.suffix in PICKLED)
    if pickles:
        raise UserError(
            f"{pickles[0]} is not read: a teacher is a folder with model.json and model.safetensors; a pickled "
            f"checkpoint becomes one by `python -m cv.convert_teacher {shlex.quote(str(pickles[0]))} --architecture "
            "NAME`"
        )


def _read_description(file: Path) -> dict[str, Any]:
    info = read_json(file)
    for key in NEEDED:
        if key not in info:
            raise UserError(f"{file}: key {key!r} is missing; needed are {', '.join(NEEDED)}")
    for key, kind, expected in DESCRIBED:
        if info.get(key) is not None and (not isinstance(info[key], kind) or isinstance(info[key], bool)):
            raise UserError(f"{file}: {key} is {shorten(repr(info[key]), 80)}; expected {expected}")
    for key in ("num_classes", "in_channels"):
        if not 1 <= info[key] <= LARGEST:
            raise UserError(f"{file}: {key} is {info[key]}; expected 1 to {LARGEST}")
    for key, least in (("mean", -math.inf), ("std", 0)):
        values = info.get(key)
        if values is not None and not (
            len(values) == info["in_channels"] and all(_is_number(value) and value > least for value in values)
        ):
            raise UserError(
                f"{file}: {key} is {shorten(repr(values), 80)}; expected {info['in_channels']} finite numbers"
                + (" above 0" if key == "std" else "")
            )
    return info


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_onnx_packages() -> None:
    """Raises UserError if one that `export_onnx` needs is missing."""
    if missing := [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]:
        install = f"pip install {' '.join(ONNX_PACKAGES)}"
        raise UserError(f"exporting to ONNX needs {', '.join(missing)}, which cannot be imported; {install}")


def export_onnx(model: nn.Module, folder: str | Path, image_shape: tuple[int, int, int]) -> float:
    """Write `folder`/model.onnx and return how far its logits are from torch's (largest absolute difference).

    Input "images": (batch, *image_shape), float32, normalised as in training, image_shape being (channels, height,
    width); output "logits": (batch, num_classes); any batch size. The model is exported in eval mode on the CPU and
    left as it was.
    Raises UserError if a package is missing, RuntimeError (and writes nothing) if ONNX Runtime differs by 1e-4 or more.
    """
    check_onnx_packages()
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, *image_shape, generator=generator)
    difference = 0.0

    def write(path: Path) -> None:
        nonlocal difference
        torch.onnx.export(
            model,
            (images[:2],),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        difference = _onnx_difference(model, path, images)
        if not difference < ONNX_TOLERANCE:  # also true for NaN
            raise RuntimeError(
                f"ONNX Runtime's logits differ from torch's by {difference:.2e}, {ONNX_TOLERANCE} or more"
            )

    write_aside(Path(folder) / "model.onnx", write)
    return difference


@torch.no_grad()
def _onnx_difference(model: nn.Module, path: Path, images: torch.Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = 0.0
    for batch in (images[:1], images):  # neither is the batch size that was traced
        (logits,) = session.run(None, {"images": batch.numpy()})
        difference = max(difference, (torch.from_numpy(logits) - model(batch)).abs().max().item())
    return difference


def _expected_shapes(facts: dict[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of the state of the network that `facts` describe."""
    return _shapes(*(facts[key] for key in NEEDED))


@cache
def _shapes(*network: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):  # nothing is allocated
        return {key: value.shape for key, value in build_model(*network).state_dict().items()}


def _difference(expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> str:
    """The first disagreement between two states in words; empty if there is none."""
    for key, shape in expected.items():
        if key not in found:
            return f"{key} is missing"
        if found[key] != shape:
            return f"{key} has shape {tuple(found[key])}, expected {tuple(shape)}"
    unexpected = [key for key in found if key not in expected]
    return f"{unexpected[0]} is not expected" if unexpected else ""
