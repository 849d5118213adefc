"""Every flag, YAML key, configuration file and published command means what tests/pinned has on record.

The record holds each setting's default and which values are accepted, alone and together, not the words of a refusal:
only the setting it names first. After a change of the settings that is meant, write the files anew with
`PYTHONPATH=.:nlp/BERT-of-Theseus python tests/test_pins.py`, read the difference and say why in the commit.
"""

import csv
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from bert_of_theseus.arguments import build_parser, parse_arguments
from cv.config import defaults, leaves, load_config
from scripts import heal

ROOT = Path(__file__).resolve().parents[1]
PINNED = ROOT / "tests" / "pinned"
YAML = "configs/demo/base.yaml"
MINIMAL = "--model_name_or_path M --task_name RTE --output_dir O"

NUMBERS = ["0", "1", "-1", "0.5", "-0.5", "2", "7", "1e-3", "1e39", "4294967295", "4294967296", "nan", "inf"]
TEXTS = ["", "true", "false", "null", "abc"]
LISTS = ["[]", "[2, 1]", "[0]", "[1.5]", "[tensorboard]", "[wandb]", "[wandb, abc]", "[[a, b]]", "[[a]]", "[[a, 1]]"]
CHOICES = {  # of flags without `choices`, and of keys
    "task_name": "RTE sts-b custom",
    "if_svd": "True no YES",
    "DATASET.CROP": "pad resized",
    "DISTILLER.TYPE": "vanilla kd dkd expkd fitnet at sp crd reviewkd practise KD",
    "DISTILLER.START": "random teacher",
    "SOLVER.PRECISION": "fp32 bf16 fp16",
}

READERS = {  # of the words of a command, by the script
    "train_svd.py": lambda words: load_config(words[1], words[2:]),
    "run_glue_SVD_losslayer.py": parse_arguments,
    "missing_gradients.py": lambda words: parse_arguments(words[2:]),  # behind --missing and its value
    "heal.py": heal.parse_arguments,
}

VALUES = {  # of DSKD's settings, by their flags, tried together
    "lambda_size": "0 0.5",
    "rank_size": "0 8",
    "svd_steps": "1 100",
    "grad_steps": "1 99 100 101",
    "drift": "0 0.1",
    "smoothing": "0 0.1",
    "basis": "own update curvature",
    "svd_driver": "gram svd randomized",
    "direction": "sensitive plain random shuffled shrink released",
    "alpha": "-1 0 0.5 1",
    "score": "sensitivity tempered magnitude random",
    "span": "step interval",
}
KEYS = {name: f"DSKD.{name.removesuffix('_size').upper()}" for name in VALUES}
KEYS["svd_driver"] = "DSKD.DRIVER"
CHOICES |= {KEYS[name]: values for name, values in VALUES.items()}
TOGETHER = ["basis direction score", "basis score alpha", "basis direction smoothing", "basis direction span"]
TOGETHER += ["basis svd_driver rank_size", "svd_steps grad_steps drift", "svd_steps drift"]

# Command lines that each flag is added to.
TRAIN = "--do_train --do_eval"
CUSTOM = "--task_name custom --train_file a --dev_file b --text_columns c --label_column d"
LINES = ["", "--do_eval", "--do_predict", "--do_train", TRAIN, f"{TRAIN} --evaluate_during_training"]
LINES += [f"{TRAIN} --method {method}" for method in ("finetune", "kd", "pkd", "kd --task_name STS-B")]
LINES += [f"{TRAIN} --scheduler_type constant", f"{TRAIN} --finetune_predecessor", f"{TRAIN} --resume --fp16"]
LINES += [f"{TRAIN} {CUSTOM}", f"{TRAIN} {CUSTOM} --regression", "--do_eval --if_svd", f"{TRAIN} --if_svd"]
LINES += [f"{TRAIN} --if_svd --method finetune", f"{TRAIN} --if_svd --grad_steps 2 --drift 0.1"]
LINES += [f"{TRAIN} --if_svd --{setting}" for setting in ("basis update", "basis curvature", "score magnitude")]


def outcome(function: Callable[[], Any]) -> Any:
    """The function's result or, if the user's input is refused, the flag or key that the message names first."""
    try:
        return function()
    except Exception as error:
        if type(error).__name__ != "UserError":
            raise
        names = re.findall(r"--(?!help)\w+|\b[A-Z]\w*\.[A-Z]\w+", str(error))
        return f"refused: {names[0] if names else 'no name'}"


def glue(line: str) -> dict[str, Any]:
    return vars(parse_arguments(f"{MINIMAL} {line}".split()))


def vision(*pairs: str) -> dict[str, Any]:
    return leaves(load_config(YAML, pairs))


def changed(now: Any, before: dict[str, Any]) -> Any:
    """What a command line sets otherwise than another one."""
    return now if isinstance(now, str) else {k: v for k, v in now.items() if json.dumps(v) != json.dumps(before[k])}


def at(names: Iterable[str], settings: dict[str, Any]) -> list:
    return [settings[name] for name in names]


