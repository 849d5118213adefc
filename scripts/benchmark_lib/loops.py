"""Images per second of the CIFAR loop beside the plain loop of the toolkits, one run, taking turns."""

from pathlib import Path

import torch
from accelerate.utils import set_seed

from benchmark_lib.plain_loop import PlainLoop
from benchmark_lib.timing import interleaved, summary, table, write
from cv.config import load_config
from cv.data import EpochLoader, load_dataset
from cv.methods import build_distiller
from cv.models import build_model

BATCH = 64


class OurLoop:
    """The steps of cv/trainer.py: images augmented in batches on the device, channels_last, nothing read per step."""

    def __init__(self, student, teacher, data, batch: int):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        cfg = load_config("configs/cifar100/kd/res56_res20.yaml")
        self.kd = build_distiller(
            "kd", student, teacher, cfg.KD, num_classes=100, image_shape=(3, 32, 32), num_train=len(data.train)
        ).to(device, memory_format=torch.channels_last)
        self.loader = EpochLoader(
            data.train,
            batch,
            augment=data.augment,
            mean=data.mean,
            std=data.std,
            device=device,
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
            sum(self.kd(*batch)[1].values()).backward()
            self.optimizer.step()


def run(folder: Path, quick: bool, root: str) -> str:
    """KD of ResNet20 from ResNet56 at batch 64, networks initialised alike; returns the table."""
    data = load_dataset("cifar100", root)
    loops = {}
    for name in ("ours", "plain"):
        set_seed(0)
        student, teacher = build_model("resnet20", 100), build_model("resnet56", 100)
        if name == "ours":
            loops[name] = OurLoop(student, teacher, data, BATCH)
        else:
            loops[name] = PlainLoop(student, teacher, data.train, data.mean, data.std, BATCH, workers=2)
    steps = 2 if quick else 20
    seconds = interleaved({name: lambda loop=loop: loop.run(steps) for name, loop in loops.items()}, 1 if quick else 7)
    rates = {name: summary([steps * BATCH / value for value in values]) for name, values in seconds.items()}
    ratio = rates["ours"]["median"] / rates["plain"]["median"]
    results = {"case": "KD, ResNet56 -> ResNet20, batch 64, fp32", "images_per_second": rates, "ratio": ratio}
    path = write("cv", results, folder)
    rows = [
        {
            "loop": name,
            "images/s, median": f"{r['median']:.0f}",
            "lowest to highest": f"{r['min']:.0f} to {r['max']:.0f}",
        }
        for name, r in rates.items()
    ]
    return f"{table(rows)}\n\nratio of the medians {ratio:.2f}\n\n{path}"
