"""Whole runs on a tiny model: the record, DSKD, methods, selection, prediction, resuming, precision."""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nlp_fixtures import (
    assert_same_bits,
    execute,
    flags,
    lines,
    log_of,
    result_of,
    sentences,
    snapshot,
    tiny,  # noqa: F401
    tiny_config,
    tiny_tokenizer,
    weights_of,
    write_rte,
)
from transformers import AutoModelForSequenceClassification, BertModel

from bert_of_theseus import pipeline
from bert_of_theseus.training import METHOD_STATE, DistillationTrainer, MethodStateCallback, last_checkpoint
from common import ROOT
from common.run import manifest
from common.run.confusion import read_confusion
from common.run.errors import UserError
from dskd import DirectionSensitivityLoss

STORY = ("--finetune_predecessor", "--predecessor_num_train_epochs", "2", "--predecessor_learning_rate", "2e-3")
STORY += ("--max_steps", "2", "--replacing_rate", "1.0", "--scheduler_type", "constant")
DSKD = ("--ifsvd", "--svd_steps", "2", "--rank_size", "4")
RESULT_FIELDS = {
    "task",
    "method",
    "dskd",
    "seed",
    "metric",
    "last",
    "best",
    "steps",
    "wall_seconds",
    "throughput",
    "throughput_unit",
    "peak_memory_bytes",
    "git_revision",
    "versions",
    "device",
    "command",
}


def predictor_of(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):  # noqa: F811
    """Two epochs (six steps) of Theseus with DSKD, evaluated and saved every two steps, with predictions."""
    output = tmp_path_factory.mktemp("trained")
    more = ("--num_train_epochs", "2", "--evaluate_during_training", "--save_steps", "2", "--do_predict")
    more += ("--scheduler_linear_k", "0.0003")
    execute(flags(tiny, output, *DSKD, *more, "--report_to", "tensorboard"))
    return output


# the record


def test_the_result_has_every_field_that_tables_read(trained):
    result = result_of(trained)
    assert result.keys() >= RESULT_FIELDS
    assert (result["task"], result["method"], result["metric"], result["seed"]) == ("RTE", "theseus", "accuracy", 42)
    assert (result["steps"], result["layers"], result["throughput_unit"]) == (6, 2, "examples/s")
    assert result["wall_seconds"] > 0
    assert result["throughput"] > 48 / result["wall_seconds"]  # evaluations do not count


def test_the_result_holds_the_settings_of_dskd(trained):
    expected = {
        "lambda_size": 0.1,
        "rank_size": 4,
        "svd_steps": 2,
        "grad_steps": 2,
        "basis": "own",
        "svd_driver": "randomized",
        "smoothing": 0.0,
    }
    assert result_of(trained)["dskd"].items() >= expected.items()


def test_the_config_holds_the_command_line(trained, tiny):  # noqa: F811
    config = json.loads((trained / "config.json").read_text())
    assert (config["num_train_epochs"], config["if_svd"], config["data_dir"]) == (2.0, True, str(tiny.data))


def test_every_step_logs_the_losses_apart_and_their_sum(trained):
    logged = log_of(trained, "task_loss")
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    for line in logged:
        assert math.isfinite(line["task_loss"])
        assert line["dskd_loss"] > 0
        assert line["loss"] == pytest.approx(line["task_loss"] + 0.1 * line["dskd_loss"], rel=1e-4)


def test_the_effective_number_of_directions_falls_below_the_rank_once_they_are_chosen(trained):
    effective = [line["effective_directions"] for line in log_of(trained, "effective_directions")]
    assert effective[0] == 4.0
    assert effective[-1] < 3.99
    assert min(effective) >= 1


def test_the_replacing_probability_that_is_logged_follows_its_schedule(trained):
    logged = [line["replacing_probability"] for line in log_of(trained, "replacing_probability")]
    assert logged == pytest.approx([0.3 + 0.0003 * step for step in range(6)])


def test_last_and_best_are_those_of_the_logged_evaluations(trained):
    result, logged = result_of(trained), log_of(trained, "eval_dev_accuracy")
    assert [line["step"] for line in logged] == [2, 4, 6]
    values = [line["eval_dev_accuracy"] for line in logged]
    assert (result["last"], result["best"]) == (values[-1], max(values))
    assert result["best_step"] == logged[values.index(max(values))]["step"]


