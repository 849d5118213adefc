"""The command line: the seed's command parses, every flag is explained, what would have no effect is refused."""

import shlex
import subprocess
import sys
import time

import pytest

from bert_of_theseus.arguments import build_parser, parse_arguments
from common import ROOT
from common.run.errors import UserError, run_cli

SCRIPT = ROOT / "nlp" / "BERT-of-Theseus" / "run_glue_SVD_losslayer.py"
SEED_COMMAND = """--model_name_or_path M --task_name RTE --do_train --do_eval --do_lower_case --data_dir D
    --max_seq_length 128 --per_gpu_train_batch_size 32 --per_gpu_eval_batch_size 32 --learning_rate 2e-5 --save_steps 50
    --num_train_epochs 20 --output_dir O --evaluate_during_training --replacing_rate 0.3 --scheduler_type linear
    --scheduler_linear_k 0.0003 --overwrite_output_dir --ifsvd --svd_steps 100 --lambda_size 0.1 --rank_size 32"""
BASE = "--model_name_or_path M --task_name RTE --output_dir O "
TRAIN = BASE + "--do_train --do_eval "
CUSTOM = "--model_name_or_path M --task_name custom --output_dir O "
CUSTOM_REGRESSION = CUSTOM + "--do_train --train_file f --text_columns a --label_column b --regression "

WITHOUT_CURVATURE = (
    "--rank_size 32",
    "--svd_driver gram",
    "--alpha 0",
    "--span step",
    "--smoothing 0",
    "--score tempered",
)  # flags that mean nothing with --basis curvature


def parse(line: str):
    return parse_arguments(shlex.split(line))


