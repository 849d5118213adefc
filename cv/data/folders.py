"""Images in one folder per class: the ImageNet layout and the layout of Tiny-ImageNet."""

from pathlib import Path

import torch

from common.run.errors import UserError
from common.torchvision_repair import repair_torchvision
from cv.data.decode import decode_images
from cv.data.image_set import ImageSet


def read_folder(root: Path, image_size: int | None) -> tuple[ImageSet, ImageSet, list[str]]:
    """root/train/<class>/ and root/val/<class>/ (or, without val, root/test/<class>/); classes in sorted order.

    image_size: see `decode_images`. A missing split, a class folder without images, a test class that train lacks and
    an unreadable file are `UserError`s.
    """
    train_files, train_classes = _list_images(root / "train")
    held_out = root / "val" if (root / "val").is_dir() else root / "test"
    test_files, test_classes = _list_images(held_out)
    unknown = sorted(set(test_classes) - set(train_classes))
    if unknown:
        raise UserError(f"{held_out / unknown[0]}: {root / 'train'} has no class of that name")
    train = _decode(train_files, train_classes, image_size)
    return train, _decode(test_files, train_classes, image_size), train_classes


def read_tiny_imagenet(root: Path, image_size: int | None) -> tuple[ImageSet, ImageSet, list[str]]:
    """tiny-imagenet-200: train/<wnid>/images/*.JPEG, val/images/ with val/val_annotations.txt; classes are the wnids.

    root: that folder or the one that holds it. The validation images are the test set, as the official test set has no
    labels. Errors as in `read_folder`; a bad line of the annotations is named by file and number.
    """
    if (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    train_files, classes = _list_images(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(f"{annotations}: not found; it gives file name and class of every image in val/images")
    test_files = []
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise UserError(f"{annotations}, line {number}: expected a file name, a tab and a class")
        if fields[1] not in classes:
            raise UserError(f"{annotations}, line {number}: {root / 'train'} has no class {fields[1]}")
        test_files.append((root / "val" / "images" / fields[0], fields[1]))
    if not test_files:
        raise UserError(f"{annotations}: no lines")
    return _decode(train_files, classes, image_size), _decode(test_files, classes, image_size), classes


def _list_images(folder: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """All (file, class) below the class folders of `folder`, sorted, and the class names."""
    repair_torchvision()
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise UserError(f"{folder}: not found; it must hold one folder of images per class")
    try:
        listing = ImageFolder(folder)
    except FileNotFoundError as error:  # no class folder, or one without images: the message names it
        raise UserError(f"{folder}: {error}") from error
    return [(Path(file), listing.classes[label]) for file, label in listing.samples], listing.classes


def _decode(files: list[tuple[Path, str]], classes: list[str], image_size: int | None) -> ImageSet:
    label_of = {name: label for label, name in enumerate(classes)}
    images = decode_images([file for file, _ in files], lambda index: str(files[index][0]), image_size)
    return ImageSet(images, torch.tensor([label_of[name] for _, name in files]), len(classes))
