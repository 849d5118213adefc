"""Batch norm with the statistics of all processes' images, on any device (torch's SyncBatchNorm is for GPUs alone)."""

import torch
from torch import Tensor, distributed, nn


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """In training as if the processes' batches were one; it evaluates, saves and loads as the batch norm that it was.

    Mean, then variance around it: two sums over the processes a forward pass, and one a backward pass for each.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()  # a sum of bf16 squares would have three digits
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        total = _Sum.apply(torch.cat((values.sum((0, 2, 3)), count[None])))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = values - mean.view(1, -1, 1, 1)
        variance = _Sum.apply((centred * centred).sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum of the processes' tensors; every process's loss depends on it, so that gradients are summed, too."""

    @staticmethod
    def forward(ctx, mine: Tensor) -> Tensor:
        total = mine.clone()
        distributed.all_reduce(total)
        return total

    backward = staticmethod(lambda ctx, gradient: _Sum.forward(ctx, gradient.contiguous()))


def synchronise(module: nn.Module) -> None:
    """Let every batch norm below a module take the statistics of all processes, in place."""
    for each in module.modules():
        if type(each) is nn.BatchNorm2d:
            each.__class__ = SyncedBatchNorm2d