def complaint(line: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(line)
    return str(caught.value)


def test_the_seeds_command_line_parses_to_what_it_says():
    args = vars(parse(SEED_COMMAND))
    expected = {
        "model_name_or_path": "M",
        "task_name": "RTE",
        "do_train": True,
        "do_eval": True,
        "do_predict": False,
        "do_lower_case": True,
        "data_dir": "D",
        "max_seq_length": 128,
        "per_gpu_train_batch_size": 32,
        "per_gpu_eval_batch_size": 32,
        "learning_rate": 2e-5,
        "save_steps": 50,
        "num_train_epochs": 20.0,
        "output_dir": "O",
        "evaluate_during_training": True,
        "replacing_rate": 0.3,
        "scheduler_type": "linear",
        "scheduler_linear_k": 0.0003,
        "overwrite_output_dir": True,
        "if_svd": True,
        "svd_steps": 100,
        "lambda_size": 0.1,
        "rank_size": 32,
        "method": "theseus",
        "basis": "own",
    }
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("flag", ["--ifsvd", "--if_svd"])
@pytest.mark.parametrize(
    ("value", "meaning"),
    [("", True), ("true", True), ("True", True), ("1", True), ("false", False), ("False", False), ("0", False)],
)
def test_dskd_is_switched_by_either_spelling_bare_or_with_a_word(flag, value, meaning):
    assert parse(f"{TRAIN} {flag} {value}").if_svd is meaning
    if value:
        assert parse(f"{TRAIN} {flag}={value}").if_svd is meaning


def test_dskd_is_off_by_default():
    assert parse(TRAIN).if_svd is False


def test_the_curvature_takes_all_directions_and_smooths_nothing():
    args = parse(TRAIN + "--ifsvd --basis curvature")
    assert (args.rank_size, args.smoothing) == (0, 0.0)


def test_dskd_switched_by_another_word_is_refused():
    assert "neither true nor false" in complaint(TRAIN + "--ifsvd perhaps")


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        *(
            (TRAIN + flag, flag)
            for flag in ("--lambda_size 0.1", "--rank_size 32", "--svd_steps 100", "--grad_steps 1")
        ),
        *((TRAIN + flag, flag) for flag in ("--basis own", "--svd_driver gram", "--direction plain")),
        *((TRAIN + flag, flag) for flag in ("--alpha 0", "--score tempered", "--span interval")),
        (TRAIN + "--ifsvd --score magnitude --alpha 0.5", "--alpha"),
        (TRAIN + "--ifsvd --basis update --direction released", "--direction released"),
        (TRAIN + "--ifsvd --basis update --smoothing 0", "--smoothing"),
        *((TRAIN + f"--ifsvd --basis curvature {flag}", flag.split()[0]) for flag in WITHOUT_CURVATURE),
        (TRAIN + "--ifsvd --direction released --smoothing 0.1", "--smoothing"),
        (TRAIN + "--ifsvd --drift 0.01 --svd_steps 9", "--drift"),
        (TRAIN + "--ifsvd --drift 0.01 --svd_steps 10 --grad_steps 10", "--drift"),
        (TRAIN + "--if_svd false --basis update", "--basis"),
        *(
            (line + f"--method {method} --kd_temperature 5", "--kd_temperature")
            for line in (TRAIN.replace("RTE", "STS-B"), CUSTOM_REGRESSION)
            for method in ("kd", "pkd")
        ),
        (TRAIN + "--lambda_size=0.1", "--lambda_size"),
        (TRAIN + "--method finetune --replacing_rate 0.3", "--replacing_rate"),
        (TRAIN + "--method finetune --start paired", "--start"),
        (TRAIN + "--method finetune --scheduler_type linear", "--scheduler_type"),
        (TRAIN + "--method finetune --scheduler_linear_k 0.1", "--scheduler_linear_k"),
        (TRAIN + "--method finetune --steps_for_replacing 5", "--steps_for_replacing"),
        (TRAIN + "--scheduler_type constant --scheduler_linear_k 0.1", "--scheduler_linear_k"),
        (TRAIN + "--steps_for_replacing 5", "--steps_for_replacing"),
        (TRAIN + "--predecessor_num_train_epochs 3", "--predecessor_num_train_epochs"),
        (TRAIN + "--predecessor_learning_rate 1e-5", "--predecessor_learning_rate"),
        (TRAIN + "--eval_steps 5", "--eval_steps"),
        (TRAIN + "--selection_split 0.1", "--selection_split"),
        *((TRAIN + flag, flag) for flag in ("--train_file f", "--text_columns a", "--label_column b", "--regression")),
        (BASE + "--do_eval --ifsvd", "--ifsvd"),
        (BASE + "--do_eval --if_svd", "--if_svd"),
        *(
            (BASE + "--do_eval " + flag, flag)
            for flag in (
                "--overwrite_output_dir",
                "--resume",
                "--finetune_predecessor",
                "--method finetune",
                "--num_successor_layers 2",
                "--replacing_rate 0.5",
                "--learning_rate 1e-4",
                "--num_train_epochs 1",
                "--max_steps 3",
                "--max_train_samples 8",
                "--start paired",
                "--per_gpu_train_batch_size 8",
                "--gradient_accumulation_steps 2",
                "--warmup_steps 1",
                "--torch_compile",
                "--evaluate_during_training",
                "--save_steps 5",
                "--save_total_limit 1",
                "--logging_steps 5",
                "--report_to none",
            )
        ),
        (BASE + "--do_train --per_gpu_eval_batch_size 8", "--per_gpu_eval_batch_size"),
        (BASE + "--do_train --evaluate_during_training", "--evaluate_during_training"),
        (CUSTOM + "--do_train --train_file f --text_columns a --label_column b --data_dir D", "--data_dir"),
        (CUSTOM + "--do_train --train_file f --text_columns a --label_column b --dev_file g", "--dev_file"),
        (CUSTOM + "--do_train --train_file f --text_columns a --label_column b --test_file g", "--test_file"),
    ],
)
def test_a_flag_without_effect_is_refused_by_name(line, flag):
    assert complaint(line).startswith(flag.split()[0])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (BASE, "--do_train, --do_eval or --do_predict"),
        (TRAIN + "--max_steps 5 --num_train_epochs 3", "--num_train_epochs or --max_steps"),
        (TRAIN + "--fp16 --bf16", "--fp16 or --bf16"),
        (TRAIN + "--resume --overwrite_output_dir", "--overwrite_output_dir"),
        (TRAIN + "--method finetune --ifsvd", "--num_successor_layers"),
        (CUSTOM + "--do_train --train_file f --label_column b", "--text_columns"),
        (CUSTOM + "--do_train --text_columns a --label_column b", "--train_file"),
        (CUSTOM + "--do_eval --text_columns a --label_column b", "--dev_file"),
        (CUSTOM + "--do_predict --text_columns a --label_column b", "--test_file"),
        (TRAIN + "--no_such_flag", "--no_such_flag"),
        (TRAIN + "--lambda 0.1", "--lambda"),
        ("--task_name RTE --output_dir O --do_train", "--model_name_or_path"),
        (TRAIN + "--method dream", "--method"),
        (TRAIN.replace("RTE", "RTF"), "RTF"),
    ],
)
def test_what_contradicts_is_missing_or_unknown_is_named(line, named):
    assert named in complaint(line)


