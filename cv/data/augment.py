"""Random crop, flip and normalisation of a whole batch on its device, with the distribution of torchvision's."""

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
