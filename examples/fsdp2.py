"""FSDP2: the weights of student and teacher are split over two processes, and so is the held gradient.

    torchrun --nproc_per_node=2 examples/fsdp2.py

step  4: DSKD 0.5101, first weight here (16, 32)
step  9: DSKD 0.3937, first weight here (16, 32)
step 14: DSKD 0.3540, first weight here (16, 32)
step 19: DSKD 0.3735, first weight here (16, 32)
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from dskd import Curvature, DirectionSensitivityLoss, pair_weights

STEPS = 20


def mlp(hidden_layers: int) -> nn.Sequential:
    hidden = [module for _ in range(hidden_layers) for module in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), *hidden, nn.Linear(32, 4))


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = fully_shard(mlp(2).to(device)), fully_shard(mlp(4).to(device))
    pairs = pair_weights(student, teacher, [("2", "4"), ("4", "8")])  # after `fully_shard`: it makes new parameters
    dskd = DirectionSensitivityLoss(pairs, Curvature(), svd_steps=5, grad_steps=5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    dskd.attach(optimizer, total_steps=STEPS, weight=0.1)  # adds the gradient itself, on each process its part

    torch.manual_seed(dist.get_rank())
    for step in range(STEPS):
        inputs = torch.randn(16, 10, device=device)
        task = cross_entropy(student(inputs), inputs[:, :4].argmax(1))
        optimizer.zero_grad()
        task.backward()
        optimizer.step()
        value = dskd()  # on every process: it puts whole matrices together where it is computed anew
        if step % 5 == 4 and dist.get_rank() == 0:
            print(f"step {step:2}: DSKD {value.item():.4f}, first weight here {tuple(pairs[0][1].to_local().shape)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
