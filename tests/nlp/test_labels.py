"""Classes of the data and of the model: their order, their names, heads of another size, weights of classes."""

import json
import math

import numpy as np
import pytest
import torch
from nlp_fixtures import (
    execute,
    flags,
    lines,
    log_of,
    result_of,
    tiny,  # noqa: F401
    tiny_config,
    tiny_tokenizer,
    weights_of,
)
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from bert_of_theseus.arguments import parse_arguments
from bert_of_theseus.data import balanced_weights, load_task_data
from bert_of_theseus.metrics import compute
from bert_of_theseus.predictions import write_probabilities
from bert_of_theseus.tasks import custom_task, get_task
from bert_of_theseus.training import weigh_classes
from common.run.errors import UserError

TEXTS = [
    "the cat sat",
    "a dog ran",
    "the red bird flew",
    "an old man slept",
    "a big fish swam",
    "the tree and the river",
]


def write_rows(path, labels):
    rows = [
        f"{TEXTS[i % len(TEXTS)]} {'and the book ' * (i // len(TEXTS))},{label}\n" for i, label in enumerate(labels)
    ]
    path.write_text("".join(["text,label\n", *rows]))
    return path


def named_model(folder, names=None, count: int | None = None):
    """A random model with such class names (transformers' own without) that puts the texts into several classes."""
    torch.manual_seed(5)
    settings = {"id2label": dict(enumerate(names))} if names else {"num_labels": count}
    model = BertForSequenceClassification(tiny_config(**settings))
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def predicted(folder, texts) -> list[int]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        batches = [tiny_tokenizer()([text], return_tensors="pt") for text in texts]
        return [model(**batch).logits.argmax().item() for batch in batches]


def labelled_by(model, names) -> list[str]:
    """What a model calls the texts, by the names of its classes."""
    return [names[i] for i in predicted(model, TEXTS)]


def words(tmp_path, model, data, *more, train=False):
    found = ["--model_name_or_path", model, "--task_name", "custom", "--output_dir", tmp_path / "run", "--do_eval"]
    found += ["--train_file", data, "--dev_file", data, "--text_columns", "text", "--label_column", "label"]
    found += ["--disable_tqdm", "--max_seq_length", "32", *more]
    found += ["--do_train", "--report_to", "none", "--max_steps", "2", "--logging_steps", "1"] if train else []
    return [str(word) for word in found]


def accuracy(tmp_path, *arguments) -> float:
    execute(words(tmp_path, *arguments))
    return json.loads((tmp_path / "run" / "evaluation.json").read_text())["dev_accuracy"]


# order


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    data = write_rows(tmp_path / "train.csv", range(12))
    task = load_task_data(custom_task(["text"], "label"), train_file=data)["train"].task
    assert task.labels == tuple(str(i) for i in range(12))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["2", "-1", "10"], ("-1", "2", "10")), (["2", "10", "x"], ("10", "2", "x")), (["1.5", "10"], ("1.5", "10"))],
)
def test_only_whole_numbers_alone_count_as_numbers(tmp_path, labels, expected):
    data = write_rows(tmp_path / "train.csv", labels)
    assert load_task_data(custom_task(["text"], "label"), train_file=data)["train"].task.labels == expected


def test_a_model_of_twelve_numbered_classes_is_measured_as_it_is(tmp_path):
    model = named_model(tmp_path / "model", count=12)
    classes = predicted(model, TEXTS)
    data = write_rows(tmp_path / "dev.csv", classes + list(range(12)))
    expected = np.mean([p == int(row.rsplit(",", 1)[1]) for row, p in rows_with_predictions(model, data)])
    assert accuracy(tmp_path, model, data) == pytest.approx(expected)
    assert expected >= len(classes) / (len(classes) + 12)


def rows_with_predictions(model, data):
    rows = lines(data)[1:]
    return list(zip(rows, predicted(model, [row.rsplit(",", 1)[0] for row in rows]), strict=True))


def test_the_class_list_is_printed(tmp_path, capsys):
    data = write_rows(tmp_path / "train.csv", range(12))
    execute(words(tmp_path, named_model(tmp_path / "model", count=12), data))
    assert "12 classes: 0, 1, 2, 3, 4, 5, 6, 7, ...\n" in capsys.readouterr().out


