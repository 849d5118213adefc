"""The order of training examples: batches of similar length, the same on every process and after resuming."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGrouped(Sampler[int]):
    """Indices of N examples, at random, those of a batch of similar length; a function of seed and epoch alone.

    The Trainer's own draws from torch's global generator: a resumed run would go on with another order than the one
    it was stopped in, and processes, whose generators part with their first batches of different length, with orders
    of their own.

    Args:
        lengths: (N,) tokens of every example.
        batch_size: examples of an optimizer step on one device.
        seed: of all epochs' orders.
        epoch: called at the start of a pass; the number of passes completed.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size = lengths, batch_size
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # not the sum: one seed's second epoch would be the next seed's first
        state = np.random.SeedSequence((self.seed, self.epoch())).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
