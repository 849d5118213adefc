"""Batches of one epoch from a data set that lies on the training device: no workers, nothing on the host per step.

Of a set that is larger than memory the batches are gathered from its file, on the host.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from common.run.errors import UserError
from cv.data.augment import Augment, ResizedCrop, normalize
from cv.data.image_set import ImageSet


class EpochLoader:
    """Shuffled, augmented, normalised batches; every epoch is a function of (seed, epoch) alone.

    The order and the augmentation of an epoch are drawn once, on the CPU, and copied to the device: the same images
    come on every kind of device, and an image is augmented alike for any number of processes and any batch size.
    Process p takes the positions p, p + processes, ... of the common order; where they do not share out evenly, the
    first images of the order are given out a second time (as DistributedSampler does), so that all processes have
    equally many steps.

    batch_size: images of one process and step; augment: None leaves the images as they are; mean, std: per channel, of
    pixel values in 0..1; seed: at least 0; drop_last: leave out a last batch that is not full; channels_last: memory
    layout of the images that come out. A batch size below one, or above the process's share with drop_last, is a
    `UserError`.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        augment: Augment | ResizedCrop | None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        channels_last: bool = False,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if not 0 <= process < processes:
            raise ValueError(f"process {process} is not one of {processes} processes")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: must be at least 1")
        if len(image_set) == 0:
            raise UserError("the data set has no images")
        self.image_set = image_set.to(device)
        self.batch_size = batch_size
        self.augment = augment
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)
        self.device = torch.device(device)
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.channels_last = channels_last
        self.process = process
        self.processes = processes
        if len(self) == 0:
            raise UserError(
                f"batch size {batch_size}: no full batch in the {self.images_per_epoch} training images of a process"
            )

    @property
    def images_per_epoch(self) -> int:
        """Images that one process sees in an epoch, before `drop_last`."""
        return math.ceil(len(self.image_set) / self.processes)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every process."""
        full, rest = divmod(self.images_per_epoch, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, done: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (images (B, C, H, W) in float32, labels (B,), indices (B,) into the image set), after `done` steps."""
        order, draws = self._plan(epoch)
        for step in range(done, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            indices = order[batch]
            images = self.image_set.gather(indices)
            if draws is not None:
                images = self.augment(images, draws[batch])
            images = normalize(images, self.mean, self.std, self.channels_last)
            yield images, self.image_set.labels.index_select(0, indices), indices

    def _plan(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        # SeedSequence, because the CPU generator reads only 32 bits of its seed and (seed, epoch) must not collide
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        count = len(self.image_set)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        mine = order[torch.arange(self.process, self.images_per_epoch * self.processes, self.processes) % count]
        draws = None if self.augment is None else self.augment.draw(count, generator)[mine].to(self.device)
        return mine.to(self.device), draws
