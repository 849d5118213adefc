"""Encoded images (files or bytes) to one uint8 tensor of RGB images; one rule for every kind of pixel.

| image                              | what becomes of it                                                          |
| ---------------------------------- | --------------------------------------------------------------------------- |
| EXIF orientation                   | turned and mirrored as it says; without effect where it cannot be read      |
| transparency (RGBA, LA, palette or | composited on white: what a viewer shows of a glyph on nothing              |
|   one colour named transparent)    |                                                                             |
| 16-bit grey (I;16, also as I)      | 0...65535 scaled to 0...255, rounded; in mode I other values are refused    |
| floating point (F)                 | refused: its range is not known                                             |
| 16-bit colour                      | the upper 8 bits of each channel, as Pillow reads it                        |
| grey (L)                           | the value in all three channels                                             |
| 1-bit (1)                          | 0 and 255                                                                   |
| palette (P)                        | its colours                                                                 |
| CMYK, YCbCr, HSV                   | Pillow's conversion to RGB, without a colour profile                        |
| any other mode                     | refused if Pillow has no conversion to RGB (LAB)                            |
| animated or of several pages       | the first frame                                                             |

torchvision's ImageFolder reads by `Image.convert("RGB")` alone: it does not turn, drops transparency, and cuts 16-bit
grey off at 255.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.run.errors import UserError
from cv.data.memory import check_memory

CHUNK, CHUNK_BYTES = 64, 2**24  # images that a thread decodes at once, and most that these take
AHEAD = 32  # chunks that are decoded before they are taken
# Pillow decodes outside the interpreter lock, but opens and converts under it: measured on two cores, threads double
# the rate of 500x375 JPEGs and cost a third of the rate of 32x32 PNGs.
THREADED_PIXELS = 128 * 128


def decode_images(sources: Sequence[Path | bytes], describe: Callable[[int], str], size: int | None = None) -> Tensor:
    """Decode to uint8 (N, 3, H, W) by the rules above.

    size: every image is cut to its central square and resized (bilinear, antialiased) to size x size; None: all must
    have one size already. describe(i) names source i in the `UserError` for an unreadable or differing image.
    """
    if size is not None:
        check_memory(len(sources), size, size)
    decoder = Decoder(sources, describe, size)
    check_memory(len(sources), *decoder.shape[1:])
    images = np.empty((len(sources), *decoder.shape), dtype=np.uint8)
    done = 0
    for chunk in decoder.chunks():
        images[done : done + len(chunk)] = chunk
        done += len(chunk)
    return torch.from_numpy(images)


class Decoder:
    """Images as `decode_images` reads them, a chunk at a time; `shape` (3, H, W) is that of the first.

    Sources, describe and size as there.
    """

    def __init__(self, sources: Sequence[Path | bytes], describe: Callable[[int], str], size: int | None = None):
        self.sources, self.describe, self.size = sources, describe, size
        if size is not None:
            check_memory(1, size, size)
        first, self._pixels = self._read(0)
        self.shape = first.shape
        self._chunk_size = max(1, min(CHUNK, CHUNK_BYTES // first.size))

    def chunks(self) -> Iterator[np.ndarray]:
        """All images in order, (N, 3, H, W) for small N; few chunks at once are in memory."""
        starts = range(0, len(self.sources), self._chunk_size)
        if self._pixels < THREADED_PIXELS:
            yield from map(self._chunk, starts)
            return
        with ThreadPoolExecutor() as pool:
            waiting: deque[Future[np.ndarray]] = deque()
            for start in starts:
                waiting.append(pool.submit(self._chunk, start))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _chunk(self, start: int) -> np.ndarray:
        end = min(start + self._chunk_size, len(self.sources))
        return np.stack([self._image(index) for index in range(start, end)])

    def _image(self, index: int) -> np.ndarray:
        image, _ = self._read(index)
        if image.shape != self.shape:
            raise UserError(
                f"{self.describe(index)}: {image.shape[2]}x{image.shape[1]} pixels, but {self.describe(0)} has "
                f"{self.shape[2]}x{self.shape[1]}; set DATASET.IMAGE_SIZE to bring all to one"
            )
        return image

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """Image `index`, and how many pixels it had."""
        source = self.sources[index]
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                pixels = image.width * image.height
                image = to_rgb(image)
        except Exception as error:  # of broken bytes Pillow raises whatever they lead to
            raise UserError(f"{self.describe(index)}: not a readable image ({error})") from error
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), method=Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1), pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in mode RGB, by the rules above.

    Raises:
        ValueError: pixels without a rule, or bytes that cannot be decoded (then whatever Pillow raises).
    """
    image.load()  # before the orientation is asked for, whose errors are passed over
    with suppress(Exception):  # damaged EXIF: there is no orientation
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known; save it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, or as grey with transparency where one value stands for it."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"whole-number pixels from {values.min()} to {values.max()}; expected 0 to 65535")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if (nothing := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == nothing, 0, 255).astype(np.uint8)))
    return grey
