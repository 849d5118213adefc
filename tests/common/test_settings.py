"""One table is the source of flags, keys, checks, the documentation's table and what the loss is made with."""

import argparse
import subprocess
import sys

import pytest
import torch
from torch import nn

import bert_of_theseus.arguments
import bert_of_theseus.pipeline
import common.settings
import common.svd_loss
import cv.config
from bert_of_theseus.arguments import build_parser, parse_arguments
from common import ROOT
from common.run.errors import UserError
from common.run.numbers import Number
from common.settings import (
    SETTINGS,
    Setting,
    by_name,
    conflicts,
    label,
    of_arguments,
    of_keys,
    settings_table,
)
from common.svd_loss import build_loss, build_reading
from cv.config import defaults, load_config
from dskd import Curvature, DirectionSensitivityLoss, Own, Spectrum, Update
from dskd.controls import (
    ConstantProgress,
    Dealt,
    DiagonalFisher,
    Plain,
    RandomDirection,
    ReleasedGradient,
    ShuffledFactors,
)
from dskd.sensitivity import magnitude, sensitivity, tempered

BASE = str(ROOT / "configs" / "demo" / "base.yaml")
TRAIN = ["--model_name_or_path", "M", "--task_name", "RTE", "--output_dir", "O", "--do_train", "--ifsvd"]
NAMES = {setting.name: setting for setting in SETTINGS}


def values(**changes):
    """The vision program's defaults by name."""
    return of_keys(defaults().DSKD) | changes


def pairs():
    torch.manual_seed(0)
    return [("a", nn.Parameter(torch.randn(5, 4)), torch.randn(5, 4))]


# The table itself
@pytest.mark.parametrize("column", ["name", "flag", "key"])
def test_no_two_settings_share_a_name_a_flag_or_a_key(column):
    found = [getattr(setting, column) for setting in SETTINGS]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_among_what_is_allowed(name):
    setting = NAMES[name]
    assert setting.allows(setting.cifar)
    assert setting.glue is None or setting.allows(setting.glue)


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_and_a_key_have_the_defaults_of_the_table(name):
    setting = NAMES[name]
    action = next(action for action in build_parser()._actions if setting.flag in action.option_strings)
    assert (action.dest, action.default, action.help) == (setting.dest, setting.glue, setting.help)
    assert defaults().DSKD[setting.key] == setting.cifar


@pytest.mark.parametrize("name", NAMES)
def test_differing_defaults_are_explained(name):
    setting = NAMES[name]
    told_otherwise = setting.name in ("driver", "alpha")  # of these the unset words differ, or the driver's help tells
    assert setting.glue == setting.cifar or setting.why or told_otherwise


def test_a_setting_of_a_part_is_an_argument_of_it():
    readings = {"own": Own, "update": Update, "spectrum": Spectrum, "curvature": Curvature}
    for setting in SETTINGS:
        if setting.part == "reading":
            for basis in setting.bases:
                assert setting.name in readings[basis].__dataclass_fields__
        if setting.part == "loss":
            assert setting.name in DirectionSensitivityLoss.__init__.__annotations__


def test_the_table_needs_no_torch():
    program = "import sys, common.settings; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# One more setting
@pytest.fixture
def memory(monkeypatch):
    """The memory of the curvature, with other defaults and another range."""
    one = Setting(
        *("memory", "--memory", "MEMORY", 0.9, 0.8, Number(float, 0, 0.99)),
        "share of the former factors that stays",
        "a test's",
        part="reading",
        bases=("curvature",),
    )
    others = (setting for setting in SETTINGS if setting.name != "memory")
    replaced = (*others, one)
    for module in (common.settings, common.svd_loss, cv.config, bert_of_theseus.arguments, bert_of_theseus.pipeline):
        monkeypatch.setattr(module, "SETTINGS", replaced)
    return one


