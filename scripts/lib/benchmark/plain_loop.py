"""The rival of the CIFAR loop: the usual distillation toolkit's loop, written as simply as those are.

PIL transforms image by image in DataLoader workers, NCHW, eager, loss and accuracy read on the host in every step.
"""

from itertools import count

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cv.data import ImageSet
from cv.methods.kd import kd_loss


class PILImages(Dataset):
    """An image set as PIL images through torchvision's transforms."""

    def __init__(self, image_set: ImageSet, mean, std):
        from PIL import Image
        from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in image_set.images]
        self.labels = image_set.labels.tolist()
        crop = RandomCrop(image_set.images.shape[-1], padding=4)
        self.transform = Compose([crop, RandomHorizontalFlip(), ToTensor(), Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


class PlainLoop:
    """KD of a student from a teacher (temperature 4, weights 0.1 and 0.9), `steps` at a time."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        image_set: ImageSet,
        mean,
        std,
        batch: int,
        workers: int,
        bf16: bool,
    ):
        self.device, self.bf16 = "cuda" if torch.cuda.is_available() else "cpu", bf16
        self.student, self.teacher = student.to(self.device), teacher.to(self.device).eval()
        loader = DataLoader(
            PILImages(image_set, mean, std),
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device == "cuda",
        )
        self.batches = (images for _ in count() for images in loader)
        self.optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            images, labels = (tensor.to(self.device) for tensor in next(self.batches))
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                logits = self.student(images)
                with torch.no_grad():
                    teacher_logits = self.teacher(images)
                loss = 0.1 * nn.functional.cross_entropy(logits, labels) + 0.9 * kd_loss(logits, teacher_logits, 4.0)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
            (logits.argmax(1) == labels).float().mean().item()