def flags() -> dict[str, dict]:
    parser, found = build_parser(), {}
    for action in parser._actions:
        known = {key: getattr(action, key) for key in ("option_strings", "default", "const", "nargs", "required")}
        known["choices"] = action.choices and list(action.choices)
        if action.dest != "help":  # which would end this program
            known["probes"] = {
                probe: outcome(
                    lambda action=action, probe=probe: getattr(
                        parser.parse_args([*MINIMAL.split(), action.option_strings[-1], *probe.split()]), action.dest
                    )
                )
                for probe in [*NUMBERS, *TEXTS, *CHOICES.get(action.dest, "").split(), *(action.choices or []), "a b"]
            }
        found[action.dest] = known
    return found


def flags_in_lines() -> dict[str, Any]:
    """Each flag, with a value that is not its default if one is known, added to each of the command lines."""
    added = []
    for dest, known in flags().items():
        accepted = [p for p, value in known.get("probes", {}).items() if not str(value).startswith("refused")]
        accepted.sort(key=lambda probe, known=known: known["probes"][probe] == known["default"])
        added += [f"--{dest} {accepted[0]}".strip()] if accepted else []
    found, unset = {}, vars(build_parser().parse_args(MINIMAL.split()))
    for line in LINES:
        alone = outcome(lambda line=line: glue(line))
        found[line] = changed(alone, unset)
        for flag in added:
            now = outcome(lambda line=f"{line} {flag}": glue(line))
            found[f"{line} + {flag}"] = changed(now, unset if isinstance(alone, str) else alone)
    return found


def keys() -> dict[str, dict]:
    found = {}
    for key, value in leaves(defaults()).items():
        probes = [*NUMBERS, *TEXTS, *CHOICES.get(key, "").split(), *(LISTS if isinstance(value, list) else [])]
        results = {probe: outcome(lambda key=key, probe=probe: vision(key, probe)[key]) for probe in probes}
        found[key] = {"default": value, "type": type(value).__name__, "probes": results}
    return found


def combinations() -> Iterator[list[tuple[str, str]]]:
    for names in map(str.split, TOGETHER):
        for values in product(*(VALUES[name].split() for name in names)):
            yield list(zip(names, values, strict=True))


def dskd_flags() -> dict[str, Any]:
    lines = [" ".join(f"--{name} {value}" for name, value in pairs) for pairs in combinations()]
    return {line: outcome(lambda line=line: at(VALUES, glue(f"{TRAIN} --if_svd {line}"))) for line in lines}


def dskd_keys() -> dict[str, Any]:
    lines = [" ".join(f"{KEYS[name]} {value}" for name, value in pairs) for pairs in combinations()]
    return {line: outcome(lambda line=line: at(KEYS.values(), vision(*line.split()))) for line in lines}


def configs() -> dict[str, dict]:
    paths = [path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")]
    return {path.as_posix(): leaves(load_config(str(path))) for path in paths if path.parts[1] != "tables"}


RECORDS = {
    "settings": (flags, flags_in_lines, dskd_flags, keys, dskd_keys),
    "configs": (configs,),
}


@pytest.mark.parametrize(("name", "section"), [(name, part) for name, parts in RECORDS.items() for part in parts])
def test_settings_are_as_pinned(name, section, monkeypatch):
    monkeypatch.chdir(ROOT)  # a relative OUTPUT_DIR counts from the working directory
    pinned = json.loads((PINNED / f"{name}.json").read_text(encoding="utf-8"))[section.__name__]
    now = section()
    texts = {key: (as_text(pinned.get(key)), as_text(now.get(key))) for key in pinned | now}  # 1 is not 1.0 or true
    assert {key: pair for key, pair in texts.items() if pair[0] != pair[1]} == {}


def test_every_published_command_is_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = set()
    for path in [*ROOT.glob("results/*/runs.csv"), *ROOT.glob("results/*/*/runs.csv")]:
        with path.open(encoding="utf-8", newline="") as file:
            commands |= {re.sub(r"(--seed|SOLVER\.SEED) \d+", r"\1 1", row["command"]) for row in csv.DictReader(file)}
    accepted, refused = set(), {}
    for command in commands:
        _, script, *words = shlex.split(re.sub(r"\{(\w+)\}", r"\1", command))
        script = Path(script).name
        result = outcome(lambda script=script, words=words: READERS[script](words))
        if isinstance(result, str):
            refused[command] = result
        else:
            accepted.add(script)
    assert refused == {}
    assert accepted == set(READERS)


def as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def write(name: str) -> None:
    """One line an entry."""
    blocks = []
    for section in RECORDS[name]:
        entries = sorted(section().items())
        lines = ",\n".join(f" {as_text(key)}: {as_text(value)}" for key, value in entries)
        blocks.append(f"{as_text(section.__name__)}: {{\n{lines}\n}}")
    PINNED.mkdir(exist_ok=True)
    (PINNED / f"{name}.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)
    for record in RECORDS:
        write(record)