@pytest.fixture
def endurance(monkeypatch):
    """An argument of the loss that there is none of yet."""
    one = Setting("endurance", "--endurance", "ENDURANCE", 3, 3, Number(int, 1), "steps to wait", part="loss")
    for module in (common.settings, common.svd_loss, cv.config, bert_of_theseus.arguments, bert_of_theseus.pipeline):
        monkeypatch.setattr(module, "SETTINGS", (*SETTINGS, one))
    return one


@pytest.mark.usefixtures("memory")
def test_a_new_setting_is_a_flag_with_its_default_and_its_range():
    assert parse_arguments([*TRAIN, "--basis", "curvature"]).memory == 0.9
    assert parse_arguments([*TRAIN, "--basis", "curvature", "--memory", "0.5"]).memory == 0.5
    with pytest.raises(UserError, match=r"--memory: '2' is not a number from 0 to 0\.99"):
        parse_arguments([*TRAIN, "--basis", "curvature", "--memory", "2"])


@pytest.mark.usefixtures("memory")
def test_a_new_setting_is_a_key_with_its_default_and_its_range():
    assert load_config(BASE).DSKD.MEMORY == 0.8
    assert load_config(BASE, ["DSKD.BASIS", "curvature", "DSKD.MEMORY", "0.5"]).DSKD.MEMORY == 0.5
    with pytest.raises(UserError, match=r"DSKD\.MEMORY = 2\.0: expected a number from 0 to 0\.99"):
        load_config(BASE, ["DSKD.BASIS", "curvature", "DSKD.MEMORY", "2"])


@pytest.mark.usefixtures("memory")
def test_a_new_setting_is_refused_where_it_has_no_effect():
    with pytest.raises(UserError, match="--memory has no effect with --basis own"):
        parse_arguments([*TRAIN, "--memory", "0.5"])
    with pytest.raises(UserError, match=r"DSKD\.MEMORY = 0\.5: expected 0\.8 with DSKD\.BASIS own"):
        load_config(BASE, ["DSKD.MEMORY", "0.5"])


@pytest.mark.usefixtures("memory")
def test_a_new_flag_needs_dskd():
    with pytest.raises(UserError, match="--memory needs --ifsvd"):
        parse_arguments([word for word in TRAIN if word != "--ifsvd"] + ["--memory", "0.5"])


@pytest.mark.usefixtures("memory")
def test_a_new_setting_stands_in_the_documentations_table():
    assert settings_table().endswith(
        "| `--memory` | `MEMORY` | 0.9 | 0.8 | Share of the former factors that stays. Defaults: a test's. |\n"
    )


@pytest.mark.usefixtures("memory")
def test_a_new_setting_is_handed_to_the_reading_that_has_it():
    args = parse_arguments([*TRAIN, "--basis", "curvature", "--memory", "0.5"])
    assert build_reading(of_arguments(args), 1) == Curvature(memory=0.5)
    cfg = load_config(BASE, ["DSKD.BASIS", "curvature"])
    assert build_reading(of_keys(cfg.DSKD), 1) == Curvature(memory=0.8)
    assert isinstance(build_reading(of_keys(load_config(BASE).DSKD), 1), Own)


@pytest.mark.usefixtures("memory")
def test_a_new_setting_is_found_in_a_record_of_either_program():
    assert by_name({"memory": 0.5})["memory"] == by_name({"MEMORY": 0.5})["memory"] == 0.5


@pytest.mark.usefixtures("endurance")
def test_a_new_setting_of_the_loss_is_handed_to_it(monkeypatch):
    handed = {}
    monkeypatch.setattr(common.svd_loss, "DirectionSensitivityLoss", lambda pairs, reading, **how: handed.update(how))
    build_loss(pairs(), of_keys(load_config(BASE, ["DSKD.ENDURANCE", "7"]).DSKD), 1)
    assert handed == {"svd_steps": 100, "grad_steps": 1, "drift": 0.0, "endurance": 7}


# The table of the documentation
def test_every_setting_has_a_row_with_its_defaults():
    head, line, *rows = settings_table().splitlines()
    assert head.count("|") == line.count("|") == 6
    assert len(rows) == len(SETTINGS)
    for setting, row in zip(SETTINGS, rows, strict=True):
        flag, key, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert (flag, key) == (f"`{setting.flag}`", f"`{setting.key}`")
        assert row.count("|") == 6
        assert setting.why in row


