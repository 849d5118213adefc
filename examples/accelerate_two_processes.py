"""accelerate: two processes, gradient accumulation, clipping; each process computes a share of the directions.

    accelerate launch --cpu --num_processes 2 examples/accelerate_two_processes.py

2 processes, 4 choices in 20 steps
DSKD loss 1.398
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dskd import DirectionSensitivityLoss, Own, pair_weights


def mlp(hidden_layers: int) -> nn.Sequential:
    hidden = [module for _ in range(hidden_layers) for module in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), *hidden, nn.Linear(32, 4))


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    student, teacher = mlp(2).to(accelerator.device), mlp(4).to(accelerator.device)
    pairs = pair_weights(student, teacher, [("2", "4"), ("4", "8")])  # before `prepare` wraps the student
    dskd = DirectionSensitivityLoss(pairs, Own(rank=8), svd_steps=5)

    inputs = torch.randn(640, 10)
    data = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    model, optimizer, data = accelerator.prepare(student, optimizer, data)
    dskd.attach(optimizer, total_steps=len(data) // 2)

    for batch, labels in data:
        with accelerator.accumulate(model):
            task = cross_entropy(model(batch), labels)
            accelerator.backward(task + 0.1 * dskd())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"{accelerator.num_processes} processes, {dskd.choices} choices in {dskd.steps} steps")
    accelerator.print(f"DSKD loss {dskd().item():.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
