"""Seconds until the entry points answer and until a first training step is done, beside what they cannot do without."""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import ROOT
from common.run.errors import UserError
from scripts.lib.benchmark import tables
from scripts.lib.benchmark.timing import summaries, write

NLP, CV = "nlp/BERT-of-Theseus/run_glue_SVD_losslayer.py", "cv/train_svd.py"
# what the transformers example for GLUE imports before it reads its arguments
EXAMPLE = (
    "from common.torchvision_repair import repair_torchvision; repair_torchvision(); import datasets; "
    "from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments"
)
REFERENCES = {
    "Python alone": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "imports of transformers' GLUE example": ["-c", EXAMPLE],
}
# one batch, one step: the log line that is waited for comes right after it
FIRST_STEP = (
    "DATASET.SUBSET 64 SOLVER.BATCH_SIZE 64 SOLVER.EPOCHS 1 SOLVER.LR_DECAY_STAGES [] LOG.INTERVAL 1 LOG.PROGRESS false"
)
WAIT = 120  # seconds that a first step may take


def run(folder: Path, quick: bool) -> str:
    """Every command as a process of its own, in turns; returns the table."""
    commands = {
        f"{Path(NLP).name} --help": [NLP, "--help"],
        f"{Path(CV).name} --help": [CV, "--help"],
        **REFERENCES,
    }
    quietly = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
    works = {name: partial(subprocess.run, [sys.executable, *words], **quietly) for name, words in commands.items()}
    first = f"first training step on digits ({Path(CV).name})"
    commands[first] = [CV, "--cfg", "configs/demo/vanilla.yaml", *FIRST_STEP.split()]
    works[first] = lambda: _first_step(commands[first])
    results = summaries(works, 1 if quick else 7, warmup=0 if quick else 1)
    named = {name: " ".join(["python", *words]) for name, words in commands.items()}
    found = {"seconds": results, "commands": named}
    path = write("startup", found, folder)
    return f"{tables.startup(found)}\n\n{path}"


def _first_step(words: list[str]) -> None:
    """Start a training, and return when its first step is in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        process = subprocess.Popen(
            [sys.executable, *words, "OUTPUT_DIR", str(metrics.parent)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        try:
            end = time.monotonic() + WAIT
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.monotonic() > end:
                    raise UserError(f"no first training step: python {' '.join(words)}")
                time.sleep(0.005)
        finally:
            process.kill()  # its evaluation and export are not what is timed
            process.wait()
