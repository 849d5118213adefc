"""The configuration of the vision pipeline: defaults, files, overrides, and what bad input is told."""

import os
import re
import sys

import pytest

import cv.train_svd
import cv.trainer
from common import ROOT
from common.run.errors import UserError, run_cli
from common.settings import SETTINGS
from cv.config import as_dict, defaults, leaves, load_config
from cv.methods import METHODS

BASE = str(ROOT / "configs" / "demo" / "base.yaml")


@pytest.fixture
def yaml(tmp_path):
    """Writes a YAML file and gives its path."""

    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def commented_keys(text: str, assignment: str) -> dict[str, str]:
    """Key -> type named in its comment, of lines such as `cfg.A.B = 1  # what it is (int, ...)`."""
    found = re.findall(
        rf"^ +{assignment}\.(\S+) = (?!CfgNode)\S.*?  # .*\((str|int|float|bool|list)\b", text, re.MULTILINE
    )
    return dict(found)


def test_every_default_has_a_comment_with_its_type():
    commented = commented_keys((ROOT / "cv" / "config.py").read_text(), "cfg")
    methods = {name.upper() for name in METHODS}
    types = {key: type(value).__name__ for key, value in leaves(defaults()).items() if key.split(".")[0] not in methods}
    told_in_the_table = {f"DSKD.{setting.key}" for setting in SETTINGS}
    assert commented == {key: kind for key, kind in types.items() if key not in told_in_the_table}
    assert told_in_the_table < types.keys()


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].defaults()])
def test_every_default_of_a_method_has_a_comment_with_its_type(name):
    commented = commented_keys((ROOT / "cv" / "methods" / f"{name}.py").read_text(), "block")
    assert commented == {key: type(value).__name__ for key, value in METHODS[name].defaults().items()}


def test_a_file_replaces_its_base_and_pairs_replace_the_file(yaml):
    yaml("SOLVER:\n  EPOCHS: 3\n  LR: 0.1\n  BATCH_SIZE: 8\n", "base.yaml")
    path = yaml("BASE: base.yaml\nSOLVER:\n  EPOCHS: 4\n  LR: 0.2\n")
    solver = load_config(path, ["SOLVER.LR", "0.3"]).SOLVER
    assert (solver.BATCH_SIZE, solver.EPOCHS, solver.LR) == (8, 4, 0.3)


def test_an_empty_file_gives_the_defaults(yaml):
    assert as_dict(load_config(yaml("# nothing\n"))) == as_dict(defaults())


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "0.0005", "5E-04"])
def test_numbers_with_an_exponent_are_floats_in_files_and_pairs(yaml, text):
    assert load_config(yaml(f"SOLVER: {{WEIGHT_DECAY: {text}}}")).SOLVER.WEIGHT_DECAY == 5e-4
    assert load_config(BASE, ["SOLVER.WEIGHT_DECAY", text]).SOLVER.WEIGHT_DECAY == 5e-4


def test_a_whole_number_serves_as_a_float(yaml):
    value = load_config(yaml("SOLVER: {LR: 1}"), ["DSKD.LAMBDA", "2"])
    assert (value.SOLVER.LR, value.DSKD.LAMBDA) == (1.0, 2.0)
    assert type(value.SOLVER.LR) is type(value.DSKD.LAMBDA) is float


def test_pairs_take_lists_booleans_and_texts_that_look_like_numbers():
    pairs = [
        "SOLVER.LR_DECAY_STAGES",
        "[3, 5]",
        "DSKD.ENABLED",
        "true",
        "DATASET.ROOT",
        "2024",
        "DSKD.PAIRS",
        "[[a, b]]",
    ]
    cfg = load_config(BASE, pairs)
    assert (cfg.SOLVER.LR_DECAY_STAGES, cfg.DSKD.ENABLED, cfg.DATASET.ROOT) == ([3, 5], True, "2024")
    assert cfg.DSKD.PAIRS == [["a", "b"]]


def test_every_key_of_a_method_can_be_set():
    assert load_config(BASE, ["CRD.NCE_K", "7", "KD.T", "2"]).CRD.NCE_K == 7


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("SOLVER: {BATCHSIZE: 8}", "SOLVER.BATCHSIZE", "SOLVER.BATCH_SIZE"),
        ("DISTILER: {TYPE: kd}", "DISTILER", "DISTILLER.TYPE"),
        ("SOLVER: {LAMBDA: 0.1}", "SOLVER.LAMBDA", "DSKD.LAMBDA"),
        ("Solver: {Lr: 0.1}", "Solver", "SOLVER.LR"),
        ("KD: {TEMP: 1.0, T: 2.0}", "KD.TEMP", "KD.T"),
        ("LAMBDA: 0.1", "LAMBDA", "DSKD.LAMBDA"),
    ],
)
def test_an_unknown_key_in_a_file_is_named_with_the_file_and_the_nearest(yaml, text, unknown, nearest):
    path = yaml(text)
    assert refusal(path) == f"{path}: unknown key {unknown}; the nearest is {nearest}"


