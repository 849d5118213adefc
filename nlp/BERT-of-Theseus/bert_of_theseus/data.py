"""Examples of a task from its files or from the hub, carved, limited and tokenised."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from bert_of_theseus.tables import encode_label, parse_score, read_table
from bert_of_theseus.tasks import DIAGNOSTICS, HUB_DATASET, Task
from common.run.errors import UserError

_CHUNK = 10_000  # texts tokenised at once: enough to keep every core busy, little enough memory
# where the diagnostics may lie, from MNLI's folder
_DIAGNOSTICS = ("diagnostic.tsv", "AX.tsv", "../diagnostic.tsv", "../diagnostic/diagnostic.tsv", "../AX/AX.tsv")
_SCORE_BINS = 5  # a selection split of a regression is stratified by quintiles of the score


@dataclass(frozen=True)
class Examples:
    """One set of a task.

    Attributes:
        task: the task, with the labels of the training file where it came without.
        texts: one list of N texts for each of the task's text columns.
        labels: (N,) int64 class numbers or float64 scores; None for a test set.
    """

    task: Task
    texts: tuple[list[str], ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.texts[0])

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """The examples at these places, in this order."""
        texts = tuple([column[i] for i in indices] for column in self.texts)
        return dataclasses.replace(self, texts=texts, labels=None if self.labels is None else self.labels[indices])


def load_task_data(
    task: Task,
    data_dir: str | Path | None = None,
    *,
    train_file: str | Path | None = None,
    dev_file: str | Path | None = None,
    test_file: str | Path | None = None,
    sets: Collection[str] | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Examples]:
    """Read sets of a task.

    Args:
        task: from `get_task` or `custom_task`.
        data_dir: folder of a GLUE task with `<set>.tsv`; None reads `nyu-mll/glue` from the hub.
        train_file: training file (.tsv, .csv, .jsonl) of a custom task; its labels become the task's, sorted as
            numbers where all are whole numbers, as text otherwise.
        dev_file: file of a custom task with labels, to evaluate on.
        test_file: file of a custom task to predict; its labels, if any, are not read.
        sets: names of the sets to read; by default training and evaluation sets, for a custom task all that were given.
        cache_dir: where `datasets` keeps what it downloads.

    Returns:
        Set name -> examples, in the order of `task.splits`.

    Raises:
        UserError: a bad file (see `tables`), a training file with one class, a hub that cannot be reached, files given
            for a GLUE task or a folder for a custom one, a set that the task does not have or that got no file.
    """
    given = {"train": train_file, "dev": dev_file, "test": test_file}
    given = {name: Path(file) for name, file in given.items() if file is not None}
    if task.hub_config is not None and given:
        raise UserError(
            f"files of one's own ({', '.join(map(str, given.values()))}) are for a custom task, not {task.name}"
        )
    if task.hub_config is None and data_dir is not None:
        raise UserError(f"a custom task takes files, not a folder: {data_dir}")

    if sets is None:
        sets = given if task.hub_config is None else ("train", *task.dev_sets)
    if unknown := [name for name in sets if name not in task.splits]:
        raise UserError(f"{task.name} has no set {unknown[0]!r}; it has {', '.join(task.splits)}")
    sets = [name for name in task.splits if name in sets]

    if task.hub_config is None:
        if missing := [name for name in sets if name not in given]:
            raise UserError(f"no {missing[0]} file was given for the custom task")
        if not task.regression:
            if "train" not in given:
                raise UserError("the labels of a custom task are read from its training file: give --train_file")
            task = _with_labels_of(task, given["train"])
        return {name: _from_file(task, given[name], name) for name in sets}
    if data_dir is not None:
        folder = Path(data_dir)
        for name in sets:
            if not (folder / f"{name}.tsv").is_file():
                layout = ", ".join(f"{each}.tsv" for each in task.splits)
                raise UserError(
                    f"{folder / name}.tsv: no such file; --data_dir for {task.name} is a folder with {layout}"
                )
        return {name: _from_file(task, folder / f"{name}.tsv", name) for name in sets}
    return {name: _from_hub(task, name, cache_dir) for name in sets}


def load_diagnostics(data_dir: str | Path | None, cache_dir: str | Path | None = None) -> dict[str, Examples]:
    """GLUE's diagnostics (AX), by set name; empty where they are not to be had, which is printed.

    Args:
        data_dir: MNLI's folder: `diagnostic.tsv` or `AX.tsv` in it, or beside it as GLUE's download scripts put them;
            None reads the hub's.
        cache_dir: as for `load_task_data`.

    Raises:
        UserError: a bad file.
    """
    (name,) = DIAGNOSTICS.splits
    if data_dir is None:
        try:
            return {name: _from_hub(DIAGNOSTICS, name, cache_dir)}
        except (UserError, ValueError):  # MNLI may be in the cache, and these not
            print(f"note: no AX.tsv will be written, as {HUB_DATASET} {DIAGNOSTICS.hub_config} cannot be read")
            return {}
    folder = Path(data_dir)
    for place in _DIAGNOSTICS:
        if (path := folder / place).is_file():
            return {name: _from_file(DIAGNOSTICS, path, name)}
    print(f"note: no AX.tsv will be written, as {folder} has none of {', '.join(_DIAGNOSTICS)}")
    return {}


def selection_split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Carve a part from the training set to choose checkpoints on: (what is left, the part), both in file order.

    The part has ceil(fraction * N) examples, the same for the same seed, with the classes (for a regression: the
    quintiles of the score) in the proportions of the whole.

    Raises:
        UserError: a fraction outside (0, 1), or too few examples to have every class on both sides.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the selection split must be between 0 and 1, got {fraction:g}")
    strata = examples.labels
    if examples.task.regression:
        edges = np.quantile(strata, np.linspace(0, 1, _SCORE_BINS + 1)[1:-1])
        strata = np.searchsorted(np.unique(edges), strata)
    try:
        left, part = train_test_split(np.arange(len(examples)), test_size=fraction, random_state=seed, stratify=strata)
    except ValueError as error:
        raise UserError(f"a selection split of {fraction:g} from {len(examples)} examples: {error}") from None
    return examples.subset(np.sort(left)), examples.subset(np.sort(part))


def random_subset(examples: Examples, count: int, seed: int) -> Examples:
    """`count` examples drawn at random, in file order; all of them if there are no more. The same for the same seed."""
    drawn = np.random.default_rng(seed).permutation(len(examples))[:count]
    return examples.subset(np.sort(drawn))


class TokenizedDataset(torch.utils.data.Dataset):
    """Token ids of N examples, kept as flat arrays (a set of QQP's size stays below 200 MB).

    An item is a dict of plain lists, for a padding collator: the tokenizer's own model inputs (`input_ids`,
    `attention_mask`, and `token_type_ids` where it makes them) and, except in a test set, `labels` (int, or float for
    a regression).

    Attributes:
        lengths: (N,) int64, the number of tokens of every item, padding not counted.
        num_truncated: how many examples were longer than the limit.
    """

    def __init__(
        self,
        inputs: dict[str, np.ndarray],
        offsets: np.ndarray,
        lengths: np.ndarray,
        labels: np.ndarray | None,
        num_truncated: int,
    ):
        """inputs: name -> (total tokens,) int32; offsets: (N + 1,) where every example starts; labels: (N,) or None."""
        self._inputs = inputs
        self._offsets = offsets
        self._labels = labels
        self.lengths = lengths
        self.num_truncated = num_truncated

    @property
    def largest_id(self) -> int:
        """The largest token id, which the model's vocabulary must reach."""
        return int(self._inputs["input_ids"].max())

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) class numbers or scores, or None."""
        return self._labels

    @property
    def sha256(self) -> str:
        """The hash of all that the set holds, for a checkpoint to be told from one of other data."""
        digest = hashlib.sha256()
        for values in (*self._inputs.values(), self._offsets, self._labels):
            if values is not None:
                digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int] | int | float]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        place = slice(self._offsets[index], self._offsets[index + 1])
        item = {name: values[place].tolist() for name, values in self._inputs.items()}
        if self._labels is not None:
            item["labels"] = self._labels[index].item()
        return item


def sha256_of_sets(datasets: Mapping[str, TokenizedDataset]) -> str:
    """One hash of the sets that a run trains, selects and evaluates on."""
    digest = hashlib.sha256()
    for name, dataset in datasets.items():
        if dataset.labels is not None:  # not those to predict
            digest.update(f"{name} {dataset.sha256}\n".encode())
    return digest.hexdigest()


def balanced_weights(labels: np.ndarray, classes: int) -> torch.Tensor:
    """(classes,) weights N / (classes * examples of the class), 0 for a class without examples."""
    counts = np.bincount(labels, minlength=classes)
    weights = np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 0.0)
    return torch.tensor(weights, dtype=torch.float32)


def tokenize(examples: Examples, tokenizer, max_length: int, pad_to_max_length: bool = False) -> TokenizedDataset:
    """Tokenise a set, in batches; what is over `max_length` is cut from the longer text first.

    Args:
        examples: N examples.
        tokenizer: any transformers tokenizer.
        max_length: the most tokens an example may have, the special ones included.
        pad_to_max_length: pad every example to `max_length` here, instead of to its batch's longest in the collator.

    Raises:
        UserError: a `max_length` that the model does not take, or that has no room for a token of text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(examples.texts) == 2)
    lowest, highest = special + len(examples.texts), tokenizer.model_max_length
    if not lowest <= max_length <= highest:
        limit = f"{lowest} to {highest}" if highest < 1_000_000 else f"at least {lowest}"  # no limit is written as 1e30
        raise UserError(f"a sequence length of {max_length} does not fit this tokenizer; use {limit}")

    padding = "max_length" if pad_to_max_length else False
    parts: dict[str, list[np.ndarray]] = {}
    widths, lengths, num_truncated = [], [], 0
    for start in range(0, len(examples), _CHUNK):
        texts = [column[start : start + _CHUNK] for column in examples.texts]
        batch = tokenizer(
            *texts,
            padding=padding,
            truncation=False,  # stated, or a max_length without padding would imply truncation
            max_length=max_length,
            return_attention_mask=True,
            verbose=False,
        )
        long = [i for i, ids in enumerate(batch["input_ids"]) if len(ids) > max_length]
        if long:
            # only these a second time: one pass with truncation does not tell what it cut
            texts = [[column[i] for i in long] for column in texts]
            cut = tokenizer(*texts, truncation="longest_first", max_length=max_length, return_attention_mask=True)
            for name, rows in cut.items():
                for i, row in zip(long, rows, strict=True):
                    batch[name][i] = row
        num_truncated += len(long)
        widths.extend(len(ids) for ids in batch["input_ids"])
        lengths.extend(sum(mask) for mask in batch["attention_mask"])
        for name, rows in batch.items():
            parts.setdefault(name, []).append(np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]))
    inputs = {name: np.concatenate(chunks) for name, chunks in parts.items()}
    offsets = np.concatenate([[0], np.cumsum(widths)])
    return TokenizedDataset(inputs, offsets, np.asarray(lengths), examples.labels, num_truncated)


