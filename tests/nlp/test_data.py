"""Sets from files and from the hub, carving and limiting, and token ids as the Trainer's collator takes them."""

import json
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from nlp_fixtures import tiny_tokenizer
from transformers import DataCollatorWithPadding

from bert_of_theseus.data import (
    Examples,
    load_diagnostics,
    load_task_data,
    random_subset,
    selection_split,
    tokenize,
)
from bert_of_theseus.tasks import custom_task, get_task
from common.run.errors import UserError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##s"]
PAD, UNK, CLS, SEP, A = 0, 1, 2, 3, 5
WORDS = replace(custom_task(["text"], "label"), labels=("n", "y"))
PAIRS = replace(custom_task(["first", "second"], "label"), labels=("n", "y"))
SCORES = custom_task(["text"], "score", regression=True)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCABULARY, model_max_length=16)


@pytest.fixture
def rte(tmp_path):
    rows = ["0\tIt rains.\tIt is wet.\tentailment", "1\tIt rains.\tIt is dry.\tnot_entailment"]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tIt snows.\tIt is cold.\n")
    return tmp_path


def examples(labels, task=WORDS):
    dtype = np.float64 if task.regression else np.int64
    return Examples(task, ([f"text {i}" for i in range(len(labels))],), np.array(labels, dtype=dtype))


def of_texts(task, *columns):
    return Examples(task, columns, np.zeros(len(columns[0]), dtype=np.int64))


def test_training_and_evaluation_sets_are_read_by_default(rte):
    data = load_task_data(get_task("rte"), rte)
    assert list(data) == ["train", "dev"]
    assert data["dev"].texts == (["It rains.", "It rains."], ["It is wet.", "It is dry."])
    assert data["dev"].labels.tolist() == [0, 1]


def test_a_test_set_has_no_labels(rte):
    data = load_task_data(get_task("rte"), rte, sets=["test"])
    assert list(data) == ["test"]
    assert (data["test"].texts, data["test"].labels) == ((["It snows."], ["It is cold."]), None)


def test_cola_is_read_by_position_and_its_test_file_by_name(tmp_path):
    (tmp_path / "dev.tsv").write_text("gj04\t0\t*\tThem left.\n")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tThey left.\n")
    data = load_task_data(get_task("cola"), tmp_path, sets=["dev", "test"])
    assert (data["dev"].texts, data["dev"].labels.tolist()) == ((["Them left."],), [0])
    assert data["test"].texts == (["They left."],)


def test_mnli_reads_the_gold_label_and_both_evaluation_sets(tmp_path):
    for name, label in (("train", "neutral"), ("dev_matched", "contradiction"), ("dev_mismatched", "entailment")):
        lines = ["index\tsentence1\tsentence2\tlabel1\tgold_label", f"0\tp\th\tneutral\t{label}"]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
    data = load_task_data(get_task("mnli"), tmp_path)
    assert {name: one.labels.tolist() for name, one in data.items()} == {
        "train": [1],
        "dev_matched": [2],
        "dev_mismatched": [0],
    }


