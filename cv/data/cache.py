"""Decoded images in a file, for sets that are larger than memory: it is mapped, so that what is looked at is read.

A file holds the bytes of a uint8 (N, 3, H, W) array, then their CRC-32. Its name is a hash of the image files' names,
sizes and times and of the images' shape: where one of these changes, another file is made. Nothing removes a file.
"""

import hashlib
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from common.run.disk import in_bytes
from common.run.errors import UserError
from common.run.files import check_writable, remove_leftovers, write_aside
from common.run.lock import alone_in
from cv.data.decode import Decoder

DECODED = "decoded_images"  # beside the output folder
_RULES = 1  # of decode.py; another number where images are read otherwise
_BLOCK = 2**24
_CRC_BYTES = 4


def cached(folder: Path, files: Sequence[Path], decoder: Decoder) -> tuple[Tensor, str]:
    """Images (N, 3, H, W) of `files`, which `decoder` reads, as a mapped file in `folder`; and a line for the user.

    A file that is not there or is damaged is made; another process that makes it is waited for.

    Raises:
        UserError: an unreadable image, or too little room on the disk.
    """
    shape = (len(files), *decoder.shape)
    path = folder / f"{_name(files, decoder)}.uint8"
    check_writable("OUTPUT_DIR", folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder) as alone:
        if alone:
            remove_leftovers(folder)
        if _is_whole(path, shape):
            done = "were decoded before into"
        else:
            _check_room(path, shape)
            write_aside(path, lambda aside: _write(aside, decoder))
            done = "are decoded into"
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch's, that the memory cannot be written to: Linux refuses more than there is
        images = torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))
    size = in_bytes(path.stat().st_size)
    return images, f"{len(files)} images are larger than memory and {done} {path} ({size}), which you may remove later"


def _name(files: Sequence[Path], decoder: Decoder) -> str:
    digest = hashlib.sha256(f"{_RULES} {decoder.shape} {decoder.size}\n".encode())
    for file in files:
        try:
            about = file.stat()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        digest.update(os.fsencode(file.absolute()) + f"\0{about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _write(path: Path, decoder: Decoder) -> None:
    """Written, not mapped: a full disk is an error then, where it would end the program."""
    crc = 0
    with path.open("wb") as file:
        for chunk in decoder.chunks():
            data = np.ascontiguousarray(chunk).data
            crc = zlib.crc32(data, crc)
            file.write(data)
        file.write(crc.to_bytes(_CRC_BYTES, "big"))


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    size = int(np.prod(shape, dtype=np.int64))
    if not path.is_file() or path.stat().st_size != size + _CRC_BYTES:
        return False
    crc = 0
    with path.open("rb") as file:
        for block in _blocks(file, size):
            crc = zlib.crc32(block, crc)
        return file.read() == crc.to_bytes(_CRC_BYTES, "big")


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    for start in range(0, size, _BLOCK):
        yield file.read(min(_BLOCK, size - start))


def _check_room(path: Path, shape: tuple[int, ...]) -> None:
    needed, free = int(np.prod(shape, dtype=object)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{shape[0]} images of {shape[3]}x{shape[2]} pixels are larger than memory, and {path.parent}, where they "
            f"would be kept decoded, has {in_bytes(free)} free of the {in_bytes(needed)} that they take; set a smaller "
            "DATASET.IMAGE_SIZE, or an OUTPUT_DIR on a larger disk"
        )
