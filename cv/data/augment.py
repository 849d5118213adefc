"""Random crops, flip and normalisation of a whole batch on its device, with the distribution of torchvision's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """RandomCrop(size, padding) and RandomHorizontalFlip(0.5) on uint8 images, drawn independently for every image.

    padding: pixels of value zero on every side, added before normalisation, as torchvision's transforms of PIL images
    do; flip: whether half of the images are mirrored left to right.
    """

    padding: int
    flip: bool

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Crop corner (top, left in 0..2*padding) and mirroring (0 or 1) of `count` images: int64 (count, 3)."""
        device = generator.device
        corner = torch.randint(2 * self.padding + 1, (count, 2), generator=generator, device=device)
        mirrored = torch.randint(2, (count, 1), generator=generator, device=device)
        return torch.cat([corner, mirrored * self.flip], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment uint8 images (N, C, H, W) by draws (N, 3) that lie on the same device; a new tensor of that shape."""
        n, c, h, w = images.shape
        top, left, mirrored = draws[:, :, None].unbind(1)
        rows = torch.arange(h, device=images.device) + top
        columns = torch.arange(w, device=images.device)
        columns = torch.where(mirrored.bool(), w - 1 - columns, columns) + left
        source = (rows[:, :, None] * (w + 2 * self.padding) + columns[:, None, :]).view(n, 1, h * w)
        padded = F.pad(images, (self.padding,) * 4)
        return padded.flatten(2).gather(2, source.expand(n, c, h * w)).view(n, c, h, w)


@dataclass(frozen=True)
class ResizedCrop:
    """RandomResizedCrop and RandomHorizontalFlip(0.5) on uint8 images, drawn independently for every image.

    A box of 8% to 100% of the area and an aspect ratio of 3/4 to 4/3, resized to the whole image bilinearly. No box is
    larger than the image, so that nothing is scaled down and antialiasing would change nothing.

    height, width: of the images; flip: whether half of them are mirrored left to right.
    """

    height: int
    width: int
    flip: bool

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Box (top, left, height, width) and mirroring (0 or 1) of `count` images: int64 (count, 5).

        As RandomResizedCrop.get_params: the first of ten draws that fits into the image, or else the largest box in the
        middle whose aspect ratio is allowed.
        """

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

        low, high = _RATIOS
        height = min(self.height, round(self.width / low))
        width = min(self.width, round(self.height * high))
        heights, widths = torch.full((count,), height), torch.full((count,), width)
        settled = torch.zeros(count, dtype=torch.bool)
        for _ in range(_TRIES):
            area = self.height * self.width * uniform(*_AREAS)
            ratio = uniform(math.log(low), math.log(high)).exp()
            h, w = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
            fits = (h > 0) & (h <= self.height) & (w > 0) & (w <= self.width)
            heights, widths = torch.where(fits & ~settled, h, heights), torch.where(fits & ~settled, w, widths)
            settled |= fits
        room = torch.stack([self.height - heights, self.width - widths])
        corner = (torch.rand(2, count, generator=generator, dtype=torch.float64) * (room + 1)).long()
        top, left = torch.where(settled, corner, room // 2)
        mirrored = torch.randint(2, (count,), generator=generator) * self.flip
        return torch.stack([top, left, heights, widths, mirrored], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment uint8 images (N, C, H, W) by draws (N, 5) that lie on the same device; a new tensor of that shape."""
        top, left, heights, widths, mirrored = draws[:, :, None].unbind(1)
        rows = _centres(self.height, heights) + top
        columns = _centres(self.width, widths)
        columns = torch.where(mirrored.bool(), columns.flip(1), columns) + left
        grid = torch.stack(
            torch.broadcast_tensors(_scaled(columns, self.width)[:, None, :], _scaled(rows, self.height)[:, :, None]), 3
        )
        output = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
        return output.round_().to(torch.uint8)


_AREAS, _RATIOS, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # torchvision's defaults


def _centres(size: int, lengths: Tensor) -> Tensor:
    """Where in a box of `lengths` (N, 1) pixels the centres of `size` pixels lie, held within it: (N, size)."""
    places = (torch.arange(size, device=lengths.device) + 0.5) * (lengths / size) - 0.5
    return torch.minimum(places.clamp(min=0), lengths - 1)


def _scaled(places: Tensor, size: int) -> Tensor:
    """Pixels 0 to size - 1 as -1 to 1."""
    return 2 * places / max(size - 1, 1) - 1


def normalize(
    images: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    channels_last: bool = False,
) -> Tensor:
    """(images / 255 - mean) / std per channel of uint8 images (N, C, H, W).

    Computed in float32, bitwise as torchvision's ToTensor and Normalize. `mean` and `std` (C,) are copied to the device
    in every call unless they are tensors that lie there already.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    output = images.to(torch.float32).div_(255).sub_(mean).div_(std)
    # after the conversion to floats: re-ordering bytes is three times slower on a CPU
    return output.contiguous(memory_format=torch.channels_last) if channels_last else output
