"""A plain loop with torchvision's ResNets: a ResNet18 learns from a ResNet34, both from random weights here.

step  0: task 1.479, DSKD 6.060
step  5: task 1.332, DSKD 6.606
step 10: task 1.586, DSKD 6.724
step 15: task 1.144, DSKD 6.759
4 choices of directions in 20 steps
"""

import torch
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18, resnet34

from dskd import DirectionSensitivityLoss, Own, pair_weights

STEPS, BATCH, CLASSES, WEIGHT = 20, 8, 3, 0.1
BLOCKS = {"layer2.1": "layer2.3", "layer3.1": "layer3.5"}  # the last block of a stage; student: teacher


def main() -> None:
    torch.manual_seed(0)
    student, teacher = resnet18(num_classes=CLASSES), resnet34(num_classes=CLASSES).eval()
    names = [(f"{a}.{conv}", f"{b}.{conv}") for a, b in BLOCKS.items() for conv in ("conv1", "conv2")]
    dskd = DirectionSensitivityLoss(pair_weights(student, teacher, names), Own(rank=32), svd_steps=5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    dskd.attach(optimizer, total_steps=STEPS)

    for step in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32)
        labels = images.mean((2, 3)).argmax(1)  # the brightest channel
        task, term = cross_entropy(student(images), labels), dskd()
        optimizer.zero_grad()
        (task + WEIGHT * term).backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:2}: task {task.item():.3f}, DSKD {term.item():.3f}")
    print(f"{dskd.choices} choices of directions in {dskd.steps} steps")


if __name__ == "__main__":
    main()
