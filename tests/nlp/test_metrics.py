"""Metrics against hand-computed numbers, and prediction files as the GLUE server takes them."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest

from bert_of_theseus.metrics import METRICS, compute, decide
from bert_of_theseus.predictions import write_predictions
from bert_of_theseus.tasks import TASKS, custom_task, get_task

# 8 examples: 3 true positives, 1 false positive, 2 false negatives, 2 true negatives
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0])
PREDICTED = np.array([1, 1, 1, 1, 0, 0, 0, 0])
LOGITS = np.stack([1.0 - PREDICTED, PREDICTED], axis=1)
CUSTOM = replace(custom_task(["t"], "y"), labels=("calm", "glad", "sad"))
SCORES = custom_task(["t"], "y", regression=True)


def test_matthews_of_cola():
    expected = (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))
    assert compute(get_task("cola"), LOGITS, LABELS) == {"mcc": pytest.approx(expected)}


@pytest.mark.parametrize("name", ["sst-2", "qnli", "rte", "wnli"])
def test_accuracy(name):
    assert compute(get_task(name), LOGITS, LABELS) == {"accuracy": 5 / 8}


def test_mnli_accuracy_over_three_classes():
    logits = np.eye(3)[[0, 1, 2, 2]]
    assert compute(get_task("mnli"), logits, np.array([0, 1, 2, 0])) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_of_the_positive_class_beside_accuracy(name):
    expected = 2 * 3 / (2 * 3 + 1 + 2)
    assert compute(get_task(name), LOGITS, LABELS) == {"accuracy": 5 / 8, "f1": pytest.approx(expected)}


@pytest.mark.parametrize("task", [get_task("sts-b"), SCORES])
def test_correlations(task):
    # deviations (-2, -1, 3) and (-1, 0, 1): 5 / sqrt(14 * 2); ranks in the same order
    scores = compute(task, np.array([[1.0], [2.0], [6.0]]), np.array([0.0, 1.0, 2.0]))
    assert scores == {"pearson": pytest.approx(5 / math.sqrt(28)), "spearman": pytest.approx(1.0)}


def test_custom_macro_f1_is_the_mean_over_the_classes():
    logits = np.eye(3)[[0, 0, 1, 1]]
    # class 0: one hit, one false alarm; class 1: one hit, one false alarm, one miss; class 2: one miss
    scores = compute(CUSTOM, logits, np.array([0, 1, 1, 2]))
    assert scores == {"accuracy": 0.5, "f1": pytest.approx((2 / 3 + 1 / 2 + 0) / 3), "balanced_accuracy": 0.5}


@pytest.mark.parametrize("task", [*TASKS, CUSTOM, SCORES], ids=lambda task: task.name)
def test_the_primary_metric_is_among_the_computed_ones(task):
    logits, labels = np.eye(4)[:, : task.num_outputs], np.array([0, 1, 1, 0])
    assert task.primary in compute(task, logits, labels)
    assert task.metrics in METRICS


@pytest.mark.parametrize("name", ["cola", "mrpc", "rte"])
@pytest.mark.parametrize("constant", [0, 1])
def test_a_constant_class_has_finite_metrics(name, constant):
    logits = np.eye(2)[[constant] * 4]
    scores = compute(get_task(name), logits, np.array([0, 1, 1, 0]))
    expected = {"mcc": 0.0, "accuracy": 0.5, "f1": 2 * constant / 3}
    assert scores == pytest.approx({key: expected[key] for key in scores})


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [([2.5, 2.5, 2.5], [0.0, 1.0, 5.0]), ([0.0, 1.0, 5.0], [3.8, 3.8, 3.8]), ([1.0], [2.0])],
    ids=["constant output", "constant label", "one example"],
)
def test_a_correlation_with_a_constant_is_zero_without_a_warning(outputs, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute(get_task("stsb"), np.array(outputs), np.array(labels)) == {"pearson": 0.0, "spearman": 0.0}


def test_metrics_are_plain_floats():
    assert {type(value) for value in compute(get_task("mrpc"), LOGITS, LABELS).values()} == {float}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_make_no_metric(bad):
    with pytest.raises(FloatingPointError, match="RTE"):
        compute(get_task("rte"), np.array([[0.0, bad]]), np.array([1]))


@pytest.mark.parametrize(
    ("name", "logits", "labels"),
    [
        ("rte", np.zeros((4, 3)), np.zeros(4)),
        ("rte", np.zeros((4, 2)), np.zeros(3)),
        ("rte", np.zeros((0, 2)), np.zeros(0)),
        ("stsb", np.zeros((4, 2)), np.zeros(4)),
        ("stsb", np.zeros(4), np.zeros((4, 1))),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, logits, labels):
    with pytest.raises(ValueError, match=r"RTE|STS-B"):
        compute(get_task(name), logits, labels)


def test_scores_are_decided_from_a_column_or_a_vector():
    assert (
        decide(SCORES, np.array([[1.5], [2.0]])).tolist() == decide(SCORES, np.array([1.5, 2.0])).tolist() == [1.5, 2.0]
    )


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("cola", "CoLA.tsv", "01"),
        ("sst2", "SST-2.tsv", "01"),
        ("mrpc", "MRPC.tsv", "01"),
        ("qqp", "QQP.tsv", "01"),
        ("wnli", "WNLI.tsv", "01"),
        ("qnli", "QNLI.tsv", ("entailment", "not_entailment")),
        ("rte", "RTE.tsv", ("entailment", "not_entailment")),
    ],
)
def test_files_and_words_of_the_server(tmp_path, name, file, words):
    path = write_predictions(get_task(name), tmp_path, np.array([[2.0, 1.0], [0.0, 3.0]]))
    assert path == tmp_path / file
    assert path.read_bytes() == f"index\tprediction\n0\t{words[0]}\n1\t{words[1]}\n".encode()


@pytest.mark.parametrize(("set_name", "file"), [("test_matched", "MNLI-m.tsv"), ("test_mismatched", "MNLI-mm.tsv")])
def test_mnli_has_a_file_for_each_test_set(tmp_path, set_name, file):
    path = write_predictions(get_task("mnli"), tmp_path, np.eye(3), set_name)
    assert path.name == file
    assert path.read_text().splitlines()[1:] == ["0\tentailment", "1\tneutral", "2\tcontradiction"]


def test_similarity_scores_are_clipped_and_rounded(tmp_path):
    path = write_predictions(get_task("stsb"), tmp_path, np.array([[-0.2], [3.14159], [5.7]]))
    assert path.name == "STS-B.tsv"
    assert path.read_text().splitlines()[1:] == ["0\t0.000", "1\t3.142", "2\t5.000"]


def test_custom_predictions_are_label_words(tmp_path):
    path = write_predictions(CUSTOM, tmp_path, np.eye(3)[[2, 0]])
    assert path == tmp_path / "predictions.tsv"
    assert path.read_text() == "index\tprediction\n0\tsad\n1\tcalm\n"


def test_custom_scores_keep_single_precision(tmp_path):
    outputs = np.array([-1234.5678, 1.2345678e-7], dtype=np.float32)
    words = [line.split("\t")[1] for line in write_predictions(SCORES, tmp_path, outputs).read_text().splitlines()[1:]]
    assert [np.float32(word) for word in words] == outputs.tolist()


def test_predictions_replace_an_older_file_and_leave_nothing_beside_it(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_predictions(CUSTOM, folder, np.eye(3))
    write_predictions(CUSTOM, folder, np.eye(3)[:1])
    assert [path.name for path in folder.iterdir()] == ["predictions.tsv"]
    assert (folder / "predictions.tsv").read_text() == "index\tprediction\n0\tcalm\n"


def test_a_failed_write_keeps_the_older_file(tmp_path, monkeypatch):
    path = write_predictions(CUSTOM, tmp_path, np.eye(3)[:1])

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_predictions(CUSTOM, tmp_path, np.eye(3))
    assert path.read_text() == "index\tprediction\n0\tcalm\n"
