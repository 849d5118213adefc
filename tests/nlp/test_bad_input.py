"""Bad input to a run: one line, exit code 2, nothing written or overwritten."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from nlp_fixtures import (
    execute,
    flags,
    lines,
    result_of,
    snapshot,
    tiny,  # noqa: F401
    tiny_config,
    tiny_tokenizer,
    write_rte,
)
from transformers import AutoModelForSequenceClassification

from bert_of_theseus import loading, pipeline
from bert_of_theseus.arguments import parse_arguments
from common.run.errors import run_cli


@pytest.fixture
def complaint(capfd):
    """Runs a command line that must be refused; returns its one line on stderr."""

    def refused(words: list[str]) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_cli(lambda: execute(words))
        assert caught.value.code == 2
        message = capfd.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return refused


@pytest.fixture
def unread(monkeypatch):
    """Reading data fails the test."""
    monkeypatch.setattr(pipeline, "load_data", lambda args: pytest.fail("data was read"))


@pytest.fixture
def own(tmp_path, tiny):  # noqa: F811
    """A copy of the data to spoil, and an output folder."""
    data = write_rte(tmp_path / "data")
    return SimpleNamespace(
        data=data,
        output=tmp_path / "run",
        words=flags(SimpleNamespace(**{**vars(tiny), "data": data}), tmp_path / "run"),
    )


def earlier_run(own):
    """What shows that the output folder is a run's."""
    own.output.mkdir(exist_ok=True)
    (own.output / "config.json").write_text(json.dumps(vars(parse_arguments(own.words))))


def spoil_missing(data):
    (data / "dev.tsv").unlink()


def spoil_columns(data):
    rows = lines(data / "train.tsv")
    rows[3] += "\textra"
    (data / "train.tsv").write_text("\n".join(rows))


def spoil_label(data):
    (data / "train.tsv").write_text((data / "train.tsv").read_text() + "99\ta\tb\tmaybe\n")


