"""Images in one folder per class: the ImageNet layout and the layout of Tiny-ImageNet.

Read are the files whose ending is that of an image, at any depth below the class folder. Names that begin with a dot,
files and folders (.ipynb_checkpoints, ._001.jpg), are skipped; files with another ending are left out and counted, and
so are images that this Pillow cannot read (.heic, in older ones .avif).
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from common.run.errors import UserError
from cv.data.cache import cached
from cv.data.decode import Decoder, decode_images
from cv.data.image_set import ImageSet
from cv.data.memory import fits

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
ENDINGS_OF_SOME = (".avif", ".heic", ".heif")  # Pillow reads them where it was built or extended so
SHOWN = 5  # names in a note
Listing = list[tuple[Path, str]]


def read_folder(
    root: Path, image_size: int | None, cache: Path | None = None
) -> tuple[ImageSet, ImageSet, list[str], list[str]]:
    """root/train/<class>/ and root/val/<class>/ (or, without val, root/test/<class>/); classes in sorted order.

    image_size: see `decode_images`. cache: folder for decoded images that are larger than memory (cv/data/cache.py);
    None: they are refused. A missing split, a class of train without images, a test class that train lacks
    and an unreadable file are `UserError`s. The last of the result are notes: what was left out or followed, and the
    classes without test images.
    """
    train_files, classes, notes = _list_images(root / "train")
    held_out = root / "val" if (root / "val").is_dir() else root / "test"
    test_files, test_classes, of_test = _list_images(held_out, empty=True)
    unknown = sorted(set(test_classes) - set(classes))
    if unknown:
        raise UserError(f"{held_out / unknown[0]}: {root / 'train'} has no class of that name")
    seen = {name for _, name in test_files}
    if missing := [name for name in classes if name not in seen]:
        of_test.append(f"{held_out}: no image of {len(missing)} of {len(classes)} classes: {_some(missing)}")
    notes += of_test
    train = _decode(train_files, classes, image_size, cache, notes)
    return train, _decode(test_files, classes, image_size, cache, notes), classes, notes


def read_tiny_imagenet(
    root: Path, image_size: int | None, cache: Path | None = None
) -> tuple[ImageSet, ImageSet, list[str], list[str]]:
    """tiny-imagenet-200: train/<wnid>/images/*.JPEG, val/images/ with val/val_annotations.txt; classes are the wnids.

    root: that folder or the one that holds it. The validation images are the test set, as the official test set has no
    labels. cache, errors and notes as in `read_folder`; a bad line of the annotations is named by file and number.
    """
    if (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    train_files, classes, notes = _list_images(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(f"{annotations}: not found; it gives file name and class of every image in val/images")
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f"{annotations} cannot be read: {error}") from error
    test_files = []
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise UserError(f"{annotations}, line {number}: expected a file name, a tab and a class")
        if fields[1] not in classes:
            raise UserError(f"{annotations}, line {number}: {root / 'train'} has no class {fields[1]}")
        test_files.append((root / "val" / "images" / fields[0], fields[1]))
    if not test_files:
        raise UserError(f"{annotations}: no lines")
    train = _decode(train_files, classes, image_size, cache, notes)
    return train, _decode(test_files, classes, image_size, cache, notes), classes, notes


@dataclass
class _Found:
    """What a walk through the folders of a split found."""

    files: Listing = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # of files by ending
    followed: list[Path] = field(default_factory=list)  # links to folders
    loops: list[Path] = field(default_factory=list)  # links that lead to a folder that is read already

    def notes(self, folder: Path) -> list[str]:
        notes = []
        if self.left_out:
            by_ending = ", ".join(f"{ending} {count}" for ending, count in self.left_out.most_common())
            notes.append(f"{folder}: {self.left_out.total()} files left out, no images that are read here: {by_ending}")
        if self.followed:
            notes.append(f"{folder}: {len(self.followed)} links to folders followed: {_some(self.followed)}")
        if self.loops:
            notes.append(
                f"{folder}: {len(self.loops)} links not followed, as they lead to a folder that is read already: "
                f"{_some(self.loops)}"
            )
        return notes


def _list_images(folder: Path, *, empty: bool = False) -> tuple[Listing, list[str], list[str]]:
    """All (file, class) below the class folders of `folder`, sorted, the class names, and notes.

    empty: whether a class may have no images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; it must hold one folder of images per class")
    classes = sorted(entry.name for entry in _entries(folder) if entry.is_dir())
    if not classes:
        raise UserError(f"{folder}: no folder in it; it must hold one folder of images per class")
    endings, found, without = _endings(), _Found(), []
    for name in classes:
        before, left_out = len(found.files), found.left_out.copy()
        _walk(folder / name, name, endings, found)
        if len(found.files) == before:
            others = ", ".join(f"{ending} {count}" for ending, count in (found.left_out - left_out).items())
            without.append(name + (f" (left out there: {others})" if others else ""))
    if not found.files or (without and not empty):
        raise UserError(f"{folder}: no image in class {_some(without)}; images end in {', '.join(endings)}")
    return found.files, classes, found.notes(folder)


def _walk(top: Path, label: str, endings: tuple[str, ...], found: _Found) -> None:
    """Add what lies below a class folder, in the order of torchvision's ImageFolder: by folder, then by name."""
    real_top = Path(os.path.realpath(top))
    read, files, waiting = {real_top, *real_top.parents}, [], [str(top)]
    while waiting:
        folder = waiting.pop()
        for entry in _entries(folder):
            if entry.is_dir():
                real = Path(os.path.realpath(entry.path))
                if real in read:
                    found.loops.append(Path(entry.path))
                    continue
                read.add(real)
                if entry.is_symlink():
                    found.followed.append(Path(entry.path))
                waiting.append(entry.path)
            elif entry.is_file() and entry.name.lower().endswith(endings):
                files.append((folder, entry.name))
            else:
                kind = os.path.splitext(entry.name)[1].lower() or "(no ending)"
                found.left_out[kind if entry.is_file() else "(broken link)"] += 1
    found.files += [(Path(folder, name), label) for folder, name in sorted(files)]


def _entries(folder: Path | str) -> list[os.DirEntry]:
    """What is in a folder, sorted, without names that begin with a dot."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read: {error.strerror}") from error


def _endings() -> tuple[str, ...]:
    formats = Image.registered_extensions()
    return ENDINGS + tuple(ending for ending in ENDINGS_OF_SOME if formats.get(ending) in Image.OPEN)


def _some(names: list) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (" ..." if len(names) > SHOWN else "")


def _decode(
    files: Listing, classes: list[str], image_size: int | None, cache: Path | None, notes: list[str]
) -> ImageSet:
    label_of = {name: label for label, name in enumerate(classes)}
    labels, paths = torch.tensor([label_of[name] for _, name in files]), [file for file, _ in files]

    def describe(index: int) -> str:
        return str(paths[index])

    if cache is not None:
        decoder = Decoder(paths, describe, image_size)
        if not fits(len(files), *decoder.shape[1:]):
            images, note = cached(cache, paths, decoder)
            notes.append(note)
            return ImageSet(images, labels, len(classes), torch.arange(len(files)))
    return ImageSet(decode_images(paths, describe, image_size), labels, len(classes))
