"""Both programs on tiny random models, each run in a process forked from this one: programs to try, not results."""

import json
import os
import random
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from common import ROOT
from common.run.errors import UserError

_TIMES = ("_per_second", "_runtime", "_time")  # endings of what a clock says in a log
_HANGING = 120  # seconds after which a run is ended
_LABELS = ("entailment", "not_entailment")
_WORDS = ["the", "a", "cat", "dog", "bird", "fish", "man", "woman", "house", "tree", "river", "road", "car", "book"]
_TEXT = """--task_name RTE --max_seq_length 32 --disable_tqdm --do_train --do_eval --per_gpu_train_batch_size 8
    --learning_rate 1e-3 --report_to none --logging_steps 1 --max_steps 30 --save_steps 4 --save_total_limit 3 --ifsvd
    --svd_steps 5 --grad_steps 3 --rank_size 4"""
_IMAGES = """DISTILLER.TYPE kd DISTILLER.STUDENT resnet8 DISTILLER.TEACHER resnet14 DATASET.SUBSET 128
    SOLVER.BATCH_SIZE 32 SOLVER.EPOCHS 16 SOLVER.LR_DECAY_STAGES [8] LOG.INTERVAL 1 LOG.TRACKERS [] LOG.PROGRESS false
    DSKD.ENABLED true DSKD.SVD_STEPS 5 DSKD.GRAD_STEPS 3"""


class Ended(NamedTuple):
    """How a run ended: its exit code, negative for a signal that killed it, and what it said."""

    code: int
    said: str

    @property
    def refused(self) -> bool:
        """In one line."""
        return self.code == 2 and self.said.count("error: ") == 1 and "Traceback" not in self.said


@dataclass
class Program:
    """A program on a tiny model.

    Attributes:
        output, overwrite: the key or flag that gives the output folder, and the flag that replaces a run.
        folder: holds `whole`, an uninterrupted run, `half`, one that was killed in its midst, and what runs say.
        checkpoints: pattern of a file that `half` has.
        seconds: of the uninterrupted run.
    """

    name: str
    script: Path
    words: list[str]
    output: str
    overwrite: str
    checkpoints: str
    folder: Path
    seconds: float = 0.0

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    @property
    def half(self) -> Path:
        return self.folder / "half"

    def start(self, folder: Path, *more: str) -> int:
        """The id of a process that runs the program in an output folder."""
        return _forked(lambda: self._main(folder, *more))

    def again(self, folder: Path) -> str:
        """The flag that a run which ended early is started again with."""
        return "--resume" if (folder / "config.json").exists() else self.overwrite

    def ended(self, pid: int) -> Ended:
        """Wait for a process that `start` has started."""
        end = time.monotonic() + _HANGING
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGABRT)
                found = os.waitpid(pid, 0)
                break
            time.sleep(0.005)
        said = self.folder / f"{pid}.said"
        text = said.read_text(errors="replace") if said.exists() else ""
        said.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(found[1]), text)

    def run(self, folder: Path, *more: str) -> Ended:
        return self.ended(self.start(folder, *more))

    def difference(self, folder: Path) -> str:
        """In what a finished run differs from the uninterrupted one, "" if in nothing."""
        for name in ("student/model.safetensors", "metrics.jsonl", "directions.jsonl", "result.json"):
            if _timeless(folder / name) != _timeless(self.whole / name):
                return f"{name} is another one than that of the uninterrupted run"
        left = [path.name for path in folder.rglob(".*")]
        return f"left behind: {', '.join(left)}" if left else ""

    def _main(self, folder: Path, *more: str) -> None:
        said = os.open(self.folder / f"{os.getpid()}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(said, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
        sys.argv = [str(self.script), *self.words, self.output, str(folder), *more]
        runpy.run_path(str(self.script), run_name="__main__")


def _forked(main: Callable[[], object]) -> int:
    """A process in which all is imported already, with the signals of a new one."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _timeless(path: Path) -> object:
    """What a file says but for times; of a result the scores."""
    if path.suffix == ".safetensors":
        return path.read_bytes()
    if path.suffix == ".json":
        result = json.loads(path.read_text())
        return [result[key] for key in ("last", "best", "steps")]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(_TIMES)} for line in lines]


def prepare(folder: Path) -> list[Program]:
    """Both programs with their data, an uninterrupted run of each, and one that was killed in its midst.

    Raises:
        UserError: a run of theirs fails without any fault.
    """
    import bert_of_theseus.pipeline  # noqa: F401  once, for all processes
    import cv.trainer  # noqa: F401

    task, teacher = folder / "task", folder / "teacher"
    for make, place in ((_write_task, task), (_write_teacher, teacher)):  # forked, so that no threads begin here
        if os.waitpid(_forked(lambda make=make, place=place: make(place)), 0)[1]:
            raise UserError(f"{place} could not be written")
    words = ["--cfg", str(ROOT / "configs/demo/base.yaml"), *_IMAGES.split(), "DISTILLER.TEACHER_CKPT", str(teacher)]
    script, flags = ROOT / "cv/train_svd.py", ("OUTPUT_DIR", "--overwrite", "checkpoint.pt")
    images = Program("images", script, words, *flags, folder / "images")
    words = ["--model_name_or_path", str(task / "model"), "--data_dir", str(task), *_TEXT.split()]
    script = ROOT / "nlp/BERT-of-Theseus/run_glue_SVD_losslayer.py"
    flags = ("--output_dir", "--overwrite_output_dir", "checkpoint-[1-9][0-9]/manifest.json")
    text = Program("text", script, words, *flags, folder / "text")
    for program in (images, text):
        program.folder.mkdir()
        for place in (program.folder / "first", program.whole):  # the first one takes longer
            start = time.monotonic()
            if (run := program.run(place)).code:
                raise UserError(f"{program.script.name} does not run: {run.said[-500:]}")
            program.seconds = time.monotonic() - start
        pid = program.start(program.half)
        while not list(program.half.glob(program.checkpoints)):
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        program.ended(pid)
    return [images, text]


def _write_task(folder: Path) -> None:
    """train.tsv and dev.tsv in RTE's layout, and a BERT of 4 layers with its tokenizer in `model`."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    draw = random.Random(1)
    folder.mkdir(parents=True)
    for name, count in (("train", 24), ("dev", 12)):
        rows = ["index\tsentence1\tsentence2\tlabel"]
        for index in range(count):
            first, second = (" ".join(draw.choices(_WORDS, k=draw.randint(3, 11))) for _ in range(2))
            rows.append(f"{index}\t{first}\t{second}\t{_LABELS[index % 2]}")
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(
        vocab_size=len(vocabulary), **sizes, max_position_embeddings=64, id2label=dict(enumerate(_LABELS))
    )
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    words = {word: number for number, word in enumerate(vocabulary)}
    BertTokenizerFast(vocab=words, model_max_length=64).save_pretrained(folder / "model")


def _write_teacher(folder: Path) -> None:
    """A ResNet14 for digits with random weights."""
    from cv.export import save_model
    from cv.models import build_model

    torch.manual_seed(1)
    save_model(build_model("resnet14", 10), "resnet14", folder)