@pytest.mark.parametrize(
    ("key", "nearest"), [("DSKD.RANKS", "DSKD.RANK"), ("lr", "SOLVER.LR"), ("solver.epochs", "SOLVER.EPOCHS")]
)
def test_an_unknown_key_among_the_pairs_is_named_with_the_nearest(key, nearest):
    assert refusal(BASE, key, "1") == f"command line: unknown key {key}; the nearest is {nearest}"


def test_a_key_like_no_other_is_refused_without_a_guess():
    assert refusal(BASE, "zzzzzzzz", "1") == "command line: unknown key zzzzzzzz"


@pytest.mark.parametrize("text", ["DSKD: true", "DSKD:"])
def test_a_value_for_a_whole_block_is_told_of_its_keys(yaml, text):
    path = yaml(text)
    assert refusal(path) == f"{path}: DSKD is a block of keys; set one of them, such as DSKD.ENABLED"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("SOLVER.EPOCHS", "2.5", "int"),
        ("SOLVER.EPOCHS", "true", "int"),
        ("SOLVER.EPOCHS", "ten", "int"),
        ("SOLVER.LR", "fast", "float"),
        ("SOLVER.LR", "true", "float"),
        ("SOLVER.LR", "null", "float"),
        ("DSKD.ENABLED", "1", "bool"),
        ("SOLVER.LR_DECAY_STAGES", "150", "list"),
        ("SOLVER.LR_DECAY_STAGES", "[1, 2", "list"),
        ("SOLVER.LR_DECAY_STAGES", "(1, 2)", "list"),
        ("SOLVER.LR", "{a: 1}", "float"),
    ],
)
def test_a_wrong_type_names_key_place_and_the_type_that_it_must_have(yaml, key, value, kind):
    assert refusal(BASE, key, value).startswith(f"command line: {key} must be of type {kind} (such as ")


@pytest.mark.parametrize(
    ("text", "key"), [("DISTILLER: {TEACHER: 56}", "DISTILLER.TEACHER"), ("DATASET: {NAME: {a: b}}", "DATASET.NAME")]
)
def test_a_file_must_give_texts_where_texts_belong(yaml, text, key):
    path = yaml(text)
    assert refusal(path).startswith(f"{path}: {key} must be of type str (such as ")


OUT_OF_RANGE = {
    "DISTILLER.TYPE": "kdd",
    "DISTILLER.START": "copy",
    "DISTILLER.FREEZE": "[1]",
    "DATASET.IMAGE_SIZE": "1",
    "DATASET.CROP": "center",
    "DATASET.SUBSET": "-1",
    "DATASET.SUBSET_SEED": "-2",
    "DATASET.HELD_OUT": "-1",
    "SOLVER.BATCH_SIZE": "1",
    "SOLVER.EPOCHS": "0",
    "SOLVER.EVAL_EPOCHS": "0",
    "SOLVER.LR": "0",
    "SOLVER.L2SP": "-1",
    "SOLVER.EMA": "1",
    "SOLVER.OPTIMIZER": "adam",
    "SOLVER.SCHEDULE": "linear",
    "SOLVER.LR_DECAY_STAGES": "[0]",
    "SOLVER.LR_DECAY_RATE": "-0.1",
    "SOLVER.MOMENTUM": "1",
    "SOLVER.WEIGHT_DECAY": "-0.1",
    "SOLVER.SEED": "4294967296",
    "SOLVER.PRECISION": "fp8",
    "DSKD.LAMBDA": "-0.2",
    "DSKD.RANK": "-1",
    "DSKD.SVD_STEPS": "0",
    "DSKD.GRAD_STEPS": "0",
    "DSKD.DRIFT": "-0.1",
    "DSKD.SMOOTHING": "-0.1",
    "DSKD.BASIS": "both",
    "DSKD.DRIVER": "qr",
    "DSKD.DIRECTION": "up",
    "DSKD.ALPHA": "1.5",
    "DSKD.SCORE": "size",
    "DSKD.SPAN": "epoch",
    "DSKD.MEMORY": "1.0",
    "DSKD.FACTORS": "thin",
    "DSKD.PAIRS": "[a, b]",
    "LOG.INTERVAL": "0",
    "LOG.TRACKERS": "[print]",
}


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE.items())
def test_a_value_out_of_range_names_key_place_and_what_is_right(key, value):
    assert re.fullmatch(rf"command line: {key} = (.+): expected \S.*", refusal(BASE, key, value))