def test_the_log_also_goes_to_tensorboard(trained):
    assert list(trained.rglob("events.out.tfevents.*"))


def test_the_checkpoints_kept_are_limited(trained):
    assert {path.name for path in trained.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_a_checkpoint_holds_what_trains_only(trained):
    names = weights_of(trained / "checkpoint-6").keys()
    assert names
    assert all(".successor." in name for name in names)


def test_parameters_count_the_student(trained):
    assert result_of(trained)["parameters"] == sum(p.numel() for p in predictor_of(trained / "student").parameters())


# the seed's command, in processes of its own


@pytest.mark.parametrize("folder", [ROOT, ROOT / "nlp" / "BERT-of-Theseus"], ids=["root", "folder"])
def test_the_seeds_command_line_runs(tiny, tmp_path, folder):  # noqa: F811
    script = os.path.relpath(ROOT / "nlp" / "BERT-of-Theseus" / "run_glue_SVD_losslayer.py", folder)
    words = f"""--model_name_or_path {tiny.model} --task_name RTE --do_train --do_eval --do_lower_case
        --data_dir {tiny.data} --max_seq_length 32 --per_gpu_train_batch_size 32 --per_gpu_eval_batch_size 32
        --learning_rate 2e-5 --save_steps 50 --num_train_epochs 2 --output_dir {tmp_path} --evaluate_during_training
        --replacing_rate 0.3 --scheduler_type linear --scheduler_linear_k 0.0003 --overwrite_output_dir
        --ifsvd --svd_steps 100 --lambda_size 0.1 --rank_size 32""".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, *words], cwd=folder, env=environment, check=True, capture_output=True)
    assert {"config.json", "metrics.jsonl", "result.json", "student"} <= {path.name for path in tmp_path.iterdir()}
    assert result_of(tmp_path)["command"].startswith(f"python {script} --model_name_or_path")


# what trains


def test_the_predecessor_is_unchanged_by_training(trained, tiny):  # noqa: F811
    before, after = weights_of(tiny.model), weights_of(trained / "student")
    outside = {name for name in after if ".layer." not in name}
    assert any("embeddings" in name for name in outside)
    assert any("classifier" in name for name in outside)
    assert any("pooler" in name for name in outside)
    assert all(torch.equal(after[name], before[name]) for name in outside)


def test_every_successor_layer_trains(trained, tiny):  # noqa: F811
    before, after = weights_of(tiny.model), weights_of(trained / "student")
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}.output.dense.weight"
        assert not torch.equal(after[name], before[name])


def test_evaluation_measures_the_student_that_is_exported(trained, tiny):  # noqa: F811
    rows = [line.split("\t") for line in lines(tiny.data / "dev.tsv")[1:]]
    batch = tiny_tokenizer()([row[1] for row in rows], [row[2] for row in rows], padding=True, return_tensors="pt")
    model = predictor_of(trained / "student")
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1).tolist()
    correct = [model.config.id2label[p] == row[3] for p, row in zip(predicted, rows, strict=True)]
    assert result_of(trained)["last"] == pytest.approx(np.mean(correct))


def test_predictions_are_those_of_the_exported_student_in_the_servers_format(trained, tiny):  # noqa: F811
    rows = [line.split("\t") for line in lines(tiny.data / "test.tsv")[1:]]
    batch = tiny_tokenizer()([row[1] for row in rows], [row[2] for row in rows], padding=True, return_tensors="pt")
    model = predictor_of(trained / "student")
    with torch.no_grad():
        predicted = [model.config.id2label[p] for p in model(**batch).logits.argmax(-1).tolist()]
    written = lines(trained / "predictions" / "RTE.tsv")
    assert written == ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(predicted))]


def test_the_confusion_matrix_is_of_the_last_evaluation(trained):
    found = read_confusion(trained)
    assert (found.classes, found.step, found.evaluated_on) == (("entailment", "not_entailment"), 6, "dev")
    assert found.examples.tolist() == [6, 6]
    assert found.hits.sum() / 12 == pytest.approx(result_of(trained)["last"])