def test_defaults_that_are_none_are_left_blank():
    rows = [row.split("|") for row in settings_table().splitlines()[2:]]
    rows = {flag.strip(" `"): [glue.strip(), cifar.strip()] for _, flag, _, glue, cifar, *_ in rows}
    assert rows["--alpha"] == ["", ""]
    assert rows["--grad_steps"] == ["", "1"]
    assert rows["--drift"] == ["0.0", "0.0"]


# By name
def test_the_records_of_both_programs_are_read_alike():
    flags = vars(parse_arguments([*TRAIN, "--rank_size", "8", "--basis", "update"]))
    keys = dict(load_config(BASE, ["DSKD.RANK", "8", "DSKD.BASIS", "update"]).DSKD)
    assert by_name(flags)["rank"] == by_name(keys)["rank"] == 8
    assert by_name(flags)["basis"] == by_name(keys)["basis"] == "update"
    assert set(by_name(flags)) == set(by_name(keys)) == set(NAMES)


@pytest.mark.parametrize("record", [{"ALPHA": -1.0}, {"alpha": None}])
def test_a_word_for_unset_is_none(record):
    assert by_name(record) == {"alpha": None}


def test_an_alpha_of_zero_is_set():
    assert by_name({"ALPHA": 0.0}) == {"alpha": 0.0}


def test_what_is_not_recorded_is_left_out():
    assert by_name({"SVD_STEPS": 5, "epochs": 3}) == {"svd_steps": 5}


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({}, "own"),
        ({"basis": "own", "control": "sensitive"}, "own"),
        ({"basis": "curvature"}, "curvature"),
        ({"basis": "update", "control": "plain"}, "update plain"),
    ],
)
def test_a_run_is_labelled_by_basis_and_control(record, shown):
    assert label(record) == shown


# What excludes what
def refused(**changes) -> dict[str, tuple]:
    return {name: only for name, _, only, _ in conflicts(values(**changes))}


def test_the_defaults_exclude_what_the_curvature_alone_has():
    assert set(refused()) == {"memory", "factors"}
    assert {each.name for each in conflicts(of_arguments(parse_arguments(TRAIN)))} == {"memory", "factors"}


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"basis": "update"}, "smoothing memory factors"),
        ({"basis": "curvature"}, "rank smoothing driver alpha span"),
        ({"score": "magnitude"}, "alpha memory factors"),
        ({"control": "released"}, "smoothing memory factors"),
        ({"control": "released", "basis": "update"}, "smoothing control memory factors"),
        ({"control": "ewc"}, "control memory factors"),
        ({"control": "ewc", "basis": "curvature", "score": "random"}, "rank smoothing driver alpha span score factors"),
        ({"basis": "curvature", "score": "tempered"}, "rank smoothing driver alpha span score"),
    ],
    ids=str,
)
def test_settings_without_an_effect_are_named(changes, without):
    assert set(refused(**changes)) == set(without.split())


def test_the_curvature_has_two_scores():
    assert refused(basis="curvature", score="tempered")["score"] == ("sensitivity", "random")
    assert "score" not in refused(basis="curvature", score="random")


def test_what_the_released_gradient_needs_is_told():
    with pytest.raises(UserError, match=r"^--direction released needs --basis own$"):
        parse_arguments([*TRAIN, "--direction", "released", "--basis", "update"])
    with pytest.raises(UserError, match=r"DSKD\.DIRECTION = 'released': expected another one, or DSKD\.BASIS own"):
        load_config(BASE, ["DSKD.DIRECTION", "released", "DSKD.BASIS", "update"])


