"""A pickled PyTorch checkpoint (.pth, .pt, .tar) as the model.safetensors and model.json that this project reads.

    python -m cv.convert_teacher FILE.pth --architecture resnet56 [--out FOLDER] [--dataset cifar100] [--rename OLD=NEW]

The file is read by torch.load(weights_only=True): tensors in plain containers, no other objects. Its weights are those
of the file itself or of its entry model, state_dict or net. Names are taken as they are or, of the ResNets of
mdistiller and RepDistiller, changed to the names used here (layer1 -> stages.0, downsample -> shortcut, fc ->
classifier); --rename replaces a further part of every name. Of timm/<name> and torchvision/<name> the names are the
library's, and the mean and std of its published weights are noted. Then every name and shape must be the network's.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.run.errors import Parser, UserError, run_cli

_ENTRIES = ("model", "state_dict", "net")
_COUNTER = ".num_batches_tracked"  # older files lack it, and nothing here reads it


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="the pickled checkpoint")
    parser.add_argument("--architecture", required=True, help="the network's name, as in DISTILLER.TEACHER")
    parser.add_argument("--out", type=Path, help="folder that is written (default: FILE without its ending)")
    parser.add_argument("--dataset", help="the data set that it was trained on, as in DATASET.NAME")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="may be given several times")
    args = parser.parse_args()
    out = args.out or args.file.with_suffix("")
    convert(args.file, args.architecture, out, args.rename, **({"dataset": args.dataset} if args.dataset else {}))
    print(f"{out}: a {args.architecture}; give it as DISTILLER.TEACHER_CKPT")


def convert(file: Path, architecture: str, out: Path, renames: list[str], **metadata: Any) -> None:
    """Write the network of a pickled checkpoint to the folder `out` (cv/export.py).

    Raises:
        UserError: the file is missing, holds more than tensors, or is not the network's; the first difference is named.
    """
    import torch

    from cv.export import save_model
    from cv.models import build_model, is_library
    from cv.models.pretrained import AUXILIARY, published_normalisation

    if (out / "model.json").exists():
        raise UserError(f"{out} holds a saved network already; give another folder as --out")
    library = is_library(architecture)
    weights = {_renamed(name, renames, library): value for name, value in _read(file).items()}
    if library:
        weights = {
            name: value for name, value in weights.items() if not name.removeprefix("net.").startswith(AUXILIARY)
        }
    of_head = f"net.{build_model(architecture, 1).classifier_name}.weight" if library else "classifier.weight"
    head = weights.get(of_head)
    if head is None or head.dim() != 2:
        names = ", ".join(name.removeprefix("net.") for name in list(weights)[:5])
        raise UserError(f"{file}: no {of_head.removeprefix('net.')}; its names are {names} ... (see --rename)")
    stem = next((value for value in weights.values() if value.dim() == 4), None)
    if stem is None:
        raise UserError(f"{file}: no convolution in it")
    model = build_model(architecture, len(head), stem.shape[1])
    expected = model.state_dict()
    for name, value in expected.items():
        if name.endswith(_COUNTER):
            weights.setdefault(name, torch.zeros_like(value))
    for name in [*expected, *weights]:
        ours, theirs = (tuple(each[name].shape) if name in each else "absent" for each in (expected, weights))
        if ours != theirs:
            raise UserError(f"{file} is not a {architecture}: {name} is {theirs} in it and {ours} in the network")
        if not weights[name].isfinite().all():
            raise UserError(f"{file}: {name} is not finite")
    model.load_state_dict(weights)
    if library:
        metadata |= published_normalisation(architecture)._asdict()
    save_model(model, architecture, out, **metadata)


def _read(file: Path) -> dict:
    import torch

    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of a file that is no checkpoint torch raises whatever its bytes lead to
        reason = "it holds objects other than tensors" if "weights_only" in str(error).lower() else "it is damaged"
        raise UserError(
            f"{file} is not read: {reason}; save the state_dict() of the network alone, by torch.save"
        ) from error
    for entry in _ENTRIES:
        if isinstance(found, dict) and isinstance(found.get(entry), dict):
            found = found[entry]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise UserError(f"{file}: no weights in it; expected a state_dict, by itself or as {' or '.join(_ENTRIES)}")
    return {str(name): value for name, value in found.items()}


def _renamed(name: str, renames: list[str], library: bool) -> str:
    for each in renames:
        old, equals, new = each.partition("=")
        if not old or not equals:
            raise UserError(f"--rename {each}: expected OLD=NEW")
        name = name.replace(old, new)
    name = name.removeprefix("module.")  # of DataParallel
    if library:
        return f"net.{name}"
    name = re.sub(r"^layer(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.", name)
    return re.sub(r"^(fc|linear)\.", "classifier.", name.replace(".downsample.", ".shortcut."))


if __name__ == "__main__":
    run_cli(main)