def test_an_unknown_label_is_named_with_its_line(rte):
    (rte / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n")
    with pytest.raises(UserError, match=r"dev.tsv line 2: unknown label 'neutral'; valid: entailment, not_entailment"):
        load_task_data(get_task("rte"), rte)


QQP_ROWS = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhat is a?\tWhat is b?\t0"]
QQP_ROWS += ['"\tWas Muhammad a real historical figure?\t0', "4\t5\t6\tWhat is c?\tWhat is C?\t1", "7\t8"]


def test_broken_rows_of_qqps_training_file_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("\n".join(QQP_ROWS) + "\n")
    train = load_task_data(get_task("qqp"), tmp_path, sets=["train"])["train"]
    assert train.texts == (["What is a?", "What is c?"], ["What is b?", "What is C?"])
    assert train.labels.tolist() == [0, 1]
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("train.tsv: rows with a wrong number of columns left out: 2, the first in line 3")


def test_a_whole_training_file_of_qqp_is_read_without_a_word(tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("\n".join(QQP_ROWS[:2]) + "\n")
    load_task_data(get_task("qqp"), tmp_path, sets=["train"])
    assert capsys.readouterr().out == ""


def test_broken_rows_of_qqps_other_files_are_refused(tmp_path):
    (tmp_path / "dev.tsv").write_text("\n".join(QQP_ROWS) + "\n")
    with pytest.raises(UserError, match=r"dev.tsv line 3: expected 6 columns, got 3"):
        load_task_data(get_task("qqp"), tmp_path, sets=["dev"])


def test_a_missing_file_tells_the_layout(tmp_path):
    with pytest.raises(
        UserError, match=r"train.tsv: no such file; --data_dir for RTE is .* train.tsv, dev.tsv, test.tsv"
    ):
        load_task_data(get_task("rte"), tmp_path)


def test_a_set_that_the_task_does_not_have_is_refused(rte):
    with pytest.raises(UserError, match=r"RTE has no set 'dev_matched'; it has train, dev, test"):
        load_task_data(get_task("rte"), rte, sets=["dev_matched"])


def test_labels_of_a_custom_task_come_sorted_from_its_training_file(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\none,pos\ntwo,neg\nthree,neutral\n")
    (tmp_path / "dev.jsonl").write_text(json.dumps({"label": "pos", "text": "four"}) + "\n")
    (tmp_path / "test.tsv").write_text("id\ttext\n9\tfive\n")
    data = load_task_data(
        custom_task(["text"], "label"),
        train_file=tmp_path / "train.csv",
        dev_file=tmp_path / "dev.jsonl",
        test_file=tmp_path / "test.tsv",
    )
    assert {one.task.labels for one in data.values()} == {("neg", "neutral", "pos")}
    assert [data["train"].labels.tolist(), data["dev"].labels.tolist(), data["test"].labels] == [[2, 0, 1], [2], None]


def test_a_regression_reads_scores(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tscore\nlow\t-1.5\nhigh\t2\n")
    labels = load_task_data(SCORES, train_file=tmp_path / "train.tsv")["train"].labels
    assert (labels.tolist(), labels.dtype) == ([-1.5, 2.0], np.float64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\na\tx\nb\tx\n", r"train.tsv: only one label, 'x'"),
        ("text\tlabel\na\tx\nb\t\n", r"train.tsv line 3: '' in column 'label' is no label"),
    ],
)
def test_a_custom_training_file_without_real_classes_is_refused(tmp_path, content, message):
    (tmp_path / "train.tsv").write_text(content)
    with pytest.raises(UserError, match=message):
        load_task_data(custom_task(["text"], "label"), train_file=tmp_path / "train.tsv")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (get_task("rte"), {"train_file": "mine.tsv"}, "are for a custom task, not RTE"),
        (custom_task(["t"], "y"), {"data_dir": "folder"}, "takes files, not a folder"),
        (custom_task(["t"], "y"), {"dev_file": "dev.tsv"}, "read from its training file"),
        (WORDS, {"dev_file": "dev.tsv", "sets": ["test"]}, "no test file was given"),
    ],
)
def test_sources_that_do_not_fit_the_task_are_refused(task, options, message):
    with pytest.raises(UserError, match=message):
        load_task_data(task, **options)


def test_the_hub_serves_where_no_folder_is_given(monkeypatch):
    asked = []

    def load_dataset(name, config, split, cache_dir):
        asked.append((name, config, split, cache_dir))
        return datasets.Dataset.from_dict({"hypothesis": ["h"], "premise": ["p"], "label": [2], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task_data(get_task("mnli"), sets=["dev_mismatched", "test_matched"], cache_dir="kept")
    assert asked == [
        ("nyu-mll/glue", "mnli", "validation_mismatched", "kept"),
        ("nyu-mll/glue", "mnli", "test_matched", "kept"),
    ]
    assert (data["dev_mismatched"].texts, data["dev_mismatched"].labels.tolist()) == ((["p"], ["h"]), [2])
    assert data["test_matched"].labels is None


@pytest.mark.parametrize("place", ["MNLI/diagnostic.tsv", "diagnostic/diagnostic.tsv", "AX/AX.tsv"])
def test_diagnostics_lie_in_the_folder_of_mnli_or_beside_it(tmp_path, place):
    for folder in ("MNLI", (tmp_path / place).parent.name):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / place).write_text("index\tsentence1\tsentence2\n0\tIt snows.\tIt is cold.\n")
    (found,) = load_diagnostics(tmp_path / "MNLI").values()
    assert (found.texts, found.labels) == ((["It snows."], ["It is cold."]), None)
    assert found.task.labels == get_task("MNLI").labels


def test_diagnostics_that_are_not_there_are_said(tmp_path, capsys):
    assert load_diagnostics(tmp_path) == {}
    assert f"no AX.tsv will be written, as {tmp_path} has none of diagnostic.tsv, AX.tsv" in capsys.readouterr().out


def test_the_hubs_diagnostics_are_read(monkeypatch):
    def load_dataset(name, config, split, cache_dir):
        assert (name, config, split, cache_dir) == ("nyu-mll/glue", "ax", "test", "kept")
        return datasets.Dataset.from_dict({"premise": ["p"], "hypothesis": ["h"], "label": [-1], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (found,) = load_diagnostics(None, "kept").values()
    assert (found.texts, found.labels) == ((["p"], ["h"]), None)


def test_diagnostics_that_the_hub_does_not_give_are_said(monkeypatch, capsys):
    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_diagnostics(None) == {}
    assert "no AX.tsv will be written, as nyu-mll/glue ax cannot be read" in capsys.readouterr().out


def test_an_unreachable_hub_points_to_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"nyu-mll/glue.*pass --data_dir, a folder with train.tsv, dev.tsv, test.tsv of QNLI"
    ):
        load_task_data(get_task("qnli"), cache_dir=tmp_path)


def test_a_selection_split_partitions_the_set_in_file_order():
    left, part = selection_split(examples([0, 1] * 50), 0.1, seed=1)
    assert sorted(left.texts[0] + part.texts[0]) == sorted(f"text {i}" for i in range(100))
    numbers = [int(text.split()[1]) for text in part.texts[0]]
    assert numbers == sorted(numbers)
    assert part.labels.tolist() == [number % 2 for number in numbers]


def test_a_selection_split_keeps_the_proportions_of_the_classes():
    left, part = selection_split(examples([0] * 80 + [1] * 20), 0.25, seed=3)
    assert (Counter(left.labels.tolist()), Counter(part.labels.tolist())) == ({0: 60, 1: 15}, {0: 20, 1: 5})


def test_a_selection_split_depends_on_nothing_but_the_seed():
    whole = examples([0, 1] * 50)
    first, again, other = (selection_split(whole, 0.2, seed)[1].texts for seed in (1, 1, 2))
    assert first == again != other


def test_a_selection_split_of_scores_covers_their_range():
    _, part = selection_split(examples(np.linspace(0, 5, 100), SCORES), 0.1, seed=0)
    assert np.histogram(part.labels, bins=5, range=(0, 5))[0].tolist() == [2, 2, 2, 2, 2]


def test_a_random_subset_is_in_file_order_and_depends_on_nothing_but_the_seed():
    whole = examples([0, 1] * 50)
    first, again, other = (random_subset(whole, 20, seed) for seed in (1, 1, 2))
    numbers = [int(text.split()[1]) for text in first.texts[0]]
    assert len(numbers) == len(set(numbers)) == 20
    assert numbers == sorted(numbers)
    assert first.labels.tolist() == [number % 2 for number in numbers]
    assert first.texts == again.texts != other.texts


def test_a_random_subset_larger_than_the_set_is_the_set():
    assert random_subset(examples([0, 1, 1]), 10, seed=0).texts == examples([0, 1, 1]).texts


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_fraction_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(UserError, match="between 0 and 1"):
        selection_split(examples([0, 1] * 5), fraction, seed=0)


def test_a_selection_split_without_room_for_every_class_is_refused():
    with pytest.raises(UserError, match=r"a selection split of 0\.5 from 3 examples"):
        selection_split(examples([0, 0, 1]), 0.5, seed=0)


def test_an_item_has_what_the_model_needs_and_the_set_has_the_lengths(tokenizer):
    data = tokenize(Examples(PAIRS, (["a b", "c"], ["as", "d e"]), np.array([1, 0])), tokenizer, 16)
    assert data[0] == {
        "input_ids": [CLS, A, A + 1, SEP, A, A + 8, SEP],
        "token_type_ids": [0, 0, 0, 0, 1, 1, 1],
        "attention_mask": [1] * 7,
        "labels": 1,
    }
    assert (len(data), data.lengths.tolist(), data[-1]) == (2, [7, 6], data[1])
    with pytest.raises(IndexError):
        data[2]


def test_tokens_do_not_depend_on_how_the_set_is_cut_into_batches(tokenizer, monkeypatch):
    whole = of_texts(WORDS, ["a " * (i % 20) + "zz" for i in range(25)])
    at_once = list(tokenize(whole, tokenizer, 8))
    monkeypatch.setattr("bert_of_theseus.data._CHUNK", 4)
    assert list(tokenize(whole, tokenizer, 8)) == at_once


def test_the_longer_text_is_cut_first_and_counted(tokenizer):
    data = tokenize(of_texts(PAIRS, ["a a a a a a", "a"], ["b b", "b"]), tokenizer, 8)
    assert data[0]["input_ids"] == [CLS, A, A, A, SEP, A + 1, A + 1, SEP]
    assert data[0]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (data.num_truncated, data.lengths.tolist()) == (1, [8, 5])


def test_a_text_of_just_the_length_is_not_cut(tokenizer):
    assert tokenize(of_texts(WORDS, ["a b c"]), tokenizer, 5).num_truncated == 0


def test_padding_to_the_maximum_leaves_the_length_in_tokens(tokenizer):
    data = tokenize(of_texts(WORDS, ["a", "a b c d e f g"]), tokenizer, 6, pad_to_max_length=True)
    assert data[0]["input_ids"] == [CLS, A, SEP, PAD, PAD, PAD]
    assert data[0]["attention_mask"] == [1, 1, 1, 0, 0, 0]
    assert data[1]["input_ids"] == [CLS, A, A + 1, A + 2, A + 3, SEP]
    assert (data.lengths.tolist(), data.num_truncated) == ([3, 6], 1)


def test_the_padding_collator_makes_a_batch(tokenizer):
    data = tokenize(Examples(WORDS, (["a", "zz b c"],), np.array([1, 0])), tokenizer, 16)
    batch = DataCollatorWithPadding(tokenizer)([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[CLS, A, SEP, PAD, PAD], [CLS, UNK, A + 1, A + 2, SEP]]
    assert (batch["labels"].tolist(), batch["labels"].dtype) == ([1, 0], torch.int64)


def test_scores_reach_the_batch_as_floats(tokenizer):
    data = tokenize(Examples(SCORES, (["a", "b"],), np.array([2.0, 3.8])), tokenizer, 16)
    labels = DataCollatorWithPadding(tokenizer)([data[0], data[1]])["labels"]
    torch.testing.assert_close(labels, torch.tensor([2.0, 3.8]))


def test_a_test_set_has_no_labels_key(tokenizer):
    assert "labels" not in tokenize(Examples(WORDS, (["a"],), None), tokenizer, 16)[0]


@pytest.mark.parametrize(("length", "limit"), [(17, "3 to 16"), (2, "3 to 16"), (-1, "3 to 16")])
def test_a_length_that_the_tokenizer_cannot_make_is_refused(tokenizer, length, limit):
    with pytest.raises(UserError, match=f"length of {length} .* use {limit}$"):
        tokenize(of_texts(WORDS, ["a"]), tokenizer, length)


def test_real_labels_are_balanced_as_published(real_data):
    data = load_task_data(get_task("RTE"), real_data / "glue" / "RTE")
    assert Counter(data["train"].labels.tolist()) == {0: 1249, 1: 1241}
    sts = load_task_data(get_task("STS-B"), real_data / "glue" / "STS-B", sets=["dev"])["dev"]
    assert (sts.labels.min(), sts.labels.max()) == (0.0, 5.0)
