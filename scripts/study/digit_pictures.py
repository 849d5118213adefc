"""scikit-learn's 1,797 digits as a folder of PNG files, to try what is made for pictures of one's own.

python scripts/study/digit_pictures.py FOLDER

Writes FOLDER/train/<digit>/ (1,437 files of 8x8 pixels) and FOLDER/val/<digit>/ (360), split as DATASET.NAME digits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.run.errors import Parser, run_cli


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where train/ and val/ are made")
    write(parser.parse_args().folder)


def write(folder: Path) -> None:
    """Write both splits; files that are there already are replaced."""
    from PIL import Image

    from cv.data.digits import read_digits

    train, test, _ = read_digits()
    for split, images in (("train", train), ("val", test)):
        for number, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            path = folder / split / str(label) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(path)


if __name__ == "__main__":
    run_cli(main)