def test_a_run_repeats_under_its_seed_and_differs_under_another(tiny, tmp_path):  # noqa: F811
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        execute(flags(tiny, tmp_path / name, "--max_steps", "3", "--seed", seed))
    first, again, other = (weights_of(tmp_path / name / "student") for name in ("first", "again", "other"))
    assert_same_bits(first, again)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.gpu
def test_dskd_pulls_the_student_towards_its_teacher(tiny, tmp_path):  # noqa: F811
    loss = {}
    for size in ("0", "5"):
        more = ("--max_steps", "12", "--ifsvd", "--rank_size", "0", "--svd_steps", "100", "--grad_steps", "1")
        more += ("--scheduler_linear_k", "0.0003")
        execute(flags(tiny, tmp_path / size, *more, "--lambda_size", size, model=tiny.still))
        loss[size] = [line["dskd_loss"] for line in log_of(tmp_path / size, "dskd_loss")]
    assert loss["5"][0] == loss["0"][0]
    assert loss["5"][-1] < 0.97 * loss["0"][-1]
    assert loss["5"] == sorted(loss["5"], reverse=True)


def test_dskd_is_told_the_progress_and_the_layers_that_no_batch_of_the_step_sampled(tiny, tmp_path, monkeypatch):  # noqa: F811
    observed, drawn = [], []

    def begin(self, progress, skip):
        observed.append((progress, {name.split(".")[0] for name in skip}))
        return begin_step(self, progress, skip)

    begin_step = DirectionSensitivityLoss.begin_step
    draw = pipeline.TheseusModel._draw
    monkeypatch.setattr(pipeline.TheseusModel, "_draw", lambda model: drawn.append(draw(model)) or drawn[-1])
    monkeypatch.setattr(DirectionSensitivityLoss, "begin_step", begin)
    more = ("--max_steps", "8", "--gradient_accumulation_steps", "2", "--per_gpu_train_batch_size", "2")
    execute(flags(tiny, tmp_path, *more, *DSKD, "--svd_steps", "1"))  # they are asked for where a choice is due
    never = [{str(i) for i in range(2) if not (a[i] or b[i])} for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    assert observed == [(step / 8, unsampled) for step, unsampled in enumerate(never)]
    assert len({frozenset(unsampled) for unsampled in never}) > 1


def test_accumulating_two_half_batches_equals_one_whole_batch(tiny, tmp_path):  # noqa: F811
    always = (
        "--max_steps",
        "3",
        "--scheduler_type",
        "constant",
        "--replacing_rate",
        "1.0",
        "--pad_to_max_length",
        *DSKD,
    )
    execute(flags(tiny, tmp_path / "whole", *always, model=tiny.still))
    halves = ("--per_gpu_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    execute(flags(tiny, tmp_path / "halves", *always, *halves, model=tiny.still))
    whole, split = weights_of(tmp_path / "whole" / "student"), weights_of(tmp_path / "halves" / "student")
    start = weights_of(tiny.still)
    moved = max((whole[name] - start[name]).abs().max() for name in whole)
    assert moved > 1e-3
    for name, value in whole.items():
        if not name.endswith("key.bias"):  # softmax cancels it: its gradient is rounding, which AdamW scales up
            torch.testing.assert_close(split[name], value, rtol=0, atol=0.02 * moved.item(), msg=name)
    for line, other in zip(log_of(tmp_path / "whole", "loss"), log_of(tmp_path / "halves", "loss"), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)


# methods


def test_finetuning_alone_trains_the_whole_model(tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path, "--method", "finetune", "--max_steps", "2"))
    before, after = weights_of(tiny.model), weights_of(tmp_path / "student")
    assert after.keys() == before.keys()
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    result = result_of(tmp_path)
    assert (result["method"], result["dskd"], result["layers"]) == ("finetune", None, 4)


def test_finetuning_the_first_layers_is_the_control(tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path, "--method", "finetune", "--num_successor_layers", "3", "--max_steps", "1"))
    assert predictor_of(tmp_path / "student").config.num_hidden_layers == result_of(tmp_path)["layers"] == 3