@pytest.mark.parametrize("value", ["inf", "-.inf", "nan", ".nan", "1e39"])
@pytest.mark.parametrize("key", ["SOLVER.LR", "SOLVER.LR_DECAY_RATE", "SOLVER.WEIGHT_DECAY", "DSKD.LAMBDA", "KD.T"])
def test_a_number_that_is_not_finite_in_float32_is_refused(yaml, key, value):
    expected = f"{key} = {float(value.replace('.', ''))!r}: expected a finite number, 3.4e+38 at most"
    assert refusal(BASE, key, value) == f"command line: {expected}"
    block, leaf = key.split(".")
    path = yaml(f"{block}: {{{leaf}: {value}}}")
    assert refusal(path) == f"{path}: {expected}"


def test_every_range_that_is_checked_is_tested():
    checked = re.findall(r'^        \(\s*"([A-Z0-9_.]+)",\s', (ROOT / "cv" / "config.py").read_text(), re.MULTILINE)
    assert sorted(OUT_OF_RANGE) == sorted([*checked, *(f"DSKD.{setting.key}" for setting in SETTINGS)])


@pytest.mark.parametrize(
    ("key", "value", "beside"),
    [
        ("DSKD.DIRECTION", "released", "DSKD.BASIS update"),
        ("DSKD.ALPHA", "0.5", "DSKD.SCORE magnitude"),
        ("DSKD.RANK", "4", "DSKD.BASIS curvature"),
        ("DSKD.ALPHA", "0.5", "DSKD.BASIS curvature"),
        ("DSKD.SCORE", "tempered", "DSKD.BASIS curvature"),
        ("DSKD.SPAN", "interval", "DSKD.BASIS curvature"),
        ("DSKD.SMOOTHING", "0.1", "DSKD.BASIS curvature"),
        ("DSKD.SMOOTHING", "0.1", "DSKD.BASIS update"),
        ("DSKD.SMOOTHING", "0.1", "DSKD.DIRECTION released"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(key, value, beside):
    assert load_config(BASE, [key, value])
    assert refusal(BASE, key, value, *beside.split()).startswith(f"command line: {key} = ")


def test_a_value_out_of_range_in_a_base_names_that_file_and_the_value(yaml):
    base = yaml("SOLVER: {EPOCHS: 0}", "base.yaml")
    assert refusal(yaml("BASE: base.yaml")) == f"{base}: SOLVER.EPOCHS = 0: expected at least 1"


def test_a_block_that_occurs_twice_is_refused(yaml):
    path = yaml("DSKD: {ENABLED: true}\nSOLVER: {EPOCHS: 2}\nDSKD: {RANK: 4}")
    message = refusal(path)
    assert message.startswith(f"{path} is not valid YAML: the key 'DSKD' occurs twice")
    assert "line 3" in message


def test_an_output_folder_may_be_below_the_users_own(yaml, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(yaml("OUTPUT_DIR: ~/runs/x")).OUTPUT_DIR == "/home/me/runs/x"


def test_a_missing_file_is_named():
    assert refusal("configs/none.yaml").startswith("--cfg configs/none.yaml: no such file")


def test_a_folder_is_not_a_file():
    assert refusal("configs").startswith("--cfg configs: no such file")


def test_a_missing_base_is_named_with_the_file_that_asks_for_it(yaml):
    path = yaml("BASE: nothing.yaml")
    assert refusal(path) == f"{path}: BASE {os.path.dirname(path)}/nothing.yaml does not exist"


def test_bases_that_lead_in_a_circle_are_refused(yaml):
    first = yaml("BASE: second.yaml", "first.yaml")
    yaml("BASE: first.yaml", "second.yaml")
    assert "second.yaml: BASE" in refusal(first)
    assert refusal(first).endswith("leads back to the file itself")


@pytest.mark.parametrize("text", ["SOLVER: {LR: [", "a: b: c", "\x00", "when: 2024-13-45"])
def test_what_is_no_yaml_is_one_line_with_the_file(yaml, capsys, text):
    path = yaml(text)
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: load_config(path))
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith(f"error: {path} is not valid YAML: ")
    assert message.count("\n") == 1


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "run.yaml is not UTF-8" in refusal(str(tmp_path / "run.yaml"))


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


@pytest.mark.parametrize("text", ["[" * 5000, "- " * 5000, "{a: " * 5000, BOMB.replace("a9", "SOLVER"), "a: &a [*a]"])
def test_yaml_without_bounds_is_one_short_line(yaml, text):
    message = refusal(yaml(text))
    assert len(message) < 600


def test_the_value_of_an_alias_bomb_is_cut_off_in_the_message(yaml):
    lines = BOMB.splitlines()
    pairs = "".join(f"{line}\n" for line in lines) + "DSKD: {PAIRS: *a9}\n"
    assert len(refusal(yaml(pairs))) < 2000
    assert len(refusal(BASE, "DSKD.PAIRS", "[" + "[[" * 20 + "]]" * 20 + "]")) < 2000


@pytest.mark.parametrize("key", ["SOLVER.EPOCHS", "SOLVER.BATCH_SIZE", "DATASET.IMAGE_SIZE", "CRD.NCE_K", "DSKD.RANK"])
@pytest.mark.parametrize("value", [str(10**30), "0x" + "f" * 5000, f"-{10**30}"])
def test_a_whole_number_beyond_every_size_is_refused(yaml, key, value):
    block, leaf = key.split(".")
    path = yaml(f"{block}: {{{leaf}: {value}}}")
    for where, message in ((path, refusal(path)), ("command line", refusal(BASE, key, value))):
        assert message.startswith(f"{where}: {key} = ")
        assert message.endswith("expected 1000000000000000 at most")
        assert len(message) < 300


def test_whole_numbers_beyond_every_size_are_refused_in_lists_and_for_floats():
    assert refusal(BASE, "SOLVER.LR_DECAY_STAGES", f"[{10**30}]").endswith("expected 1000000000000000 at most")
    assert "SOLVER.LR must be of type float" in refusal(BASE, "SOLVER.LR", "1" + "0" * 400)


@pytest.mark.parametrize("text", ["- 1\n- 2", "just words"])
def test_a_file_without_keys_is_refused(yaml, text):
    path = yaml(text)
    assert refusal(path) == f"{path}: expected KEY: value lines"


def test_an_odd_number_of_overrides_names_the_one_without_a_value():
    message = refusal(BASE, "SOLVER.EPOCHS", "1", "SOLVER.LR")
    assert message == "overrides are KEY VALUE pairs; 'SOLVER.LR' has no value"


def test_a_relative_cfg_is_looked_up_here_then_in_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo/base.yaml").DATASET.NAME == "digits"
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    (tmp_path / "configs" / "demo" / "base.yaml").write_text("DATASET: {NAME: cifar10}")
    assert load_config("configs/demo/base.yaml").DATASET.NAME == "cifar10"


def test_a_relative_output_folder_counts_from_the_root_in_files_and_from_here_in_pairs(yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = yaml("OUTPUT_DIR: outputs/x")
    assert (tmp_path / load_config(path).OUTPUT_DIR).resolve() == ROOT / "outputs" / "x"
    assert load_config(path, ["OUTPUT_DIR", "y"]).OUTPUT_DIR == "y"
    monkeypatch.chdir(ROOT)
    assert load_config(path).OUTPUT_DIR == "outputs/x"


def test_an_absolute_output_folder_stays(yaml):
    assert load_config(yaml("OUTPUT_DIR: /somewhere/else")).OUTPUT_DIR == "/somewhere/else"


def test_two_configurations_do_not_share_their_lists():
    load_config(BASE).DSKD.PAIRS.append("x")
    assert load_config(BASE).DSKD.PAIRS == []


@pytest.fixture
def command(monkeypatch):
    """Runs the command line up to the training, and gives what that would get."""
    calls = []
    monkeypatch.setattr(cv.trainer, "train", lambda cfg, **how: calls.append((cfg, how)))

    def call(*words: str):
        monkeypatch.setattr(sys, "argv", ["train_svd.py", *words])
        run_cli(cv.train_svd.main)
        return calls[-1]

    return call


def test_flags_may_stand_between_the_overrides(command):
    cfg, how = command("SOLVER.EPOCHS", "3", "--overwrite", "--cfg", BASE, "SOLVER.LR", "0.1")
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR, how) == (3, 0.1, {"resume": False, "overwrite": True})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--cfg"),
        (("--cfg", BASE, "--resume", "--overwrite"), "give one of them"),
        (("--cfg", BASE, "--resumee"), "--resumee"),
        (("--cfg", BASE, "SOLVER.LRR", "1"), "the nearest is SOLVER.LR"),
        (("--cfg",), "--cfg"),
    ],
)
def test_a_bad_command_line_ends_with_one_line_and_code_two(command, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        command(*words)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
