"""The nine GLUE tasks as one table, and tasks of the user's own.

Columns are those of the original TSV files (gluebenchmark.com); labels are in the order of the hub's integers
(nyu-mll/glue), written as in the TSV files and as the GLUE server wants them back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.run.errors import UserError

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What one task's files, labels and metrics are called.

    Attributes:
        name: the GLUE server's spelling, or "custom".
        text_columns: one or two column names of the TSV file.
        label_column: its column with the label or the score; test files have none.
        labels: label words in the order of the class numbers; empty for regression, and for a custom task whose
            labels are still to be found in its training file.
        metrics: key of `metrics.METRICS`.
        primary: the one metric that `best` and the tables go by.
        hub_config: the configuration of `HUB_DATASET`; None for a custom task.
        hub_text_columns: the hub's names of `text_columns`; its label column is always `label`.
        splits: set name -> the hub's name for it. The set's TSV file is `<set name>.tsv`.
        headerless: set name -> column names, for files without a header line.
        broken_rows: sets whose original file has rows with a wrong number of columns, which are to be left out.
        predictions: test set -> file name that the server accepts.
        regression: labels are scores.
        score_range: (lowest, highest) score that the server accepts; None for no limits.
        words: what the hub calls labels that the files write as numbers, in their order; models use these names.
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    metrics: str
    primary: str
    hub_config: str | None
    hub_text_columns: tuple[str, ...]
    splits: Mapping[str, str]
    predictions: Mapping[str, str]
    headerless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    broken_rows: tuple[str, ...] = ()
    regression: bool = False
    score_range: tuple[float, float] | None = None
    words: tuple[str, ...] = ()

    @property
    def num_outputs(self) -> int:
        """Width of the classifier: the number of labels, 1 for regression."""
        return 1 if self.regression else len(self.labels)

    @property
    def dev_sets(self) -> tuple[str, ...]:
        """Names of the evaluation sets, e.g. ("dev",), or matched before mismatched for MNLI."""
        return tuple(name for name in self.splits if name.startswith("dev"))

    @property
    def test_sets(self) -> tuple[str, ...]:
        """Names of the sets without labels."""
        return tuple(name for name in self.splits if name.startswith("test"))


_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_MNLI_SPLITS = {
    "train": "train",
    "dev_matched": "validation_matched",
    "dev_mismatched": "validation_mismatched",
    "test_matched": "test_matched",
    "test_mismatched": "test_mismatched",
}


def _glue(
    name: str, texts: Sequence[str], label: str, labels: Sequence[str], metrics: str, primary: str, **other
) -> Task:
    values = {
        "hub_config": name.replace("-", "").lower(),
        "hub_text_columns": tuple(texts),
        "splits": _SPLITS,
        "predictions": {"test": f"{name}.tsv"},
    }
    return Task(name, tuple(texts), label, tuple(labels), metrics, primary, **{**values, **other})


_BINARY = ("0", "1")
_PAIR = ("sentence1", "sentence2")

_COLA_FILES = {"train": ("source", "label", "mark", "sentence"), "dev": ("source", "label", "mark", "sentence")}
_MNLI_PREDICTIONS = {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}

TASKS: tuple[Task, ...] = (
    _glue(
        "CoLA",
        ("sentence",),
        "label",
        _BINARY,
        "matthews",
        "mcc",
        headerless=_COLA_FILES,
        words=("unacceptable", "acceptable"),
    ),
    _glue("SST-2", ("sentence",), "label", _BINARY, "accuracy", "accuracy", words=("negative", "positive")),
    _glue(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        _BINARY,
        "accuracy_f1",
        "f1",
        hub_text_columns=_PAIR,
        words=("not_equivalent", "equivalent"),
    ),
    _glue("STS-B", _PAIR, "score", (), "correlation", "pearson", regression=True, score_range=(0.0, 5.0)),
    _glue(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        _BINARY,
        "accuracy_f1",
        "accuracy",
        words=("not_duplicate", "duplicate"),
        broken_rows=("train",),  # github.com/nyu-mll/GLUE-baselines/issues/5
    ),
    _glue(
        "MNLI",
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "accuracy",
        hub_text_columns=("premise", "hypothesis"),
        splits=_MNLI_SPLITS,
        predictions=_MNLI_PREDICTIONS,
    ),
    _glue("QNLI", ("question", "sentence"), "label", ("entailment", "not_entailment"), "accuracy", "accuracy"),
    _glue("RTE", _PAIR, "label", ("entailment", "not_entailment"), "accuracy", "accuracy"),
    _glue("WNLI", _PAIR, "label", _BINARY, "accuracy", "accuracy", words=("not_entailment", "entailment")),
)

# GLUE's diagnostics, which a model of MNLI predicts: sentence pairs with MNLI's labels that the server alone knows
DIAGNOSTICS = replace(
    next(task for task in TASKS if task.name == "MNLI"),
    name="AX",
    hub_config="ax",
    splits={"test_diagnostics": "test"},
    predictions={"test_diagnostics": "AX.tsv"},
)

_BY_KEY = {task.hub_config: task for task in TASKS}


def get_task(name: str) -> Task:
    """The GLUE task of that name, whatever its case and hyphens (`sst2`, `SST-2`).

    Raises:
        UserError: there is none; the message lists the names.
    """
    task = _BY_KEY.get(name.replace("-", "").lower())
    if task is None:
        raise UserError(f"unknown task {name!r}; choose one of {', '.join(t.name for t in TASKS)}, or custom")
    return task


def custom_task(text_columns: Sequence[str], label_column: str, regression: bool = False) -> Task:
    """A task on files of the user's own: classification (accuracy, macro F1) or regression (Pearson, Spearman).

    Its labels are still empty: `load_task_data` takes those of the training file, in their order.

    Args:
        text_columns: one column, or two for pairs of texts.
        label_column: the column with the label word or the score.
        regression: the label column holds scores.

    Raises:
        UserError: not one or two different text columns, the label among the texts.
    """
    texts = tuple(text_columns)
    columns = [*texts, label_column]
    if len(texts) not in (1, 2) or len(set(columns)) != len(columns):
        raise UserError(f"a task needs one or two text columns and another one for the label, got {', '.join(columns)}")
    return Task(
        name="custom",
        text_columns=texts,
        label_column=label_column,
        labels=(),
        metrics="correlation" if regression else "accuracy_macro_f1",
        primary="pearson" if regression else "accuracy",
        hub_config=None,
        hub_text_columns=(),
        splits={name: name for name in ("train", "dev", "test")},
        predictions={"test": "predictions.tsv"},
        regression=regression,
    )