@pytest.mark.parametrize("method", ["theseus", "finetune", "kd"])
def test_a_paired_student_starts_with_the_last_layers_of_the_groups(tiny, tmp_path, method):  # noqa: F811
    settings = ("--method", method, "--num_successor_layers", "2", "--start", "paired", "--learning_rate", "1e-9")
    execute(flags(tiny, tmp_path, *settings, "--max_steps", "1"))
    ours, theirs = weights_of(tmp_path / "student"), weights_of(tiny.model)
    name = "bert.encoder.layer.{}.output.dense.weight"
    for i, k in enumerate((1, 3)):
        torch.testing.assert_close(ours[name.format(i)], theirs[name.format(k)], rtol=0, atol=1e-7)


def test_finetuning_takes_dskd_with_the_given_model_as_its_teacher(tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path, "--method", "finetune", "--num_successor_layers", "2", "--max_steps", "4", *DSKD))
    logged = log_of(tmp_path, "dskd_loss")
    assert len(logged) == 4
    assert all(line["dskd_loss"] > 0 for line in logged)
    assert "replacing_probability" not in logged[0]
    assert "teacher" not in " ".join(weights_of(tmp_path / "student"))


def test_the_student_can_have_any_number_of_layers_that_divides(tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path, "--num_successor_layers", "1", "--max_steps", "1"))
    assert predictor_of(tmp_path / "student").config.num_hidden_layers == 1


@pytest.fixture(scope="module")
def whole_story(tiny, tmp_path_factory):  # noqa: F811
    """A pretrained encoder without a classifier: the predecessor is fine-tuned first."""
    folder = tmp_path_factory.mktemp("story")
    torch.manual_seed(3)
    BertModel(tiny_config()).save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "encoder")
    execute(flags(tiny, folder / "run", *STORY, model=folder / "encoder"))
    return folder


def test_the_fine_tuned_predecessor_is_saved_as_a_plain_model(whole_story):
    predecessor = predictor_of(whole_story / "run" / "predecessor")
    assert predecessor.config.num_hidden_layers == 4
    assert predecessor.config.label2id == {"entailment": 0, "not_entailment": 1}


def test_the_predecessor_is_trained_with_its_own_settings_and_frozen_afterwards(whole_story):
    encoder = weights_of(whole_story / "encoder")
    predecessor, student = (weights_of(whole_story / "run" / name) for name in ("predecessor", "student"))
    name = "embeddings.word_embeddings.weight"
    moved = (predecessor[f"bert.{name}"] - encoder[name]).abs().max()
    assert 2e-3 < moved < 1.3e-2  # 6 steps of AdamW at up to 2e-3
    for name in ("bert.embeddings.word_embeddings.weight", "classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(student[name], predecessor[name])


def test_the_successors_continue_from_the_fine_tuned_predecessor(whole_story):
    predecessor, student = (weights_of(whole_story / "run" / name) for name in ("predecessor", "student"))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert 0 < (student[name] - predecessor[name]).abs().max() < 2.5e-3  # 2 steps at up to 1e-3


def test_a_model_without_a_trained_classifier_is_warned_about(tiny, whole_story, tmp_path, capsys):  # noqa: F811
    execute(flags(tiny, tmp_path, "--max_steps", "1", model=whole_story / "encoder"))
    assert "not fine-tuned on RTE" in capsys.readouterr().out


def test_a_checkpoint_in_half_precision_trains_in_single_precision(tiny, tmp_path):  # noqa: F811
    predictor_of(tiny.model).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    trained_in = []

    class Spy(DistillationTrainer):
        def compute_loss(self, model, *args, **kwargs):
            trained_in.extend(parameter.dtype for parameter in model.parameters())
            return super().compute_loss(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DistillationTrainer", Spy)
        execute(flags(tiny, tmp_path / "run", "--max_steps", "1", model=tmp_path / "half"))
    assert set(trained_in) == {torch.float32}


@pytest.mark.parametrize("named", ["multi_label_classification", "regression"])
def test_the_task_and_not_the_models_config_says_what_kind_of_problem_it_is(tiny, tmp_path, named):  # noqa: F811
    model = shutil.copytree(tiny.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "problem_type": named}))
    for name, where in (("named", model), ("plain", tiny.model)):
        execute(flags(tiny, tmp_path / name, "--max_steps", "2", model=where))
    assert predictor_of(tmp_path / "named" / "student").config.problem_type == "single_label_classification"
    assert_same_bits(weights_of(tmp_path / "named" / "student"), weights_of(tmp_path / "plain" / "student"))


