"""Images per second and peak memory of the CIFAR loop beside the plain loop of the toolkits, taking turns."""

from pathlib import Path

import torch

from cv.config import load_config
from cv.data import DataSets, EpochLoader, load_dataset
from cv.methods import build_distiller
from cv.models import build_model
from scripts.lib.benchmark.memory import CIFAR_IMAGES, peak_memory_apart
from scripts.lib.benchmark.plain_loop import PlainLoop
from scripts.lib.benchmark.timing import interleaved, summary, table, write

LOOPS = ("ours", "plain")
PRECISIONS = ("fp32", "bf16")


class OurLoop:
    """The steps of cv/trainer.py: images augmented in batches on the device, channels_last, nothing read per step."""

    def __init__(self, student, teacher, data: DataSets, batch: int, bf16: bool):
        self.device, self.bf16 = "cuda" if torch.cuda.is_available() else "cpu", bf16
        cfg = load_config("configs/cifar100/kd/res56_res20.yaml")
        self.kd = build_distiller(
            "kd", student, teacher, cfg.KD, num_classes=100, image_shape=(3, 32, 32), num_train=len(data.train)
        ).to(self.device, memory_format=torch.channels_last)
        self.loader = EpochLoader(
            data.train,
            batch,
            augment=data.augment,
            mean=data.mean,
            std=data.std,
            device=self.device,
            seed=0,
            shuffle=True,
            channels_last=True,
        )
        self.batches, self.epoch = self.loader.epoch(0), 0
        self.optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.batches, None)
            if batch is None:
                self.epoch += 1
                self.batches = self.loader.epoch(self.epoch)
                batch = next(self.batches)
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                losses = self.kd(*batch)[1]
            sum(losses.values()).backward()
            self.optimizer.step()


def build(loop: str, data: DataSets, batch: int, precision: str, workers: int = 2) -> OurLoop | PlainLoop:
    """Either loop for KD of ResNet20 from ResNet56, networks initialised alike."""
    torch.manual_seed(0)
    student, teacher = build_model("resnet20", 100), build_model("resnet56", 100)
    bf16 = precision == "bf16"
    if loop == "ours":
        return OurLoop(student, teacher, data, batch, bf16)
    return PlainLoop(student, teacher, data.train, data.mean, data.std, batch, workers, bf16)


def run(folder: Path, quick: bool, root: str) -> str:
    """KD of ResNet20 from ResNet56 at batch 64 in both precisions; returns the table."""
    data = load_dataset("cifar100", root)
    batch, steps, images = (8, 1, 64) if quick else (64, 20, CIFAR_IMAGES)
    loops = {(loop, precision): build(loop, data, batch, precision) for precision in PRECISIONS for loop in LOOPS}
    works = {key: lambda loop=loop: loop.run(steps) for key, loop in loops.items()}
    seconds = interleaved(works, 1 if quick else 7)
    rates = {key: summary([steps * batch / value for value in values]) for key, values in seconds.items()}
    memory = {key: peak_memory_apart(*key, batch, steps, images) for key in loops}
    results = {
        precision: {
            "images_per_second": {loop: rates[loop, precision] for loop in LOOPS},
            "ratio": rates["ours", precision]["median"] / rates["plain", precision]["median"],
            "peak_memory_bytes": {loop: memory[loop, precision] for loop in LOOPS},
        }
        for precision in PRECISIONS
    }
    path = write("cv", {"case": f"KD, ResNet56 -> ResNet20, batch {batch}", "precisions": results}, folder)
    rows = [
        {
            "loop": loop,
            "precision": precision,
            "images/s, median": f"{rates[loop, precision]['median']:.0f}",
            "lowest to highest": f"{rates[loop, precision]['min']:.0f} to {rates[loop, precision]['max']:.0f}",
            "ratio to plain": f"{results[precision]['ratio']:.2f}" if loop == "ours" else "",
            "peak memory, MB": f"{memory[loop, precision] / 1e6:.0f}",
        }
        for loop, precision in loops
    ]
    return f"{table(rows)}\n\n{path}"