def _with_labels_of(task: Task, path: Path) -> Task:
    words = set()
    for row in read_table(path, [task.label_column]):
        word = row.values[0]
        if not word.strip() or not word.isprintable():
            raise UserError(f"{path} line {row.line}: {word!r} in column {task.label_column!r} is no label")
        words.add(word)
    if len(words) < 2:
        raise UserError(f"{path}: only one label, {words.pop()!r}; a classification needs at least two")
    alike: dict[str, list[str]] = {}
    for word in sorted(words):
        alike.setdefault(" ".join(word.lower().split()), []).append(word)
    for same in alike.values():
        if len(same) > 1:
            listed = ", ".join(map(repr, same))
            print(f"warning: {path}: {listed} are labels of their own; do they mean the same class?", flush=True)
    return dataclasses.replace(task, labels=tuple(sorted(words, key=_label_order(words))))


def _label_order(words: set[str]) -> Callable[[str], Any]:
    """Whole numbers count as such: as text, 10 would come before 2, and a model's twelve classes be mixed up."""
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", word) for word in words):
        return lambda word: (int(word), word)
    return lambda word: word


def classes_in_words(task: Task) -> str:
    """The class list for the log: how many, and the first few in their order."""
    shown = ", ".join(task.labels[:8]) + (", ..." if len(task.labels) > 8 else "")
    return f"{len(task.labels)} classes: {shown}"


