"""Our GLUE loop, the transformers Trainer as users run it, timed in blocks of steps between which a rival runs."""

import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from bert_of_theseus.training import DistillationTrainer
from scripts.lib.benchmark.timing import synchronize


class SampledBatches(Sampler):
    """A random choice of an epoch's full batches, in random order.

    Batches of similar length differ from one another: the first ones of an epoch are its longest. A block of steps
    from its beginning would time those alone; a block of batches from anywhere in the epoch is a fair sample of it.

    Args:
        sampler: gives the epoch, one index after another.
        batch: examples of a batch.
        steps: batches to choose at most.
    """

    def __init__(self, sampler: Sampler, batch: int, steps: int):
        self.sampler, self.batch = sampler, batch
        self.steps = min(steps, len(sampler) // batch)
        self.epoch: list[list[int]] = []  # all full batches of the epoch
        self.chosen: list[list[int]] = []

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)
        full = len(order) // self.batch * self.batch
        self.epoch = [order[start : start + self.batch] for start in range(0, full, self.batch)]
        self.chosen = [self.epoch[i] for i in torch.randperm(len(self.epoch))[: self.steps]]
        return (index for batch in self.chosen for index in batch)


class SampledTrainer(DistillationTrainer):
    """DistillationTrainer on a sample of its own batches; `sampled` tells which."""

    def _get_train_sampler(self, train_dataset=None) -> SampledBatches:
        sampler = super()._get_train_sampler(train_dataset)
        self.sampled = SampledBatches(sampler, self.args.train_batch_size, self.args.max_steps)
        return self.sampled


class Turns(TrainerCallback):
    """Times the Trainer's steps in blocks, and after each a block of the rival's.

    The clock of ours runs from the end of the rival's block to the end of the next step of ours that closes a block:
    loading and logging are in it.

    Args:
        rival: called with the number of steps to take.
        block: steps of a block.

    Attributes:
        seconds: of every block, by "ours" and "plain"; the first of each is the warm-up.
    """

    def __init__(self, rival: Callable[[int], object], block: int):
        self.rival, self.block = rival, block
        self.seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        self._since = 0.0

    def on_train_begin(self, args, state, control, **_):
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.block == 0:
            self._stop("ours")
            self.rival(self.block)
            self._stop("plain")

    def _stop(self, name: str) -> None:
        synchronize()
        now = time.perf_counter()
        self.seconds[name].append(now - self._since)
        self._since = now
