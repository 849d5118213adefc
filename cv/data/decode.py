"""Encoded images (files or bytes) to one uint8 tensor."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.run.errors import UserError

CHUNK = 64
# Pillow decodes outside the interpreter lock, but opens and converts under it: measured on two cores, threads double
# the rate of 500x375 JPEGs and cost a third of the rate of 32x32 PNGs.
THREADED_PIXELS = 128 * 128
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for broken bytes


def decode_images(sources: Sequence[Path | bytes], describe: Callable[[int], str], size: int | None = None) -> Tensor:
    """Decode to uint8 (N, 3, H, W); grey images are replicated to three channels, transparency is dropped.

    size: every image is cut to its central square and resized (bilinear, antialiased) to size x size; None: all must
    have one size already. describe(i) names source i in the `UserError` for an unreadable or differing image.
    """

    def read(index: int) -> tuple[np.ndarray, int]:
        source = sources[index]
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                pixels = image.width * image.height
                image = image.convert("RGB")
        except UNREADABLE as error:
            raise UserError(f"{describe(index)}: not a readable image ({error})") from error
        if size is not None:
            image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1), pixels

    first, pixels = read(0)
    images = np.empty((len(sources), *first.shape), dtype=np.uint8)

    def decode_chunk(start: int) -> None:
        for index in range(start, min(start + CHUNK, len(sources))):
            image, _ = read(index)
            if image.shape != first.shape:
                raise UserError(
                    f"{describe(index)}: {image.shape[2]}x{image.shape[1]} pixels, but {describe(0)} has "
                    f"{first.shape[2]}x{first.shape[1]}; set DATASET.IMAGE_SIZE to bring all to one"
                )
            images[index] = image

    starts = range(0, len(sources), CHUNK)
    if pixels < THREADED_PIXELS:
        for start in starts:
            decode_chunk(start)
    else:
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(decode_chunk, starts):
                pass
    return torch.from_numpy(images)