def test_labels_that_differ_in_case_or_blanks_alone_are_warned_of(tmp_path, capsys):
    data = write_rows(tmp_path / "train.csv", ["pos", "pos ", "Pos", "neg"])
    load_task_data(custom_task(["text"], "label"), train_file=data)
    [line] = capsys.readouterr().out.splitlines()
    assert line == f"warning: {data}: 'Pos', 'pos', 'pos ' are labels of their own; do they mean the same class?"


# names


@pytest.mark.parametrize(
    "label_map", [("positive", "negative"), ("pos=positive", "neg=negative"), ("neg=negative", "pos=positive")]
)
def test_a_model_with_names_of_its_own_needs_a_map_and_is_then_measured_right(tmp_path, label_map):
    model = named_model(tmp_path / "model", ("positive", "negative"))
    truth = labelled_by(model, ("pos", "neg"))
    assert len(set(truth)) == 2
    data = write_rows(tmp_path / "dev.csv", truth)
    with pytest.raises(UserError, match=r"calls its classes positive, negative, the data neg, pos; .* --label_map"):
        execute(words(tmp_path, model, data))
    if "=" not in label_map[0]:
        label_map = ("negative", "positive")  # in the data's order: neg, pos
    assert accuracy(tmp_path, model, data, "--label_map", *label_map) == 1.0


def test_a_compressed_model_has_the_datas_names_in_the_datas_order(tmp_path):
    model = named_model(tmp_path / "model", ("positive", "negative"))
    data = write_rows(tmp_path / "dev.csv", labelled_by(model, ("pos", "neg")))
    execute(words(tmp_path, model, data, "--label_map", "negative", "positive", train=True))
    student = tmp_path / "run" / "student"
    assert AutoModelForSequenceClassification.from_pretrained(student).config.id2label == {0: "neg", 1: "pos"}
    before, after = weights_of(model)["classifier.weight"], weights_of(student)["classifier.weight"]
    assert torch.equal(after, before[[1, 0]])
    assert result_of(tmp_path / "run")["predecessor_evaluation"]["dev_accuracy"] == 1.0


@pytest.mark.parametrize("label_map", [("positive",), ("positive", "positive"), ("pos=positive", "x=negative")])
def test_a_map_that_is_none_tells_both_lists(tmp_path, label_map):
    model = named_model(tmp_path / "model", ("positive", "negative"))
    data = write_rows(tmp_path / "dev.csv", ["neg", "pos"])
    with pytest.raises(UserError, match=r"--label_map .*the data has neg, pos, the model positive, negative"):
        execute(words(tmp_path, model, data, "--label_map", *label_map))


def test_names_that_the_hub_gives_to_a_tasks_numbers_fit_them(tiny, tmp_path):  # noqa: F811
    for name in ("dev", "train"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\nthe cat\t0\na dog\t1\n")
    for names, is_right in ((("negative", "positive"), True), (("POSITIVE", "NEGATIVE"), False), (("a", "b"), False)):
        model = named_model(tmp_path / f"model{names[0]}", names)
        found = flags(tiny, tmp_path / "run", model=model, train=False)
        found[found.index("RTE")], found[found.index(str(tiny.data))] = "SST-2", str(tmp_path)
        if is_right:
            execute(found)
        else:
            with pytest.raises(UserError, match="--label_map"):
                execute(found)


def test_where_the_head_is_trained_names_do_not_matter(tmp_path):
    model = named_model(tmp_path / "model", ("positive", "negative"))
    data = write_rows(tmp_path / "dev.csv", ["neg", "pos", "pos"])
    execute(words(tmp_path, model, data, "--method", "finetune", train=True))


# heads


@pytest.mark.parametrize("more", [("--method", "finetune"), ("--finetune_predecessor",)])
def test_a_head_of_another_size_is_trained_anew_with_a_note(tmp_path, capsys, more):
    model = named_model(tmp_path / "model", count=3)
    data = write_rows(tmp_path / "dev.csv", ["neg", "pos", "pos"])
    execute(words(tmp_path, model, data, *more, train=True))
    note = (
        f"note: the classifier of {model} is of another size; classifier.bias, classifier.weight are initialised anew"
    )
    assert note in capsys.readouterr().out
    assert weights_of(tmp_path / "run" / "student")["classifier.weight"].shape == (2, 32)


@pytest.mark.parametrize("more", [(), ("--method", "kd")])
def test_a_head_of_another_size_is_refused_where_it_is_not_trained(tmp_path, more):
    model = named_model(tmp_path / "model", count=3)
    data = write_rows(tmp_path / "dev.csv", ["neg", "pos"])
    with pytest.raises(UserError, match=r"does not have the 2 output\(s\) of custom; .* --finetune_predecessor"):
        execute(words(tmp_path, model, data, *more, train=True))


# class weights and metrics


def test_balanced_weights_give_every_class_the_same_share():
    weights = balanced_weights(np.array([0, 0, 0, 2]), 3)
    assert weights.tolist() == pytest.approx([4 / (3 * 3), 0.0, 4 / 3])


@pytest.mark.parametrize("training", [True, False])
def test_class_weights_are_in_the_loss_of_training_alone(tmp_path, training):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(num_labels=3, hidden_dropout_prob=0.0)).train(training)
    weights, labels = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([0, 2, 2])
    weigh_classes(model, weights)
    output = model(input_ids=torch.tensor([[2, 5], [2, 6], [2, 7]]), labels=labels)
    expected = F.cross_entropy(output["logits"], labels, weights if training else None)
    torch.testing.assert_close(output["loss"], expected)


