"""A tiny random BERT on disk, a small task in the layout of RTE, and runs of the pipeline inside this process."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, PreTrainedTokenizerBase

from bert_of_theseus.arguments import parse_arguments
from bert_of_theseus.pipeline import run

_WORDS = """the a cat dog bird fish man woman child house tree river road car book song sat ran flew swam read wrote saw
    is was not never always often red blue green old new big small fast slow good bad and or but in on under near"""
TEXT_WORDS = _WORDS.split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT_WORDS]
LABELS = ("entailment", "not_entailment")
LAYERS = 4


def tiny_tokenizer(vocabulary: Sequence[str] = VOCABULARY, **settings) -> PreTrainedTokenizerBase:
    settings = {"model_max_length": 64, **settings}
    if transformers.__version__ >= "5":
        return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, **settings)
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(vocabulary))
        return BertTokenizerFast(str(Path(folder, "vocab.txt")), **settings)


def tiny_config(**settings) -> BertConfig:
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # outputs that differ visibly from example to example
    }
    return BertConfig(**{**sizes, **settings})


def write_model(folder: Path, **settings) -> Path:
    """A random BERT with RTE's labels and its tokenizer, in transformers' own format."""
    torch.manual_seed(7)
    labels = dict(enumerate(LABELS))
    model = BertForSequenceClassification(tiny_config(id2label=labels, **settings))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(TEXT_WORDS, size=rng.integers(3, 12))) for _ in range(count)]


def write_rte(folder: Path, train: int = 24, dev: int = 12, test: int = 5) -> Path:
    """Original RTE layout; the label is whether the second sentence starts with the first one's first word."""
    for seed, (name, count) in enumerate((("train", train), ("dev", dev), ("test", test))):
        firsts, seconds = sentences(count, 2 * seed), sentences(count, 2 * seed + 1)
        seconds = [f"{a.split()[0]} {b}" if i % 2 else b for i, (a, b) in enumerate(zip(firsts, seconds, strict=True))]
        rows = [[str(i), a, b, LABELS[(i + 1) % 2]] for i, (a, b) in enumerate(zip(firsts, seconds, strict=True))]
        header = ["index", "sentence1", "sentence2", "label"]
        if name == "test":
            header, rows = header[:3], [row[:3] for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """Paths: `model` (dropout 0.1), `still` (the same weights without dropout) and `data`."""
    folder = tmp_path_factory.mktemp("tiny")
    return SimpleNamespace(
        model=write_model(folder / "model"),
        still=write_model(folder / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        data=write_rte(folder / "data"),
    )


def flags(tiny: SimpleNamespace, output: Path, *more: str, model: Path | None = None, train: bool = True) -> list[str]:
    """A command line on the tiny model and data: 3 steps of 8 examples per epoch."""
    words = ["--model_name_or_path", str(model or tiny.model), "--task_name", "RTE", "--data_dir", str(tiny.data)]
    words += ["--output_dir", str(output), "--max_seq_length", "32", "--disable_tqdm", "--do_eval"]
    if train:
        words += ["--do_train", "--per_gpu_train_batch_size", "8", "--learning_rate", "1e-3", "--logging_steps", "1"]
        words += [] if "--report_to" in more else ["--report_to", "none"]
    return words + [str(word) for word in more]


def execute(words: list[str]) -> None:
    run(parse_arguments(words))


def result_of(output: Path) -> dict:
    return json.loads((output / "result.json").read_text())


def log_of(output: Path, key: str) -> list[dict]:
    """The lines of metrics.jsonl that have a key."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
