"""The rival of the GLUE loop: fine-tuning as the well-known transformers example for GLUE does it, written out.

Every example is padded to 128 tokens beforehand, batches are shuffled freely, the loss is read on the host in every
step. Schedule, clipping and precision are those of ours, and so is AdamW, here in torch's default implementation (the
Trainer takes the fused one).
"""

from itertools import count

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_linear_schedule_with_warmup

from bert_of_theseus.data import TokenizedDataset


class PlainGlue:
    """Fine-tunes all of a classifier, some steps at a time.

    Args:
        model: on its device.
        dataset: all examples of one length.
        batch, learning_rate, bf16: as for our loop.
        total_steps: after which the linear schedule reaches zero.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: TokenizedDataset,
        batch: int,
        learning_rate: float,
        total_steps: int,
        bf16: bool,
    ):
        self.model, self.bf16 = model.train(), bf16
        self.device = next(model.parameters()).device
        items = list(dataset)
        self.names = list(items[0])
        tensors = TensorDataset(*(torch.tensor([item[name] for item in items]) for name in self.names))
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(tensors, batch, shuffle=True, drop_last=True, pin_memory=on_gpu)
        self.batches = (batch for _ in count() for batch in loader)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, total_steps)
        self.total_loss = 0.0

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
            self.total_loss += loss.item()