@pytest.mark.parametrize("method", ["theseus", "kd", "finetune"])
def test_every_method_takes_class_weights(tmp_path, method):
    model = named_model(tmp_path / "model", ("neg", "pos"))
    data = write_rows(tmp_path / "dev.csv", ["neg", "neg", "neg", "neg", "neg", "pos"])
    first = {}
    for name, more in (("plain", ()), ("balanced", ("--class_weights", "balanced"))):
        still = ("--pad_to_max_length", "--method", method)
        found = words(tmp_path / name, model, data, *still, *more, train=True)
        execute(found)
        first[name] = log_of(tmp_path / name / "run", "task_loss")[0]["task_loss"]
    assert math.isfinite(first["balanced"])
    assert first["balanced"] != pytest.approx(first["plain"], rel=1e-4)


def test_balanced_accuracy_is_the_mean_recall_of_the_classes():
    logits = np.eye(2)[[0, 0, 0, 0, 1]]
    task = load_labels(("n", "y"))
    scores = compute(task, logits, np.array([0, 0, 0, 1, 1]))
    assert scores["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


def load_labels(labels):
    from dataclasses import replace

    return replace(custom_task(["t"], "l"), labels=labels)


def test_a_correlation_that_is_not_defined_is_zero():
    task = custom_task(["t"], "s", regression=True)
    scores = compute(task, np.array([1.0, 1.0 + 1e-16, 1.0]), np.array([1e-200, 2e-200, 1e-200]))
    assert all(math.isfinite(value) for value in scores.values())


# probabilities


def test_probabilities_have_a_file_of_their_own(tmp_path):
    model = named_model(tmp_path / "model", ("neg", "pos"))
    data = write_rows(tmp_path / "dev.csv", ["neg", "pos"])
    execute(words(tmp_path, model, data, "--do_predict", "--test_file", data, "--probabilities"))
    folder = tmp_path / "run" / "predictions"
    head, *rows = [line.split("\t") for line in lines(folder / "predictions.probabilities.tsv")]
    assert head == ["index", "neg", "pos"]
    for row, (_, word) in zip(rows, (line.split("\t") for line in lines(folder / "predictions.tsv")[1:]), strict=True):
        values = [float(value) for value in row[1:]]
        assert sum(values) == pytest.approx(1, abs=2e-6)
        assert head[1 + int(np.argmax(values))] == word


def test_probabilities_are_those_of_the_softmax(tmp_path):
    path = write_probabilities(get_task("RTE"), tmp_path, np.array([[0.0, math.log(3)], [1000.0, 0.0]]))
    assert path.name == "RTE.probabilities.tsv"
    assert lines(path)[1:] == ["0\t0.250000\t0.750000", "1\t1.000000\t0.000000"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--do_eval --probabilities", "--probabilities needs --do_predict"),
        ("--do_train --do_eval --patience 2", "--patience needs --evaluate_during_training"),
        ("--do_eval --class_weights balanced", "--class_weights needs --do_train"),
        ("--do_train --task_name STS-B --class_weights balanced", "--class_weights has no effect on a regression"),
    ],
)
def test_flags_without_effect_are_refused(more, told):
    with pytest.raises(UserError, match=told):
        parse_arguments(f"--model_name_or_path m --task_name RTE --output_dir o {more}".split())
