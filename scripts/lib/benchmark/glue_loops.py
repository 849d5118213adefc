"""Our GLUE loop, the transformers Trainer as users run it, timed in blocks of steps, and the rival that runs between.

The rival fine-tunes as the well-known transformers example for GLUE does, written out: every example is padded to 128
tokens beforehand, batches are shuffled freely, the loss is read on the host in every step. Schedule, clipping and
precision are those of ours, and so is AdamW, here in torch's default implementation (the Trainer takes the fused one).
"""

import time
from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from transformers import TrainerCallback, get_linear_schedule_with_warmup

from bert_of_theseus.data import TokenizedDataset
from bert_of_theseus.training import DistillationTrainer
from scripts.lib.benchmark.timing import synchronize


class SampledBatches(Sampler):
    """A random choice of at most `steps` full batches of an epoch, in random order; `sampler` gives the epoch.

    Batches of similar length differ from one another: the first ones of an epoch are its longest. A block of steps
    from its beginning would time those alone; a block of batches from anywhere in the epoch is a fair sample of it.
    """

    def __init__(self, sampler: Sampler, batch: int, steps: int):
        self.sampler, self.batch = sampler, batch
        self.steps = min(steps, len(sampler) // batch)
        self.chosen: list[list[int]] = []

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)
        starts = torch.randperm(len(order) // self.batch)[: self.steps] * self.batch
        self.chosen = [order[start : start + self.batch] for start in starts]
        return (index for batch in self.chosen for index in batch)


class SampledTrainer(DistillationTrainer):
    """DistillationTrainer on a sample of its own batches; `sampled` tells which."""

    def _get_train_sampler(self, train_dataset=None) -> SampledBatches:
        sampler = super()._get_train_sampler(train_dataset)
        self.sampled = SampledBatches(sampler, self.args.train_batch_size, self.args.max_steps)
        return self.sampled


class Turns(TrainerCallback):
    """Times the Trainer's steps in blocks, and after each a block of the rival's (called with a number of steps).

    The clock of ours runs from the end of the rival's block to the end of the next step of ours that closes a block:
    loading and logging are in it. `seconds`: of every block, by loop; the first of each is the warm-up.
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


class PlainGlue:
    """The rival, some steps at a time, on its model's device; after `total_steps` the linear schedule reaches zero."""

    def __init__(
        self, model: nn.Module, dataset: TokenizedDataset, batch: int, rate: float, total_steps: int, bf16: bool
    ):
        self.model, self.bf16 = model.train(), bf16
        self.device = next(model.parameters()).device
        items = list(dataset)
        self.names = list(items[0])
        tensors = TensorDataset(*(torch.tensor([item[name] for item in items]) for name in self.names))
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(tensors, batch, shuffle=True, drop_last=True, pin_memory=on_gpu)
        self.batches = (batch for _ in count() for batch in loader)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, total_steps)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            inputs = {name: tensor.to(self.device) for name, tensor in zip(self.names, next(self.batches), strict=True)}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.model(**inputs).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            loss.item()
