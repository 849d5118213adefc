"""CIFAR-10 and CIFAR-100 from the official pickles (downloaded where absent) or from hub-style parquet files."""

import json
import re
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.run.errors import UserError
from common.run.lock import alone_in
from common.torchvision_repair import repair_torchvision
from cv.data.decode import decode_images
from cv.data.image_set import ImageSet

if TYPE_CHECKING:
    import pyarrow as pa
    import torchvision


@dataclass(frozen=True)
class CifarVariant:
    """What differs between the two: classes, torchvision's class, label columns by preference, channel constants."""

    name: str
    num_classes: int
    torchvision_class: str
    label_columns: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# The constants of the distillation literature (mdistiller and its successors), kept to the digit for comparability;
# those of the CIFAR-100 training images are within 0.0002 of them.
CIFAR10 = CifarVariant("cifar10", 10, "CIFAR10", ("label",), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = CifarVariant(
    "cifar100", 100, "CIFAR100", ("fine_label", "label"), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
)
Choice = Callable[[Tensor], Tensor]
IMAGE_COLUMNS = ("img", "image")
SIDE = 32


def read_cifar(
    variant: CifarVariant, root: Path, choose: Choice | None = None
) -> tuple[ImageSet, ImageSet, list[str] | None]:
    """Training images, test images and class names; the layout is found by looking.

    choose: of all training labels (N,) the indices of the images to keep (None: all); no others are decoded.

    In this order: the official pickles (`root/cifar-100-python/` or that folder itself as root, or the .tar.gz that
    holds it); parquet files `train-*.parquet` and `test-*.parquet` in root, root/<name>, root/data or root/plain_text;
    neither: torchvision downloads the pickles into root. Pickles are read only after torchvision's checksums agree.
    """
    repair_torchvision()
    from torchvision import datasets

    torchvision_class = getattr(datasets, variant.torchvision_class)
    if root.name == torchvision_class.base_folder:
        root = root.parent
    pickles = root / torchvision_class.base_folder
    if not pickles.is_dir() and not (root / torchvision_class.filename).is_file():
        shards = _find_parquet(variant, root)
        if shards is not None:
            return _read_both_splits(variant, *shards, choose)
    try:
        with alone_in(root):
            train = torchvision_class(root, train=True, download=not pickles.is_dir())
        test = torchvision_class(root, train=False)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
        if pickles.is_dir():
            raise UserError(
                f"{pickles}: a file is absent or its checksum is not the official one; remove the folder to have it "
                f"downloaded again ({error})"
            ) from error
        archive = root / torchvision_class.filename
        if archive.is_file() and not datasets.utils.check_integrity(str(archive), torchvision_class.tgz_md5):
            raise UserError(
                f"{archive}: broken, as its checksum is not the official one ({archive.stat().st_size} bytes are "
                f"there); remove it to have it downloaded, or put the whole file in its place ({error})"
            ) from error
        raise UserError(
            f"{variant.name}: not found and not downloadable ({error}); fill {root} with {pickles.name}/ (the official "
            f"pickles), {torchvision_class.filename}, or train-*.parquet and test-*.parquet"
        ) from error
    images = _from_torchvision(train, variant)
    images = images.take(choose(images.labels)) if choose else images
    return images, _from_torchvision(test, variant), list(train.classes)


def _from_torchvision(dataset: "torchvision.datasets.CIFAR10", variant: CifarVariant) -> ImageSet:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(dataset.targets), variant.num_classes)