def test_a_quiet_setting_may_stay_in_a_file_where_it_has_no_effect():
    assert load_config(BASE, ["DSKD.BASIS", "curvature", "DSKD.DRIVER", "svd"]).DSKD.DRIVER == "svd"
    with pytest.raises(UserError, match="--svd_driver has no effect with --basis curvature"):
        parse_arguments([*TRAIN, "--basis", "curvature", "--svd_driver", "svd"])


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("alpha", -1.0, True),  # unset
        ("alpha", -0.5, False),
        ("alpha", 1.0, True),
        ("rank", 0, True),
        ("rank", -1, False),
        ("basis", "teacher", False),
        ("weight", float("nan"), False),
        ("weight", float("inf"), False),
    ],
)
def test_what_a_setting_allows(setting, value, allowed):
    assert NAMES[setting].allows(value) is allowed


# GLUE's own defaults
def test_the_gradient_is_held_for_10_steps_by_default_but_not_longer_than_the_directions():
    assert parse_arguments(TRAIN).grad_steps == parse_arguments([*TRAIN, "--svd_steps", "11"]).grad_steps == 10
    assert parse_arguments([*TRAIN, "--svd_steps", "7"]).grad_steps == 7
    assert parse_arguments([*TRAIN, "--svd_steps", "7", "--grad_steps", "2"]).grad_steps == 2


def test_words_and_numbers_are_checked_by_argparse():
    group = argparse.ArgumentParser(exit_on_error=False).add_argument_group("DSKD")
    common.settings.add_flags(group)
    kinds = {action.dest: (action.choices, action.type) for action in group._group_actions}
    assert kinds["basis"][0] == ("own", "update", "spectrum", "curvature")
    assert kinds["rank_size"] == (None, Number(int, 0))


# What is made of the settings
@pytest.mark.parametrize(
    ("changes", "reading"),
    [
        ({}, Own(0)),
        ({"rank": 5, "smoothing": 0.1, "driver": "svd", "span": "interval"}, Own(5, 0.1, "svd", span="interval")),
        ({"basis": "update", "rank": 5}, Update(5)),
        ({"basis": "spectrum", "rank": 5}, Spectrum(5)),
        ({"basis": "curvature", "rank": 5, "driver": "svd"}, Curvature()),
        ({"basis": "curvature", "score": "random"}, ShuffledFactors(Curvature(), 7)),
        ({"score": "tempered"}, Own(0, score=tempered)),
        ({"score": "magnitude", "basis": "update"}, Update(0, score=magnitude)),
        ({"score": "random"}, Own(0, score=Dealt(sensitivity, 7))),
        ({"control": "plain"}, Plain(Own(0))),
        ({"control": "random", "basis": "update"}, RandomDirection(Update(0), 7)),
        ({"control": "released"}, ReleasedGradient(Own(0))),
        ({"control": "ewc", "basis": "curvature"}, DiagonalFisher()),
        ({"control": "shuffled"}, Own(0)),
        ({"control": "shrink"}, Own(0)),
        ({"alpha": 0.0}, ConstantProgress(Own(0), 0.0)),
        ({"alpha": 0.5, "control": "plain"}, ConstantProgress(Plain(Own(0)), 0.5)),
    ],
    ids=str,
)
def test_the_reading_of_some_settings(changes, reading):
    assert build_reading(values(**changes), seed=7) == reading


def test_the_loss_has_the_intervals_and_the_controls_of_the_pairs():
    made = pairs()
    dskd = build_loss(made, values(svd_steps=9, grad_steps=3, drift=0.5, control="shrink"), seed=1)
    assert (dskd.svd_steps, dskd.grad_steps, dskd.drift) == (9, 3, 0.5)
    assert not dskd.teachers[0].any()
    shuffled = build_loss(made, values(control="shuffled"), seed=1).teachers[0]
    assert torch.equal(shuffled.flatten().sort().values, made[0][2].flatten().sort().values)
    assert not torch.equal(shuffled, made[0][2])


def test_pairs_that_do_not_fit_are_the_users_error():
    with pytest.raises(UserError, match="pair a: student"):
        build_loss([("a", nn.Parameter(torch.ones(5, 4)), torch.ones(4, 4))], values(), seed=1)