# evaluation, selection, prediction


def test_the_best_is_chosen_on_the_selection_split_when_there_is_one(tiny, tmp_path):  # noqa: F811
    more = ("--num_train_epochs", "4", "--evaluate_during_training", "--save_steps", "1", "--selection_split", "0.34")
    execute(flags(tiny, tmp_path, *more, "--method", "finetune"))
    result = result_of(tmp_path)
    selection = {line["step"]: line["eval_selection_accuracy"] for line in log_of(tmp_path, "eval_selection_accuracy")}
    dev = {line["step"]: line["eval_dev_accuracy"] for line in log_of(tmp_path, "eval_dev_accuracy")}
    assert len(selection) == result["steps"] == 8  # 15 examples are left to train on: 2 batches
    assert result["best_step"] == min(step for step, value in selection.items() if value == max(selection.values()))
    assert result["best"] == dev[result["best_step"]]
    assert result["last"] == dev[8]
    assert result["best_chosen_on"] == "selection split of the training set"


def test_training_examples_can_be_limited(tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path, "--method", "finetune", "--max_train_samples", "9", "--num_train_epochs", "1"))
    assert result_of(tmp_path)["steps"] == 2  # batches of 8


def test_the_last_step_is_evaluated_even_between_two_evaluations(tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path, "--max_steps", "3", "--evaluate_during_training", "--eval_steps", "2"))
    assert [line["step"] for line in log_of(tmp_path, "eval_dev_accuracy")] == [2, 3]


def test_the_best_student_is_exported_beside_the_last(trained, tiny):  # noqa: F811
    rows = [line.split("\t") for line in lines(tiny.data / "dev.tsv")[1:]]
    batch = tiny_tokenizer()([row[1] for row in rows], [row[2] for row in rows], padding=True, return_tensors="pt")
    model = predictor_of(trained / "student_best")
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1).tolist()
    correct = [model.config.id2label[p] == row[3] for p, row in zip(predicted, rows, strict=True)]
    assert result_of(trained)["best"] == pytest.approx(np.mean(correct))


def test_an_exported_student_can_be_evaluated_and_can_predict_by_itself(trained, tiny, tmp_path):  # noqa: F811
    execute(flags(tiny, tmp_path, "--do_predict", model=trained / "student", train=False))
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["dev_accuracy"] == result_of(trained)["last"]
    assert lines(tmp_path / "predictions" / "RTE.tsv") == lines(trained / "predictions" / "RTE.tsv")