def _find_parquet(variant: CifarVariant, root: Path) -> tuple[list[Path], list[Path]] | None:
    for folder in (root, root / variant.name, root / "data", root / "plain_text"):
        train, test = (sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", "test"))
        if train and test:
            return train, test
        if train or test:
            raise UserError(f"{folder}: no {'test' if train else 'train'}-*.parquet beside the other split")
    return None


def _read_both_splits(
    variant: CifarVariant, train_files: list[Path], test_files: list[Path], choose: Choice | None
) -> tuple[ImageSet, ImageSet, list[str] | None]:
    def checked(labels: Tensor) -> Tensor:
        absent = torch.bincount(labels, minlength=variant.num_classes).eq(0).nonzero().flatten().tolist()
        if absent:
            raise UserError(
                f"{train_files[0].parent}: {variant.name} needs training images of every class; none of {absent}"
            )
        return choose(labels) if choose else torch.arange(len(labels))

    train, classes = read_parquet(variant, train_files, checked)
    test, _ = read_parquet(variant, test_files)
    return train, test, classes


def read_parquet(
    variant: CifarVariant, files: list[Path], choose: Choice | None = None
) -> tuple[ImageSet, list[str] | None]:
    """One split from its parquet shards: image bytes in `img` or `image`, integer labels; class names if recorded.

    choose: as of `read_cifar`.

    A missing shard, column or label, a label out of range, an unreadable image: `UserError` with file and row.
    """
    _check_shards(files)
    encoded: list[bytes] = []
    labels: list[int] = []
    places: list[tuple[Path, int]] = []
    classes = None
    for file in files:
        shard_images, shard_labels, classes = _read_shard(variant, file)
        encoded += shard_images
        labels += shard_labels
        places += [(file, row) for row in range(len(shard_labels))]
    if not labels:
        raise UserError(f"{files[0]}: no rows")

    def describe(index: int) -> str:
        return f"{places[index][0]}, row {places[index][1]}"

    for index, label in enumerate(labels):
        if label is None or not 0 <= label < variant.num_classes:
            raise UserError(f"{describe(index)}: label {label} is not in 0..{variant.num_classes - 1}")
        if encoded[index] is None:
            raise UserError(f"{describe(index)}: the row has no image bytes")
    if choose:
        kept = choose(torch.tensor(labels)).tolist()
        encoded, labels, places = ([column[index] for index in kept] for column in (encoded, labels, places))
    images = decode_images(encoded, describe)
    if images.shape[2:] != (SIDE, SIDE):
        raise UserError(f"{files[0]}: images of {images.shape[3]}x{images.shape[2]} pixels; CIFAR has {SIDE}x{SIDE}")
    return ImageSet(images, torch.tensor(labels), variant.num_classes), classes


def _check_shards(files: list[Path]) -> None:
    for file in files:
        numbered = re.search(r"-of-(\d+)\.parquet$", file.name)
        if numbered and int(numbered[1]) != len(files):
            raise UserError(
                f"{file}: one of {int(numbered[1])} files by its name, but there are {len(files)} beside it"
            )


def _read_shard(variant: CifarVariant, file: Path) -> tuple[list[bytes | None], list[int | None], list[str] | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        image_column = _pick(file, schema.names, IMAGE_COLUMNS, "image")
        label_column = _pick(file, schema.names, variant.label_columns, "label")
        table = pq.read_table(file, columns=[image_column, label_column])
    except UserError:
        raise
    except Exception as error:  # of damaged bytes Arrow raises whatever they lead to
        raise UserError(f"{file}: not a readable parquet file ({error})") from error
    images, kind = table[image_column], schema.field(image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks], kind.field("bytes").type)
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise UserError(f"{file}: column {image_column} is {kind}; it must hold encoded images as bytes")
    if not pa.types.is_integer(table[label_column].type):
        raise UserError(f"{file}: column {label_column} is {table[label_column].type}; it must be an integer")
    return images.to_pylist(), table[label_column].to_pylist(), _class_names(variant, file, schema, label_column)


def _pick(file: Path, columns: list[str], wanted: tuple[str, ...], what: str) -> str:
    for column in wanted:
        if column in columns:
            return column
    raise UserError(f"{file}: no {what} column {' or '.join(wanted)}; the file has {', '.join(columns)}")


def _class_names(variant: CifarVariant, file: Path, schema: "pa.Schema", label_column: str) -> list[str] | None:
    """As the `datasets` library records them; a record of another form is passed over, as names are not needed."""
    names = None
    with suppress(ValueError, AttributeError, RecursionError):
        recorded = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = recorded.get("info", {}).get("features", {}).get(label_column, {}).get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if len(names) != variant.num_classes:
        raise UserError(f"{file}: {label_column} has {len(names)} classes; {variant.name} has {variant.num_classes}")
    return names
