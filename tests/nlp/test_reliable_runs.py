"""Runs that nothing is lost of: what is refused before an earlier run is touched, checkpoints, signals, divergence."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from nlp_fixtures import (
    assert_same_bits,
    execute,
    flags,
    lines,
    log_of,
    result_of,
    snapshot,
    tiny,  # noqa: F401
    tiny_tokenizer,
    weights_of,
    write_rte,
)
from safetensors.torch import save_file

from bert_of_theseus import pipeline
from bert_of_theseus.arguments import parse_arguments
from bert_of_theseus.training import DistillationTrainer, PatienceCallback, last_checkpoint
from common import ROOT
from common.run.errors import UserError, run_cli
from common.run.lock import check_unlocked, locked
from common.run.manifest import MANIFEST, damage
from common.run.record import RunRecord
from common.run.stopping import Stopped

SCRIPT = ROOT / "nlp" / "BERT-of-Theseus" / "run_glue_SVD_losslayer.py"
TIMES = ("_per_second", "_runtime", "_time", "runtime")


def timeless(output) -> list[dict]:
    """The log without what a clock says."""
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in log_of(output, "step")]


def changed_model(tiny, folder, change):  # noqa: F811
    """A copy of the model with other weights: `change` maps name -> tensor to the new ones."""
    model = shutil.copytree(tiny.model, folder)
    save_file(change(weights_of(model)), model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):  # noqa: F811
    """An uninterrupted run of six steps; log lines after 4 and 6, a checkpoint every 2."""
    output = tmp_path_factory.mktemp("whole")
    execute(flags(tiny, output, *SIX))
    return output


SIX = ("--max_steps", "6", "--save_steps", "2", "--save_total_limit", "3", "--logging_steps", "4")
SIX += ("--ifsvd", "--svd_steps", "2", "--rank_size", "4")


def copy_until(whole, output, step: int):
    """What a run leaves that was killed after its checkpoint at a step."""
    shutil.copytree(whole, output)
    for path in output.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (output / "result.json").unlink()
    return output


# weights that do not fit


def without_layer(weights):
    return {name: value for name, value in weights.items() if ".layer.1." not in name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: {f"module.{name}": value for name, value in weights.items()}, "there is no place for module."),
        (without_layer, "it has no bert.encoder.layer.1."),
        (lambda w: {**w, **{k.replace("r.1.", "r.4."): v.clone() for k, v in w.items() if "r.1." in k}}, "layer.4."),
        (lambda w: {name: value for name, value in w.items() if name != "classifier.bias"}, "no classifier.bias"),
        (lambda w: {name: value for name, value in w.items() if "pooler" not in name}, "no bert.pooler."),
    ],
    ids=[
        "prefixed",
        "a layer missing",
        "a layer left over",
        "half a classifier",
        "a trained classifier without pooler",
    ],
)
def test_weights_whose_names_do_not_fit_are_refused_with_the_names(tiny, tmp_path, change, told):  # noqa: F811
    model = changed_model(tiny, tmp_path / "model", change)
    with pytest.raises(UserError, match="its weights do not fit BertForSequenceClassification") as caught:
        execute(flags(tiny, tmp_path / "run", model=model))
    assert told in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_shape_that_is_not_the_classifiers_is_named(tiny, tmp_path):  # noqa: F811
    name = "bert.encoder.layer.0.output.dense.bias"
    model = changed_model(tiny, tmp_path / "model", lambda weights: {**weights, name: torch.zeros(7)})
    with pytest.raises(UserError, match=rf"{name} has the shape \(7,\), by its config.json it is \(32,\)"):
        execute(flags(tiny, tmp_path / "run", model=model))


def test_a_teacher_with_weights_of_nan_is_not_blamed_on_the_learning_rate(tiny, tmp_path):  # noqa: F811
    model = changed_model(
        tiny, tmp_path / "model", lambda weights: {name: value * float("nan") for name, value in weights.items()}
    )
    with pytest.raises(UserError, match="values that are not finite; the model is broken") as caught:
        execute(flags(tiny, tmp_path / "run", model=model))
    assert "learning_rate" not in str(caught.value)


# output folders


@pytest.mark.parametrize("name", ["", " "])
def test_an_output_folder_without_a_name_is_refused(tiny, name):  # noqa: F811
    with pytest.raises(UserError, match="--output_dir is empty"):
        parse_arguments(flags(tiny, name, "--overwrite_output_dir"))


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "bert"}', "[", "[]"])
def test_overwriting_what_is_no_run_is_refused(tiny, tmp_path, config):  # noqa: F811
    for name in ("runs", "student", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"has no config.json of a run of this program"):
        execute(flags(tiny, tmp_path, "--overwrite_output_dir"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("more", [(), ("--overwrite_output_dir",), ("--resume",)])
def test_a_second_run_in_a_folder_is_refused(tiny, tmp_path, more):  # noqa: F811
    told = rf"--output_dir {tmp_path} is in use by another run, process {os.getpid()}"
    with locked("--output_dir", tmp_path), pytest.raises(UserError, match=told):
        execute(flags(tiny, tmp_path, *more))


def test_the_folder_is_held_from_the_first_step_to_the_result(tiny, tmp_path, monkeypatch):  # noqa: F811
    refused = []

    def looking(method):
        def looked(*args, **kwargs):
            with pytest.raises(UserError, match="in use by another run"):
                check_unlocked("--output_dir", tmp_path)
            refused.append(method.__name__)
            return method(*args, **kwargs)

        return looked

    monkeypatch.setattr(DistillationTrainer, "compute_loss", looking(DistillationTrainer.compute_loss))
    monkeypatch.setattr(RunRecord, "finish", looking(RunRecord.finish))
    execute(flags(tiny, tmp_path, "--max_steps", "1"))
    assert (refused[0], refused[-1]) == ("compute_loss", "finish")
    check_unlocked("--output_dir", tmp_path)


def test_what_a_killed_write_left_goes_with_the_next_start(tiny, whole, tmp_path):  # noqa: F811
    output = copy_until(whole, tmp_path / "run", 4)
    (output / ".config.json.999.tmp").write_text("")
    (output / "checkpoint-4" / ".method_state.pt.999.tmp").write_text("")
    execute(flags(tiny, output, *SIX, "--resume"))
    assert not list(output.rglob(".*"))


def without_pad(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))


def with_a_larger_vocabulary(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["the cat"])
    tokenizer.add_tokens([f"{word} " for word in ("the", "a", "cat", "dog", "bird", "fish", "man", "is", "was")])
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize(
    ("spoil", "more", "told"),
    [
        (without_pad, (), "its tokenizer has no pad token"),
        (with_a_larger_vocabulary, (), "its tokenizer makes the token .* its vocabulary has"),
        (None, ("--num_train_epochs", "1e30"), "--num_train_epochs 1e.30 are .* optimizer steps"),
        (None, ("--max_steps", "1" + "0" * 30), "--max_steps 1e.30 is too large"),
        (None, ("--per_gpu_train_batch_size", "1" + "0" * 30), "--per_gpu_train_batch_size 1e.30 is too large"),
    ],
)
def test_an_error_that_can_be_known_first_leaves_an_earlier_run_as_it_is(tiny, whole, tmp_path, spoil, more, told):  # noqa: F811
    model = shutil.copytree(tiny.model, tmp_path / "model")
    if spoil:
        spoil(model)
    output = shutil.copytree(whole, tmp_path / "run")
    before = snapshot(output)
    with pytest.raises(UserError, match=told):
        execute([*flags(tiny, output, model=model), "--overwrite_output_dir", *more])
    assert snapshot(output) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_earlier_run_is_back_if_the_new_one_ends_before_its_first_checkpoint(
    tiny,  # noqa: F811
    whole,
    tmp_path,
    monkeypatch,
    error,
):
    output = shutil.copytree(whole, tmp_path / "run")
    before = snapshot(output)

    def compute_loss(*_, **__):
        raise error

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    with pytest.raises(error):
        execute(flags(tiny, output, "--overwrite_output_dir", "--max_steps", "2"))
    assert snapshot(output) == before


@pytest.mark.parametrize("moved", [("result.json",), ("result.json", "metrics.jsonl", "checkpoint-4")])
def test_an_earlier_run_that_was_half_moved_when_a_program_was_killed_is_whole_again(
    tiny,  # noqa: F811
    whole,
    tmp_path,
    monkeypatch,
    moved,
):
    output = shutil.copytree(whole, tmp_path / "run")
    before = snapshot(output)
    (output / ".earlier-run").mkdir()
    for name in moved:
        (output / name).rename(output / ".earlier-run" / name)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute(flags(tiny, output, "--overwrite_output_dir", "--max_steps", "2"))
    assert snapshot(output) == before


def test_a_run_killed_before_its_first_checkpoint_does_not_take_the_earlier_ones_place(
    tiny,  # noqa: F811
    whole,
    tmp_path,
    monkeypatch,
):
    output = shutil.copytree(whole, tmp_path / "run")
    before = snapshot(output)
    killed = output / ".earlier-run"
    killed.mkdir()
    for path in [path for path in output.iterdir() if path != killed]:
        path.rename(killed / path.name)
    shutil.copy(killed / "config.json", output)
    (output / "metrics.jsonl").write_text("")
    monkeypatch.setattr(DistillationTrainer, "compute_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute(flags(tiny, output, "--overwrite_output_dir", "--max_steps", "2"))
    assert snapshot(output) == before


def test_an_earlier_run_goes_when_the_new_one_has_a_checkpoint(tiny, whole, tmp_path, monkeypatch):  # noqa: F811
    output = shutil.copytree(whole, tmp_path / "run")
    seen = []

    class Spy(pipeline.MethodStateCallback):
        def on_save(self, *args, **others):
            seen.append((output / ".earlier-run" / "result.json").exists())
            super().on_save(*args, **others)
            seen.append((output / ".earlier-run").exists())

    monkeypatch.setattr(pipeline, "MethodStateCallback", Spy)
    execute(flags(tiny, output, "--overwrite_output_dir", "--max_steps", "1"))
    assert seen == [True, False]
    assert result_of(output)["steps"] == 1


# checkpoints


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tiny, whole, tmp_path, capsys, lost):  # noqa: F811
    output = copy_until(whole, tmp_path / "run", 4)
    (output / "checkpoint-4" / lost).unlink()
    execute(flags(tiny, output, *SIX, "--resume"))
    said = capsys.readouterr().out
    assert f"{output / 'checkpoint-4'} is passed over: {lost} is missing\n" in said
    assert "from checkpoint-2" in said
    assert_same_bits(weights_of(output / "student"), weights_of(whole / "student"))


def test_half_of_a_checkpoints_weights_are_told_from_the_whole(whole, tmp_path):
    output = copy_until(whole, tmp_path / "run", 4)
    path = output / "checkpoint-4" / "model.safetensors"
    weights = weights_of(path.parent)
    save_file(dict(list(weights.items())[::2]), path)
    assert "model.safetensors has" in damage(path.with_name(MANIFEST))
    assert last_checkpoint(output).name == "checkpoint-2"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tiny, whole, tmp_path):  # noqa: F811
    output = copy_until(whole, tmp_path / "run", 2)
    (output / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"--resume: no checkpoint is whole \(.*optimizer.pt has 0 bytes"):
        execute(flags(tiny, output, *SIX, "--resume"))


def test_a_run_is_not_resumed_with_another_predecessor(tiny, whole, tmp_path):  # noqa: F811
    output = copy_until(whole, tmp_path / "run", 4)
    words = flags(tiny, output, *SIX, "--resume")
    model = changed_model(tiny, tmp_path / "model", lambda w: {**w, "classifier.bias": w["classifier.bias"] + 1})
    config = json.loads((output / "config.json").read_text())  # the same folder, with other weights in it
    (output / "config.json").write_text(json.dumps({**config, "model_name_or_path": str(model)}))
    words[1] = str(model)
    with pytest.raises(UserError, match="checkpoint-4 was written with another predecessor"):
        execute(words)
    assert (output / "checkpoint-4").exists()


@pytest.mark.parametrize("spoiled", ["train", "dev"])
def test_a_run_is_not_resumed_with_other_data(tiny, whole, tmp_path, spoiled):  # noqa: F811
    output = copy_until(whole, tmp_path / "run", 4)
    data = write_rte(tmp_path / "data")
    rows = [
        row.replace("not_entailment", "X").replace("entailment", "not_entailment")
        for row in lines(data / f"{spoiled}.tsv")
    ]
    (data / f"{spoiled}.tsv").write_text("\n".join(row.replace("X", "entailment") for row in rows))
    with pytest.raises(UserError, match="checkpoint-4 was written with another data"):
        execute(flags(SimpleNamespace(model=tiny.model, data=data), output, *SIX, "--resume"))


def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(tiny, whole, tmp_path):  # noqa: F811
    output = copy_until(whole, tmp_path / "run", 2)  # in the midst of the first four steps that are averaged
    execute(flags(tiny, output, *SIX, "--resume"))
    assert timeless(output) == timeless(whole)
    assert "train_loss" in timeless(whole)[-2]


def test_resuming_a_run_that_ended_within_an_epoch_trains_no_further(tiny, tmp_path):  # noqa: F811
    words = flags(tiny, tmp_path, "--max_steps", "4", "--save_steps", "4")  # 3 steps an epoch
    execute(words)
    log, weights = timeless(tmp_path), weights_of(tmp_path / "student")
    execute([*words, "--resume"])
    assert timeless(tmp_path) == log
    assert_same_bits(weights_of(tmp_path / "student"), weights)


def test_resuming_a_finished_run_leaves_its_log_as_it_is(tiny, whole, tmp_path):  # noqa: F811
    output = shutil.copytree(whole, tmp_path / "run")
    execute(flags(tiny, output, *SIX, "--resume"))
    assert timeless(output) == timeless(whole)
    assert result_of(output)["last"] == result_of(whole)["last"]


def test_a_bad_line_of_the_log_is_named(tiny, whole, tmp_path):  # noqa: F811
    output = copy_until(whole, tmp_path / "run", 4)
    (output / "metrics.jsonl").write_text("noise\n" + (output / "metrics.jsonl").read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is not valid JSON"):
        execute(flags(tiny, output, *SIX, "--resume"))


def test_too_little_space_for_two_checkpoints_is_told_before_training(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"--output_dir .* 1.0 kB are free there, two checkpoints of this run take"):
        execute(flags(tiny, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_with_the_way_on(tiny, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    output = copy_until(whole, tmp_path / "run", 4)
    words = flags(tiny, output, *SIX, "--resume")

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *words])
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: execute(words))
    assert caught.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: disk full")
    assert last.endswith(f"make room, then go on with: python run_glue.py --resume {shlex.join(words[:-1])}")
    monkeypatch.undo()
    execute(words)
    assert_same_bits(weights_of(output / "student"), weights_of(whole / "student"))


# signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_run_goes_on_bit_for_bit(tiny, whole, tmp_path, monkeypatch, signum):  # noqa: F811
    calls = []
    compute_loss = DistillationTrainer.compute_loss

    def interrupted(trainer, model, *args, **kwargs):
        calls.append(model.training)
        if sum(calls) == 3 and model.training:
            signal.raise_signal(signum)
        return compute_loss(trainer, model, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", interrupted)
    with pytest.raises(Stopped) as caught:
        execute(flags(tiny, tmp_path, *SIX))
    assert (caught.value.code, caught.value.saved) == (128 + signum, "step 3 of 6 is saved in checkpoint-3")
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    execute(flags(tiny, tmp_path, *SIX, "--resume"))
    assert_same_bits(weights_of(tmp_path / "student"), weights_of(whole / "student"))
    assert timeless(tmp_path) == timeless(whole)


def program(tiny, output, *more, **environment):  # noqa: F811
    """The program in a process of its own."""
    words = [sys.executable, str(SCRIPT), *flags(tiny, output, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_program_ends_with_a_signals_code_and_the_command_that_goes_on(tiny, tmp_path, signum, code):  # noqa: F811
    process = program(tiny, tmp_path / "run", "--max_steps", "1000000", "--save_steps", "1000000")
    while "'loss'" not in process.stdout.readline():
        pass
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    last = errors.splitlines()[-1]
    assert re.match(
        rf"stopped by {signal.Signals(signum).name}, step \d+ of 1000000 is saved in checkpoint-\d+; ", last
    )
    assert f"to go on: python {SCRIPT} --resume --model_name_or_path {tiny.model}" in last
    assert "Traceback" not in errors
    assert last_checkpoint(tmp_path / "run") is not None


def test_a_predecessor_that_is_stopped_says_that_it_trains_anew(tiny, tmp_path, monkeypatch):  # noqa: F811
    def compute_loss(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    with pytest.raises(Stopped) as caught:
        execute(flags(tiny, tmp_path, "--finetune_predecessor", "--max_steps", "1"))
    assert (caught.value.code, caught.value.saved) == (143, "the predecessor will train anew")


# divergence


def test_a_run_that_diverges_stops_at_the_first_logged_loss_and_keeps_a_good_state(tiny, tmp_path, monkeypatch):  # noqa: F811
    compute_loss = DistillationTrainer.compute_loss

    def lost(trainer, model, *args, **kwargs):
        loss = compute_loss(trainer, model, *args, **kwargs)
        return loss * float("nan") if trainer.state.global_step >= 3 and not isinstance(loss, tuple) else loss

    monkeypatch.setattr(DistillationTrainer, "compute_loss", lost)
    with pytest.raises(
        UserError, match=r"the run diverged: .*not finite at step 4; lower --learning_rate \(.*checkpoint-2"
    ):
        execute(flags(tiny, tmp_path, "--max_steps", "9", "--save_steps", "2", "--logging_steps", "9"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "checkpoint-2").values())


def test_the_first_loss_that_is_not_finite_is_the_last_log_line(tiny, tmp_path):  # noqa: F811
    words = flags(tiny, tmp_path, "--method", "finetune", "--learning_rate", "1e30", "--max_steps", "9")
    with pytest.raises(
        UserError, match=r"the run diverged: the task_loss at step \d is (nan|inf); lower --learning_rate"
    ):
        execute([*words, "--save_steps", "100"])
    *before, last = log_of(tmp_path, "loss")
    assert last["loss"] in ("nan", "inf")
    assert all(isinstance(line["loss"], float) for line in before)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("logging_steps", [1, 10])
def test_a_loss_that_is_not_finite_before_any_update_is_no_matter_of_the_learning_rate(tiny, tmp_path, logging_steps):  # noqa: F811
    name = "bert.encoder.layer.1.attention.self.query.weight"  # its outputs stay finite, its squares do not
    model = changed_model(tiny, tmp_path / "model", lambda weights: {**weights, name: weights[name] * 1e24})
    words = flags(tiny, tmp_path / "run", "--ifsvd", "--logging_steps", logging_steps, model=model)
    with pytest.raises(UserError) as caught:
        execute(words)
    told = r"the loss is not finite in step 1, before any update: the dskd_loss is (nan|inf); look at the weights of "
    assert re.match(told + re.escape(str(model)), str(caught.value))
    assert "learning_rate" not in str(caught.value)


def lost_from(step: int):
    """A `compute_loss` whose loss is no number from this optimizer step on."""
    compute_loss = DistillationTrainer.compute_loss

    def spoil(model, inputs, outputs):
        return {**outputs, "loss": outputs["loss"] * float("nan")}

    def lost(trainer, model, *args, **kwargs):
        if model.training and trainer.state.global_step + 1 >= step:
            model.register_forward_hook(spoil)
        return compute_loss(trainer, model, *args, **kwargs)

    return lost


@pytest.mark.parametrize(("step", "blamed"), [(1, False), (2, True)])
def test_the_learning_rate_is_blamed_after_the_first_update_alone(tiny, tmp_path, monkeypatch, step, blamed):  # noqa: F811
    monkeypatch.setattr(DistillationTrainer, "compute_loss", lost_from(step))
    words = flags(tiny, tmp_path, "--method", "finetune", "--max_steps", "4", "--gradient_accumulation_steps", "2")
    with pytest.raises(UserError, match="the task_loss") as caught:
        execute(words)
    assert ("lower --learning_rate" in str(caught.value)) == blamed


def test_a_first_loss_after_a_predecessor_is_that_of_the_predecessors_weights(tiny, tmp_path, monkeypatch):  # noqa: F811
    lost, compute_loss = lost_from(1), DistillationTrainer.compute_loss
    monkeypatch.setattr(
        DistillationTrainer,
        "compute_loss",
        lambda trainer, *rest, **others: (lost if trainer.dskd else compute_loss)(trainer, *rest, **others),
    )
    with pytest.raises(UserError, match="in step 1, before any update: the task_loss is nan; look at the predecessor"):
        execute(flags(tiny, tmp_path, "--finetune_predecessor", "--predecessor_num_train_epochs", "1", "--ifsvd"))


def test_a_predecessor_that_diverges_is_told_its_own_flag(tiny, tmp_path):  # noqa: F811
    words = flags(tiny, tmp_path, "--finetune_predecessor", "--predecessor_learning_rate", "1e30")
    with pytest.raises(UserError, match=r"the run diverged.*; lower --predecessor_learning_rate"):
        execute(words)


# damaged models


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", lambda settings: {**settings, "hidden_size": "many"}),
        ("config.json", lambda settings: {**settings, "hidden_size": 10**30}),
        ("config.json", lambda settings: {**settings, "num_hidden_layers": 10**9}),
        ("config.json", lambda settings: {**settings, "id2label": 3}),
        ("config.json", lambda settings: [settings]),
        ("tokenizer.json", lambda settings: [settings]),
        ("tokenizer.json", lambda settings: {}),
        ("tokenizer_config.json", lambda settings: "text"),
    ],
)
def test_a_damaged_file_of_a_model_is_one_line(tiny, tmp_path, file, content):  # noqa: F811
    model = shutil.copytree(tiny.model, tmp_path / "model")
    (model / file).write_text(json.dumps(content(json.loads((model / file).read_text()))))
    with pytest.raises(UserError, match=rf"--model_name_or_path {model} cannot be loaded"):
        execute(flags(tiny, tmp_path / "run", model=model))


def test_code_that_comes_with_a_model_never_runs(tiny, tmp_path, monkeypatch):  # noqa: F811
    model = shutil.copytree(tiny.model, tmp_path / "model")
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "other",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"},
    }
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=rf"--model_name_or_path {model} cannot be loaded"):
        execute(flags(tiny, tmp_path / "run", model=model))
    assert not (tmp_path / "ran").exists()


# results and students


def regression(model, folder, score: str = "0.75") -> list[str]:
    """The command line of a regression on two texts, of which the second one has the given score."""
    for name in ("train", "dev"):
        (folder / f"{name}.csv").write_text(f"t,s\nthe cat,0.5\na dog,{score}\n")
    words = ["--model_name_or_path", model, "--task_name", "custom", "--output_dir", folder / "run"]
    words += ["--do_train", "--do_eval", "--method", "finetune", "--regression", "--text_columns", "t"]
    words += ["--max_seq_length", "32"]
    words += ["--label_column", "s", "--train_file", folder / "train.csv", "--dev_file", folder / "dev.csv"]
    return [str(word) for word in words]


@pytest.mark.parametrize("score", ["1e300", "1e30", "nan", "inf"])
def test_a_regression_target_that_no_loss_holds_is_refused_with_its_line(tiny, tmp_path, score):  # noqa: F811
    with pytest.raises(UserError, match=r"train.csv line 3: score"):
        execute(regression(tiny.model, tmp_path, score))


@pytest.mark.parametrize("bias", [1e25, 1e38])
def test_a_predecessor_whose_predictions_no_loss_holds_is_refused(tiny, tmp_path, bias):  # noqa: F811
    def one_output(weights):
        return {**weights, "classifier.weight": torch.zeros(1, 32), "classifier.bias": torch.tensor([bias])}

    model = changed_model(tiny, tmp_path / "model", one_output)
    config = json.loads((model / "config.json").read_text())
    names = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    (model / "config.json").write_text(json.dumps({**config, **names}))
    with pytest.raises(UserError, match="its outputs on the train set are not finite, or too large for a squared"):
        execute(regression(model, tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_student_whose_predictions_are_not_finite_has_no_result_and_is_no_best_one(tiny, tmp_path):  # noqa: F811
    words = regression(tiny.model, tmp_path)
    with pytest.raises(UserError, match=r"the run diverged: .* outputs are not finite"):
        execute([*words, "--learning_rate", "1e20", "--max_steps", "1", "--report_to", "none"])
    assert not {"result.json", "student", "student_best"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_saved_students_have_the_rights_that_the_umask_asks_for(whole):
    umask = os.umask(0)
    os.umask(umask)
    for path in (whole / "student").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


# the end of training, and of a run


def test_patience_ends_a_run_and_a_resumed_one_does_not_go_on(tiny, tmp_path):  # noqa: F811
    more = ("--max_steps", "20", "--save_steps", "1", "--evaluate_during_training", "--patience", "2")
    more += ("--learning_rate", "1e-12", "--selection_split", "0.34")  # nothing gets better
    execute(flags(tiny, tmp_path, *more))
    assert result_of(tmp_path)["steps"] == 3
    before = timeless(tmp_path)
    execute(flags(tiny, tmp_path, *more, "--resume"))
    assert result_of(tmp_path)["steps"] == 3
    assert timeless(tmp_path) == before


def test_patience_counts_evaluations_since_the_best():
    callback = PatienceCallback("m", 2)
    history = [{"step": step, "m": value} for step, value in enumerate([0.1, 0.5, 0.5])]
    assert not callback.exhausted([])
    assert not callback.exhausted(history)
    assert callback.exhausted([*history, {"step": 3, "m": 0.4}, {"step": 3, "other": 1.0}])


def test_a_run_ends_with_a_table_warnings_and_what_to_do_next(tiny, tmp_path, capsys):  # noqa: F811
    execute(flags(tiny, tmp_path, "--max_steps", "2", "--scheduler_linear_k", "0.0", "--ifsvd", "--svd_steps", "9"))
    said = capsys.readouterr().out
    assert "layers (student for predecessor): 0 for 0-1, 1 for 2-3; the student starts as 0, 1" in said
    table = said[said.index("dev_accuracy    parameters") :].splitlines()
    assert [row[:14].strip() for row in table[1:4]] == ["predecessor", "majority", "student, last"]
    assert table[2].split()[1] == "0.5000"
    assert "warning: the student never ran alone: the probability of replacing ended at 0.300; no directions" in said
    assert f"report:  python scripts/report.py {tmp_path}\n" in said
    result = result_of(tmp_path)
    assert result["majority"] == 0.5
    assert result["predecessor_evaluation"].keys() == {"dev_accuracy"}


def test_a_student_of_one_class_is_warned_of(tiny, tmp_path, capsys):  # noqa: F811
    bias = torch.tensor([100.0, 0.0])
    model = changed_model(tiny, tmp_path / "model", lambda weights: {**weights, "classifier.bias": bias})
    execute(flags(tiny, tmp_path / "run", "--max_steps", "2", model=model))
    assert "the student predicts one class alone\n" in capsys.readouterr().out


def test_the_predecessor_that_is_measured_is_the_one_that_was_given(tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path / "run", "--max_steps", "3"))
    execute(flags(tiny, tmp_path / "alone", train=False))
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert result_of(tmp_path / "run")["predecessor_evaluation"]["dev_accuracy"] == alone["dev_accuracy"]


def test_without_a_slope_the_student_runs_alone_after_three_fifths_of_the_training(tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path, "--max_steps", "10"))
    logged = [line["replacing_probability"] for line in log_of(tmp_path, "replacing_probability")]
    expected = [0.3 + 0.7 * step / 6 for step in range(6)] + [1.0] * 4
    assert logged == pytest.approx(expected)