def test_mnli_reports_matched_and_mismatched_and_predicts_both_and_the_diagnostics(tiny, tmp_path):  # noqa: F811
    labels = ("entailment", "neutral", "contradiction")
    for seed, name in enumerate(("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")):
        texts = zip(sentences(8, 2 * seed), sentences(8, 2 * seed + 1), strict=True)
        rows = [[str(i), a, b, labels[i % 3]] for i, (a, b) in enumerate(texts)]
        header = ["index", "sentence1", "sentence2", "gold_label"]
        (tmp_path / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
    (tmp_path / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\ta cat ran\ta cat sat\n")
    model = tmp_path / "model"
    BertModel(tiny_config()).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    words = flags(tiny, tmp_path / "run", "--method", "finetune", "--max_steps", "1", "--do_predict", model=model)
    words[words.index("RTE")], words[words.index(str(tiny.data))] = "MNLI", str(tmp_path)
    execute(words)
    result = result_of(tmp_path / "run")
    assert result["last_evaluation"].keys() == {"dev_matched_accuracy", "dev_mismatched_accuracy"}
    assert result["last"] == result["last_evaluation"]["dev_matched_accuracy"]
    predictions = tmp_path / "run" / "predictions"
    assert {path.name for path in predictions.iterdir()} == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}
    header, line = lines(predictions / "AX.tsv")
    assert (header, line.split("\t")[0], line.split("\t")[1] in labels) == ("index\tprediction", "0", True)
    assert read_confusion(tmp_path / "run").evaluated_on == "dev matched"


# batches


def widths_of_batches(monkeypatch, words):
    widths = []

    class Spy(DistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                widths.append((inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1).max().item()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(pipeline, "DistillationTrainer", Spy)
    execute(words)
    return widths


def test_batches_are_padded_to_their_longest_example_and_grouped_by_length(tiny, tmp_path, monkeypatch):  # noqa: F811
    widths = widths_of_batches(monkeypatch, flags(tiny, tmp_path, "--num_train_epochs", "1"))
    assert all(width == longest for width, longest in widths)
    padded = [width for width, _ in widths]
    assert max(padded) - min(padded) >= 4  # shuffled freely, each batch of 8 would have a long example


def test_pad_to_max_length_pads_every_batch_alike(tiny, tmp_path, monkeypatch):  # noqa: F811
    widths = widths_of_batches(monkeypatch, flags(tiny, tmp_path, "--num_train_epochs", "1", "--pad_to_max_length"))
    assert [width for width, _ in widths] == [32, 32, 32]


# precision and compilation


def test_a_predecessor_that_is_tuned_in_bf16_is_the_one_that_is_saved(tiny, tmp_path):  # noqa: F811
    tuned = ("--finetune_predecessor", "--predecessor_num_train_epochs", "1", "--max_steps", "2")
    execute(flags(tiny, tmp_path, "--bf16", *tuned, *DSKD))
    assert (tmp_path / "student" / "config.json").exists()


@pytest.mark.gpu
def test_bf16_runs_to_finite_losses_and_exports_single_precision(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # the Trainer may leave its choice in the environment
    execute(flags(tiny, tmp_path, "--bf16", "--max_steps", "4", *DSKD))
    logged = log_of(tmp_path, "loss")
    assert all(math.isfinite(line["task_loss"]) and math.isfinite(line["dskd_loss"]) for line in logged)
    assert {value.dtype for value in weights_of(tmp_path / "student").values()} == {torch.float32}


def test_torch_compile_compiles_before_training(tiny, tmp_path, monkeypatch):  # noqa: F811
    compiled = []
    monkeypatch.setattr(pipeline, "compile_layers", compiled.append)
    execute(flags(tiny, tmp_path, "--torch_compile", "--max_steps", "1"))
    [model] = compiled
    assert len(model.theseus_modules) == 2


# resuming


def interrupt(whole, output, step: int) -> None:
    """What a run killed after its checkpoint at a step leaves behind."""
    shutil.copytree(whole, output)
    for path in output.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (output / "result.json").unlink()
    shutil.rmtree(output / "student")


@pytest.mark.parametrize("basis", ["own", "update", "curvature"])
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(tiny, tmp_path, basis):  # noqa: F811
    more = ("--max_steps", "6", "--save_steps", "3", "--evaluate_during_training", "--eval_steps", "1")
    more += ("--ifsvd", "--svd_steps", "2", "--grad_steps", "5", "--basis", basis)
    more += () if basis == "curvature" else ("--rank_size", "4")
    whole, output = tmp_path / "whole", tmp_path / "resumed"
    execute(flags(tiny, whole, *more))
    interrupt(whole, output, 3)
    execute(flags(tiny, output, *more, "--resume"))

    assert_same_bits(weights_of(output / "student"), weights_of(whole / "student"))
    assert_same_bits(weights_of(output / "student_best"), weights_of(whole / "student_best"))
    keys = ("step", "loss", "task_loss", "dskd_loss", "effective_directions", "eval_dev_accuracy", "learning_rate")
    logs = [[[line.get(key) for key in keys] for line in log_of(run, "step")] for run in (whole, output)]
    assert logs[0] == logs[1]
    first, second = result_of(whole), result_of(output)
    for key in ("last", "best", "best_step", "steps", "parameters", "dskd"):
        assert second[key] == first[key]


def test_a_run_resumed_within_its_second_epoch_goes_on_with_the_examples_that_were_left(tiny, tmp_path):  # noqa: F811
    more = ("--max_steps", "6", "--save_steps", "4")
    execute(flags(tiny, tmp_path / "whole", *more))
    interrupt(tmp_path / "whole", tmp_path / "resumed", 4)
    execute(flags(tiny, tmp_path / "resumed", *more, "--resume"))
    assert_same_bits(weights_of(tmp_path / "resumed" / "student"), weights_of(tmp_path / "whole" / "student"))


def test_a_resumed_run_counts_the_time_of_both_parts(tiny, tmp_path):  # noqa: F811
    more = ("--max_steps", "4", "--save_steps", "2")
    execute(flags(tiny, tmp_path / "whole", *more))
    interrupt(tmp_path / "whole", tmp_path / "resumed", 2)
    path = tmp_path / "resumed" / "checkpoint-2" / METHOD_STATE
    state = torch.load(path, weights_only=True)
    assert state["totals"]["examples"] == 16
    state["totals"]["seconds"] = 1000.0
    torch.save(state, path)
    files = [file for file in path.parent.iterdir() if file.name != manifest.MANIFEST]
    manifest.write_manifest(path.with_name(manifest.MANIFEST), files)
    execute(flags(tiny, tmp_path / "resumed", *more, "--resume"))
    result = result_of(tmp_path / "resumed")
    assert 1000 < result["wall_seconds"] < 1100
    assert result["throughput"] == pytest.approx(32 / result["wall_seconds"], rel=0.01)


def test_a_half_written_checkpoint_is_passed_over(trained, tmp_path):
    interrupt(trained, tmp_path / "run", 6)
    (tmp_path / "run" / "checkpoint-6" / METHOD_STATE).unlink()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"


def test_a_copy_of_a_checkpoint_is_no_checkpoint(trained, tmp_path):
    interrupt(trained, tmp_path / "run", 6)
    shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "run" / "checkpoint-6.bak")
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-6"


def test_the_last_checkpoint_goes_only_when_the_next_is_complete(tiny, tmp_path, monkeypatch):  # noqa: F811
    on_save, complete = MethodStateCallback.on_save, []

    def spy(*args, **others):
        complete.append(last_checkpoint(tmp_path))
        on_save(*args, **others)

    monkeypatch.setattr(MethodStateCallback, "on_save", spy)
    execute(flags(tiny, tmp_path, "--max_steps", "6", "--save_steps", "2", "--save_total_limit", "1"))
    assert complete == [None, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_run_is_not_resumed_with_other_training_examples(tiny, tmp_path):  # noqa: F811
    more = ("--max_steps", "4", "--save_steps", "2")
    execute(flags(tiny, tmp_path / "whole", *more))
    interrupt(tmp_path / "whole", tmp_path / "run", 2)
    fewer = SimpleNamespace(model=tiny.model, data=write_rte(tmp_path / "data", train=23))
    with pytest.raises(UserError, match=r"checkpoint-2 was written with 24 training examples, now there are 23$"):
        execute(flags(fewer, tmp_path / "run", *more, "--resume"))
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_run_is_not_resumed_by_another_number_of_processes(trained):
    callback = MethodStateCallback(None, None, {}, circumstances={"processes": 2})
    with pytest.raises(UserError, match=r"checkpoint-6 was written with 1 processes, now there are 2$"):
        callback.load(last_checkpoint(trained))


@pytest.mark.parametrize("flag", ["--resume", "--overwrite_output_dir"])
def test_a_run_stopped_before_its_first_checkpoint_is_started_again_by_either_flag(tiny, tmp_path, flag):  # noqa: F811
    more = ("--max_steps", "2")
    execute(flags(tiny, tmp_path / "whole", *more))
    interrupt(tmp_path / "whole", tmp_path / "again", 0)
    execute(flags(tiny, tmp_path / "again", *more, flag))
    assert_same_bits(weights_of(tmp_path / "again" / "student"), weights_of(tmp_path / "whole" / "student"))


def test_a_resumed_run_takes_the_predecessor_that_it_had_trained(tiny, whole_story, tmp_path):  # noqa: F811
    interrupt(whole_story / "run", tmp_path / "run", 0)
    before = snapshot(tmp_path / "run" / "predecessor")
    execute(flags(tiny, tmp_path / "run", *STORY, "--resume", model=whole_story / "encoder"))
    assert snapshot(tmp_path / "run" / "predecessor") == before
    assert_same_bits(weights_of(tmp_path / "run" / "student"), weights_of(whole_story / "run" / "student"))


def test_a_run_stopped_while_the_predecessor_trained_can_be_resumed(tiny, whole_story, tmp_path):  # noqa: F811
    def stop(*_):
        raise KeyboardInterrupt

    words = flags(tiny, tmp_path / "run", *STORY, model=whole_story / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_finetune_predecessor", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(words)
    execute([*words, "--resume"])
    assert_same_bits(weights_of(tmp_path / "run" / "student"), weights_of(whole_story / "run" / "student"))


# data of one's own


def test_a_custom_classification_reads_csv_and_takes_its_labels_from_the_training_file(tiny, tmp_path):  # noqa: F811
    for seed, name in enumerate(("train", "dev", "test")):
        rows = [f'"{text}, it was",{("good", "bad", "old")[i % 3]}\n' for i, text in enumerate(sentences(12, seed))]
        (tmp_path / f"{name}.csv").write_text("".join(["review,verdict\n", *rows]))
    BertModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    words = ["--model_name_or_path", tmp_path / "encoder", "--task_name", "custom", "--output_dir", tmp_path / "run"]
    words += ["--do_train", "--do_eval", "--do_predict", "--text_columns", "review", "--label_column", "verdict"]
    words += [f"--{name}_file={tmp_path / name}.csv" for name in ("train", "dev", "test")]
    words += ["--method", "finetune", "--max_steps", "2", "--max_seq_length", "32", "--report_to", "none"]
    execute([str(word) for word in [*words, "--disable_tqdm"]])
    assert predictor_of(tmp_path / "run" / "student").config.id2label == {0: "bad", 1: "good", 2: "old"}
    assert result_of(tmp_path / "run")["last_evaluation"].keys() == {"dev_accuracy", "dev_f1", "dev_balanced_accuracy"}
    predicted = [line.split("\t")[1] for line in lines(tmp_path / "run" / "predictions" / "predictions.tsv")[1:]]
    assert len(predicted) == 12
    assert set(predicted) <= {"good", "bad", "old"}


def test_a_custom_regression_reads_jsonl_pairs_and_compresses_with_dskd(tiny, tmp_path):  # noqa: F811
    for seed, name in enumerate(("train", "dev")):
        pairs = zip(sentences(12, seed), sentences(12, seed + 5), strict=True)
        rows = [json.dumps({"a": a, "b": b, "score": i / 4}) + "\n" for i, (a, b) in enumerate(pairs)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    BertModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    words = ["--model_name_or_path", tmp_path / "encoder", "--task_name", "custom", "--output_dir", tmp_path / "run"]
    words += ["--do_train", "--do_eval", "--text_columns", "a", "b", "--label_column", "score", "--regression"]
    words += [f"--{name}_file={tmp_path / name}.jsonl" for name in ("train", "dev")]
    words += ["--finetune_predecessor", "--predecessor_num_train_epochs", "1", "--max_steps", "3", *DSKD]
    execute([str(word) for word in [*words, "--max_seq_length", "32", "--report_to", "none", "--disable_tqdm"]])
    result = result_of(tmp_path / "run")
    assert (result["metric"], result["last_evaluation"].keys()) == ("pearson", {"dev_pearson", "dev_spearman"})
    assert predictor_of(tmp_path / "run" / "student").config.num_labels == 1
    assert all(math.isfinite(line["task_loss"]) for line in log_of(tmp_path / "run", "task_loss"))


def test_lower_casing_makes_a_cased_model_read_all_text_alike(tiny, tmp_path):  # noqa: F811
    tiny_tokenizer(do_lower_case=False).save_pretrained(shutil.copytree(tiny.model, tmp_path / "cased"))
    data = shutil.copytree(tiny.data, tmp_path / "data")
    rows = lines(data / "test.tsv")
    (data / "test.tsv").write_text("\n".join([rows[0], *(row.upper() for row in rows[1:])]))
    upper = SimpleNamespace(data=data)
    predicted = {}
    for name, where, more in (("upper", upper, ["--do_lower_case"]), ("lower", tiny, [])):
        words = flags(where, tmp_path / name, "--do_predict", *more, model=tmp_path / "cased", train=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                pipeline,
                "write_predictions",
                lambda task, folder, logits, key, name=name: predicted.update({name: logits}),
            )
            execute(words)
    np.testing.assert_array_equal(predicted["upper"], predicted["lower"])