@pytest.mark.parametrize(
    "words",
    [
        "--ifsvd --rank_size -1",
        "--ifsvd --svd_steps 0",
        "--ifsvd --grad_steps 0",
        "--ifsvd --lambda_size nan",
        "--ifsvd --lambda_size -0.1",
        "--ifsvd --alpha -0.1",
        "--ifsvd --alpha 1.5",
        "--replacing_rate 0",
        "--replacing_rate 1.5",
        "--scheduler_linear_k inf",
        "--learning_rate 0",
        "--learning_rate fast",
        "--num_train_epochs 0",
        "--max_steps 2.5",
        "--max_seq_length 2",
        "--num_successor_layers 0",
        "--per_gpu_train_batch_size 0",
        "--seed -1",
        "--evaluate_during_training --selection_split 1",
    ],
)
def test_a_value_out_of_range_is_named_with_its_flag_and_its_range(words):
    flag, value = words.split()[-2:]
    message = complaint(TRAIN + words)
    assert flag in message
    assert f"'{value}' is not a" in message


def test_a_refused_command_line_ends_with_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: parse(TRAIN + "--basis update"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --basis needs --ifsvd\n"


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    program = "from common.run.errors import run_cli\nrun_cli(lambda: [print('row' * 1000) for _ in range(1000)])"
    shown = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -c 10', sys.executable, program], capture_output=True, text=True, check=True
    )
    assert (shown.stdout, shown.stderr) == ("rowrowrowr", "")


def test_a_test_file_may_stand_beside_the_training_file_when_predicting():
    args = parse(CUSTOM + "--do_predict --train_file f --test_file g --text_columns a b --label_column c")
    assert (args.text_columns, args.test_file) == (["a", "b"], "g")


def test_drift_is_taken_where_a_gradient_can_be_held_on():
    assert parse(TRAIN + "--ifsvd --drift 0.01 --svd_steps 10 --grad_steps 9").drift == 0.01
    assert parse(TRAIN + "--ifsvd --drift 0 --svd_steps 10").drift == 0


@pytest.mark.parametrize("line", [TRAIN, TRAIN.replace("RTE", "STS-B"), CUSTOM_REGRESSION])
def test_the_temperature_has_its_default_where_it_is_not_given(line):
    assert parse(line + "--method kd").kd_temperature == 10


def test_help_takes_less_than_two_seconds_and_explains_every_flag():
    start = time.perf_counter()
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 2
    for action in build_parser()._actions:
        assert action.help
        assert all(option in shown for option in action.option_strings)


def test_help_groups_the_flags():
    titles = [group.title for group in build_parser()._action_groups if group._group_actions]
    assert {"model, task and folders", "text", "method", "DSKD", "training"} <= set(titles)