def _from_file(task: Task, path: Path, set_name: str) -> Examples:
    labelled = set_name not in task.test_sets
    columns = [*task.text_columns, task.label_column] if labelled else task.text_columns
    skipped = [] if set_name in task.broken_rows else None
    rows = list(read_table(path, columns, header=task.headerless.get(set_name), skipped=skipped))
    if skipped:
        print(f"{path}: rows with a wrong number of columns left out: {len(skipped)}, the first in line {skipped[0]}")
    texts = tuple([row.values[i] for row in rows] for i in range(len(task.text_columns)))
    labels = None
    if labelled and task.regression:
        labels = np.array([parse_score(path, row.line, row.values[-1]) for row in rows], dtype=np.float64)
    elif labelled:
        labels = np.array([encode_label(path, row.line, row.values[-1], task.labels) for row in rows], dtype=np.int64)
    return Examples(task, texts, labels)


def _from_hub(task: Task, set_name: str, cache_dir: str | Path | None) -> Examples:
    import datasets  # slow to import, and not needed for files

    try:
        table = datasets.load_dataset(
            HUB_DATASET,
            task.hub_config,
            split=task.splits[set_name],
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except OSError as error:  # datasets' and huggingface_hub's errors of connection are OSErrors
        layout = ", ".join(f"{name}.tsv" for name in task.splits)
        raise UserError(f"{error}; without the hub, pass --data_dir, a folder with {layout} of {task.name}") from error
    texts = tuple(list(table[column][:]) for column in task.hub_text_columns)
    labels = None
    if set_name not in task.test_sets:
        labels = np.asarray(table["label"][:], dtype=np.float64 if task.regression else np.int64)
        valid = np.isfinite(labels) if task.regression else (labels >= 0) & (labels < len(task.labels))
        if not valid.all():
            bad = int(np.argmin(valid))
            raise UserError(f"{HUB_DATASET} {task.hub_config}, {set_name} row {bad}: {labels[bad]} is no label")
    return Examples(task, texts, labels)
