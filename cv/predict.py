"""What a trained student sees in image files: for each the class and its probability.

python cv/predict.py outputs/RUN/student IMAGE [IMAGE ...]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.run.errors import Parser, UserError, run_cli


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("student", type=Path, metavar="FOLDER", help="folder with model.json and model.safetensors")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, of any size")
    args = parser.parse_args()
    from common.torchvision_repair import repair_torchvision

    repair_torchvision()
    for file, (name, probability) in zip(args.images, predict(args.student, args.images), strict=True):
        print(f"{file}: {name} ({probability:.3f})")


def predict(student: Path, files: list[Path]) -> list[tuple[str, float]]:
    """(class, its probability) of every image, read and resized as in training.

    Raises:
        UserError: no saved student there, one that does not say how its images were prepared, or an unreadable image.
    """
    import torch

    from cv.data.augment import normalize
    from cv.data.decode import decode_images
    from cv.export import load_model

    model, info = load_model(student)
    for key in ("image_size", "mean", "std"):
        if info.get(key) is None:
            raise UserError(f"{student / 'model.json'}: key {key!r} is missing; it says how images are prepared")
    size = info["image_size"]
    if not isinstance(size, int):
        raise UserError(f"{student / 'model.json'}: images of {size} pixels; only square ones are read here")
    names = info.get("class_names") or [str(number) for number in range(info["num_classes"])]
    images = decode_images(files, lambda index: str(files[index]), size)
    if info["in_channels"] == 1:
        images = images.float().mean(1, keepdim=True).round().to(torch.uint8)
    with torch.inference_mode():
        logits = [model(normalize(each[None], info["mean"], info["std"]))[0] for each in images]
    found = [each.softmax(0).max(0) for each in logits]
    return [(names[place], value) for value, place in ((each.values.item(), each.indices.item()) for each in found)]


if __name__ == "__main__":
    run_cli(main)