def spoil_empty(data):
    (data / "train.tsv").write_text("")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_missing, ["dev.tsv: no such file"]),
        (spoil_columns, ["train.tsv line 4", "expected 4 columns, got 5"]),
        (spoil_label, ["train.tsv line 26", "unknown label 'maybe'", "entailment, not_entailment"]),
        (spoil_empty, ["train.tsv: empty file"]),
    ],
)
def test_bad_data_is_located_and_nothing_is_written(own, complaint, spoil, told):
    spoil(own.data)
    message = complaint(own.words)
    assert all(part in message for part in told)
    assert not own.output.exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--ifsvd", "--rank_size", "-1"), "--rank_size"),
        (("--num_successor_layers", "3"), "4 layers do not divide into 3 groups; possible are 1, 2, 4"),
        (("--method", "finetune", "--num_successor_layers", "5"), "the model has 4 layers"),
        (("--method", "finetune", "--num_successor_layers", "3", "--ifsvd"), "do not divide into 3 groups"),
        (("--method", "finetune", "--num_successor_layers", "3", "--start", "paired"), "do not divide into 3 groups"),
        (("--method", "pkd", "--num_successor_layers", "1"), "--method pkd with one student layer"),
        (("--max_seq_length", "65"), "--max_seq_length 65: the model takes 64 tokens at most"),
        (("--max_seq_length", "4"), "a sequence length of 4 does not fit"),
        (("--fp16",), "--fp16 needs a GPU; use --bf16"),
        (("--evaluate_during_training", "--selection_split", "0.01"), "a selection split of 0.01 from 24 examples"),
    ],
)
def test_a_bad_setting_is_named_before_an_earlier_run_is_removed(own, complaint, more, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    earlier_run(own)
    before = snapshot(own.output)
    assert told in complaint([*own.words, "--overwrite_output_dir", *more])
    assert snapshot(own.output) == before


def test_an_unknown_task_is_told_the_known_ones(own, complaint):
    own.words[own.words.index("RTE")] = "RTF"
    assert "RTE" in complaint(own.words)


def test_an_output_folder_in_use_is_refused_and_left_as_it_is(own, complaint):
    own.output.mkdir()
    (own.output / "notes.txt").write_text("mine")
    assert f"--output_dir {own.output} is in use" in complaint(own.words)
    assert snapshot(own.output) == {"notes.txt": b"mine"}


def test_an_output_folder_that_is_a_file_is_refused(own, complaint):
    own.output.write_text("mine")
    assert "is a file" in complaint([*own.words, "--overwrite_output_dir"])
    assert own.output.read_text() == "mine"


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_an_output_folder_below_a_file_is_refused_before_data_is_read(tiny, tmp_path, complaint, unread, train):  # noqa: F811
    (tmp_path / "file").write_text("mine")
    message = complaint(flags(tiny, tmp_path / "file" / "below" / "run", train=train))
    assert f"--output_dir {tmp_path}/file/below/run: {tmp_path}/file is a file" in message


def test_an_output_folder_that_cannot_be_made_is_refused_before_data_is_read(tiny, complaint, unread):  # noqa: F811
    message = complaint(flags(tiny, "/proc/no/such/run"))
    assert "--output_dir /proc/no/such/run cannot be written to" in message


def test_looking_whether_the_output_folder_can_be_written_to_leaves_nothing_there(own, complaint, tmp_path):
    spoil_empty(own.data)
    before = sorted(tmp_path.iterdir())
    complaint(own.words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("where", ["predecessor", "student", "checkpoint-5", "student/deeper", "."])
def test_overwriting_that_would_remove_the_given_model_is_refused(own, complaint, tiny, where):  # noqa: F811
    model = own.output / where
    shutil.copytree(tiny.model, model)
    before = snapshot(own.output)
    own.words[1] = str(model)
    message = complaint([*own.words, "--overwrite_output_dir"])
    assert f"--overwrite_output_dir would remove --model_name_or_path {model}" in message
    assert snapshot(own.output) == before


def test_overwriting_that_would_remove_the_given_data_is_refused(own, complaint, tiny):  # noqa: F811
    data = shutil.copytree(own.data, own.output / "runs" / "data")
    before = snapshot(own.output)
    words = flags(SimpleNamespace(model=tiny.model, data=data), own.output, "--overwrite_output_dir")
    assert f"--overwrite_output_dir would remove --data_dir {data}" in complaint(words)
    assert snapshot(own.output) == before


def test_overwriting_that_would_remove_a_given_file_through_a_link_is_refused(own, complaint, tmp_path):
    (own.output / "predictions").mkdir(parents=True)
    (own.output / "predictions" / "train.csv").write_text("text,label\na,b\nc,d\n")
    (tmp_path / "link.csv").symlink_to(own.output / "predictions" / "train.csv")
    words = ["--model_name_or_path", own.words[1], "--task_name", "custom", "--output_dir", str(own.output)]
    words += ["--do_train", "--overwrite_output_dir", "--train_file", str(tmp_path / "link.csv")]
    message = complaint([*words, "--text_columns", "text", "--label_column", "label"])
    assert f"--overwrite_output_dir would remove --train_file {tmp_path / 'link.csv'}" in message
    assert (own.output / "predictions" / "train.csv").exists()


def test_overwriting_keeps_data_and_a_model_that_lie_beside_the_earlier_run(own, tiny):  # noqa: F811
    shutil.copytree(own.data, own.output)
    shutil.copytree(tiny.model, own.output / "bert")
    earlier_run(own)
    words = flags(SimpleNamespace(model=own.output / "bert", data=own.output), own.output)
    execute([*words, "--overwrite_output_dir", "--max_steps", "1"])
    assert {"train.tsv", "dev.tsv", "bert", "student"} <= {path.name for path in own.output.iterdir()}


def test_overwriting_removes_the_earlier_run_and_nothing_else(own):
    stale = own.output / "checkpoint-900"
    stale.mkdir(parents=True)
    earlier_run(own)
    (own.output / "notes.txt").write_text("mine")
    execute([*own.words, "--overwrite_output_dir", "--max_steps", "1"])
    assert not stale.exists()
    assert (own.output / "notes.txt").read_text() == "mine"
    assert result_of(own.output)["steps"] == 1


def test_a_model_that_cannot_be_downloaded_is_told_what_to_give_instead(own, complaint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own.words[1] = "no-such-organisation/no-such-model"
    message = complaint(own.words)
    assert "--model_name_or_path no-such-organisation/no-such-model cannot be loaded" in message
    assert "folder with config.json" in message
    assert not own.output.exists()


def test_a_model_folder_that_is_not_there_is_named(own, complaint):
    own.words[1] = "/no/such/folder"
    assert "--model_name_or_path /no/such/folder cannot be loaded" in complaint(own.words)


def test_a_model_folder_without_a_tokenizer_is_refused(own, complaint, tiny, tmp_path):  # noqa: F811
    model = tmp_path / "bare"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny.model / name, model)
    own.words[1] = str(model)
    message = complaint(own.words)
    assert f"--model_name_or_path {model} cannot be loaded: " in message  # by transformers' words before its version 5
    assert re.search(r"(there is no tokenizer\.|Can't load tokenizer for .*) Give a folder with", message)
    assert not own.output.exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 133466304\n"


@pytest.mark.parametrize(
    "damage", [lambda weights: POINTER, lambda weights: weights[: len(weights) // 2]], ids=["pointer", "cut off"]
)
def test_weights_that_were_not_downloaded_in_full_are_refused(own, complaint, tiny, tmp_path, damage):  # noqa: F811
    model = shutil.copytree(tiny.model, tmp_path / "damaged")
    weights = model / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    own.words[1] = str(model)
    message = complaint(own.words)
    assert f"--model_name_or_path {model} cannot be loaded: its weights are cut off" in message
    assert not own.output.exists()


def test_a_model_of_another_task_is_refused(own, complaint, tmp_path):
    AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3)).save_pretrained(tmp_path / "three")
    tiny_tokenizer().save_pretrained(tmp_path / "three")
    own.words[1] = str(tmp_path / "three")
    assert "its classifier does not have the 2 output(s) of RTE" in complaint(own.words)


def test_resuming_without_a_run_is_refused(own, complaint):
    assert f"--resume: there is no run in {own.output}" in complaint([*own.words, "--resume"])


def test_resuming_with_other_settings_is_refused(own, complaint):
    words = [*own.words, "--ifsvd"]
    own.output.mkdir()
    (own.output / "config.json").write_text(json.dumps(vars(parse_arguments([*words, "--resume"]))))
    before = snapshot(own.output)
    message = complaint([*words, "--basis", "update", "--resume"])
    assert f"the run in {own.output} has basis own, not update" in message
    assert snapshot(own.output) == before


def test_a_run_that_is_older_than_a_flag_has_its_default(own, complaint):
    own.output.mkdir()
    settings = vars(parse_arguments([*own.words, "--resume"]))
    del settings["start"]
    (own.output / "config.json").write_text(json.dumps(settings))
    message = complaint([*own.words, "--start", "paired", "--resume"])
    assert f"the run in {own.output} has start first, not paired" in message


def test_settings_that_cannot_be_read_are_not_called_broken(own, complaint):
    (own.output / "config.json").mkdir(parents=True)
    message = complaint([*own.words, "--resume"])
    assert f"--resume: {own.output / 'config.json'} cannot be read: " in message
    assert "--overwrite" not in message


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[]"])
def test_resuming_with_broken_settings_is_refused(own, complaint, content):
    own.output.mkdir()
    settings = own.output / "config.json"
    settings.write_bytes(content)
    message = complaint([*own.words, "--resume"])
    assert f"--resume: {settings} does not hold the settings of a run; remove it and start again" in message
    assert settings.read_bytes() == content


def test_a_checkpoint_with_its_labels_in_another_order_is_refused(own, complaint, tmp_path, tiny):  # noqa: F811
    model = AutoModelForSequenceClassification.from_pretrained(tiny.model)
    model.config.id2label = {0: "not_entailment", 1: "entailment"}
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    words = flags(tiny, tmp_path / "out", "--ifsvd", model=tmp_path / "other")
    assert "has its labels in the order not_entailment, entailment" in complaint(words)


def test_a_run_that_diverges_says_so(own, complaint):
    message = complaint([*own.words, "--method", "finetune", "--learning_rate", "1e30", "--max_steps", "3"])
    assert "the run diverged" in message
    assert "--learning_rate" in message


@pytest.mark.parametrize(
    "more", [(), ("--finetune_predecessor", "--predecessor_num_train_epochs", "1")], ids=["student", "predecessor"]
)
def test_a_run_that_diverges_without_evaluation_saves_no_student(own, complaint, more):
    words = [word for word in own.words if word != "--do_eval"]
    more += ("--predecessor_learning_rate", "1e30") if more else ("--method", "finetune", "--learning_rate", "1e30")
    assert "the run diverged" in complaint([*words, "--max_steps", "3", *more])
    assert not {"student", "result.json"} & {path.name for path in own.output.iterdir()}
    assert not (own.output / "predecessor" / "config.json").exists()


def test_lower_casing_that_the_tokenizer_does_not_do_is_refused(own, complaint, monkeypatch):
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer(do_lower_case=False))
    assert "--do_lower_case has no effect on the tokenizer" in complaint([*own.words, "--do_lower_case"])
