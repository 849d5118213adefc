"""The CIFAR loop and the plain loop of the toolkits, here or in processes of their own.

Those import this module alone: the tables need more.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import count, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.run.record import peak_memory_bytes
from common.torchvision_repair import repair_torchvision
from cv.allocator import keep_freed_memory
from cv.compiling import compile_features
from cv.config import load_config
from cv.data import Augment, DataSets, EpochLoader, ImageSet, load_dataset
from cv.folding import folded
from cv.methods import build_distiller
from cv.methods.kd import kd_loss
from cv.models import build_model
from scripts.lib.benchmark.timing import synchronize

RECIPE = "configs/cifar100/kd/res56_res20.yaml"
LOOPS = ("ours", "plain")
PRECISIONS = ("fp32", "bf16")
CIFAR_IMAGES = 50_000


class OurLoop:
    """The steps of cv/trainer.py: images augmented in batches on the device, channels_last, nothing read per step."""

    def __init__(self, student: nn.Module, teacher: nn.Module, data: DataSets, batch: int, bf16: bool = False):
        self.device, self.bf16 = "cuda" if torch.cuda.is_available() else "cpu", bf16
        sizes = {"num_classes": 100, "image_shape": (3, 32, 32), "num_train": len(data.train)}
        kd = build_distiller("kd", student, teacher, load_config(RECIPE).KD, **sizes)
        self.kd = kd.to(self.device, memory_format=torch.channels_last).train()
        self.kd.teacher = folded(self.kd.teacher, sizes["image_shape"])
        look = {"mean": data.mean, "std": data.std, "device": self.device, "seed": 0, "channels_last": True}
        loader = EpochLoader(data.train, batch, augment=data.augment, shuffle=True, **look)
        self.batches = (images for epoch in count() for images in loader.epoch(epoch))
        self.optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Of images (B, C, H, W), labels (B,) and indices (B,)."""
        with self.autocast():
            return sum(self.kd(*batch)[1].values())

    def run(self, steps: int) -> None:
        for batch in islice(self.batches, steps):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(batch).backward()
            self.optimizer.step()


class PILImages(Dataset):
    """An image set as PIL images through torchvision's transforms, one by one."""

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
    """The rival, the usual distillation toolkit's loop, written as simply as those are, with the same settings.

    PIL transforms image by image in DataLoader workers, NCHW, eager, loss and accuracy read on the host in every step.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, data: DataSets, batch: int, bf16: bool, workers: int):
        self.device, self.bf16 = "cuda" if torch.cuda.is_available() else "cpu", bf16
        self.student, self.teacher = student.to(self.device), teacher.to(self.device).eval()
        keep = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": self.device == "cuda"}
        if workers:
            keep["multiprocessing_context"] = "fork"  # as where no process has been spawned
        loader = DataLoader(PILImages(data.train, data.mean, data.std), batch, shuffle=True, **keep)
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


def build(loop: str, data: DataSets, batch: int, precision: str, workers: int = 2) -> OurLoop | PlainLoop:
    """One of `LOOPS`, or ours "compiled", for KD of ResNet20 from ResNet56, networks initialised alike."""
    torch.manual_seed(0)
    student, teacher = build_model("resnet20", 100), build_model("resnet56", 100)
    bf16 = precision == "bf16"
    if loop == "plain":
        return PlainLoop(student, teacher, data, batch, bf16, workers)
    ours = OurLoop(student, teacher, data, batch, bf16)
    if loop == "compiled":
        for network in (ours.kd.student, ours.kd.teacher):
            compile_features(network)
    return ours


def random_images(number: int, size: int = 32) -> DataSets:
    """Images of CIFAR-100's kind: reading the files would have a peak of its own."""
    images = ImageSet(torch.randint(256, (number, 3, size, size), dtype=torch.uint8), torch.arange(number) % 100, 100)
    return DataSets(images, images, None, (0.5,) * 3, (0.25,) * 3, Augment(padding=4, flip=True))


class Steps(NamedTuple):
    """Training steps that a process is asked for."""

    loop: str  # one of `LOOPS`
    precision: str
    batch: int
    steps: int
    threads: int
    images: int | str  # so many random ones, or the folder of CIFAR-100


def processes(number: int) -> list[ProcessPoolExecutor]:
    """New ones, each in a pool of its own, so that all get work alike; they start with the first of it."""
    return [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(number)]


def at_once(pools: list[ProcessPoolExecutor], steps: Steps) -> None:
    """The same steps in all of some processes together, each with its own networks and images."""
    for job in [pool.submit(_take, steps) for pool in pools]:
        job.result()


def _take(steps: Steps) -> None:
    torch.set_num_threads(steps.threads)
    if steps.loop == "ours":
        keep_freed_memory()  # as cv/train_svd.py does
    repair_torchvision()  # the plain loop takes it
    _kept(steps.loop, steps.precision, steps.batch, steps.images).run(steps.steps)
    synchronize()


@cache
def _kept(loop: str, precision: str, batch: int, images: int | str) -> OurLoop | PlainLoop:
    data = load_dataset("cifar100", images) if isinstance(images, str) else random_images(images)
    return build(loop, data, batch, precision)


def peak_memory_apart(loop: str, precision: str, batch: int, steps: int, images: int = CIFAR_IMAGES) -> int:
    """Peak memory (bytes) of a new process that takes some steps: allocated on the GPU, resident without one.

    The plain loop has no workers there, so that all that it needs is counted.
    """
    (process,) = processes(1)
    with process:
        return process.submit(_peak_memory, loop, precision, batch, steps, images).result()


def _peak_memory(loop: str, precision: str, batch: int, steps: int, images: int) -> int:
    if loop == "ours":
        keep_freed_memory()
    repair_torchvision()
    data = random_images(images)
    trained = build(loop, data, batch, precision, workers=0)
    del data  # the plain loop has made its own copy
    trained.run(steps)
    return peak_memory_bytes()
