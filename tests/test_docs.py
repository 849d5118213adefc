"""README.md and docs/*.md: links lead somewhere, Python blocks run, commands parse, the shown extensions work."""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from bert_of_theseus.arguments import parse_arguments
from common import ROOT
from common.run.errors import UserError
from cv.config import load_config
from scripts.lib.tables.plan import plan
from scripts.lib.tables.table import find_table, load_table

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]
FOLDERS = ("common", "configs", "cv", "docs", "dskd", "examples", "nlp", "resources", "results", "scripts", "tests")
SHELL = ("bash", "sh", "shell", "console")
LAUNCHERS = re.compile(r"(?:.*/)?(?:python3?|torchrun)$")


class Block(NamedTuple):
    """A fenced block of code, and the file that a first line `# some/file.ext` says it is."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        first = re.match(r"# ([\w./-]+\.(?:py|ya?ml))\n", self.text)
        return first[1] if first else None


class Command(NamedTuple):
    """A command line of a page, the folder (relative to the root) that it is given from, and its page."""

    words: tuple[str, ...]
    folder: str
    page: Path


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: m.start()].count("\n") + 1, m[2], re.sub(f"(?m)^{m[1]}", "", m[3])) for m in fences]


def prose_of(page: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands_in(text: str, page: Path) -> list[Command]:
    """The commands of a shell block: continued lines joined, prompts and comments dropped, `cd` followed.

    The `cd` that follows a `git clone` leads to the root.
    """
    commands, folder, cloned = [], "", False
    for line in text.replace("\\\n", " ").splitlines():
        parts = re.split(r"\s+(?:&&|\|\|?|;)\s+", line.strip().removeprefix("$ "))
        for part in parts:
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):  # environment
                words.pop(0)
            if words[:1] == ["cd"]:
                folder, cloned = "" if cloned else str(Path(folder, words[1])), False
            elif words:
                cloned = cloned or words[:2] == ["git", "clone"]
                commands.append(Command(tuple(words), folder, page))
    return commands


def all_commands(program: re.Pattern) -> list[Command]:
    found = []
    for page in PAGES:
        texts = [block.text for block in BLOCKS if block.page == page and block.language in SHELL]
        texts += [code for code in re.findall(r"`([^`\n]+)`", prose_of(page)) if program.match(code.split(" ")[0])]
        for text in texts:
            found += [command for command in commands_in(text, page) if program.match(command.words[0])]
    return [command for command in found if "<" not in " ".join(command.words)]


def name_of(case: Block | Command | tuple) -> str:
    if isinstance(case, Block):
        return f"{case.page.stem}:{case.line}"
    if isinstance(case, Command):
        return f"{case.page.stem}:{' '.join(case.words)[:60]}"
    page, target = case
    return f"{page.stem}:{target}"


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
WRITTEN_BY_THE_READER = {block.file: block for block in BLOCKS if block.file}
PYTHON = [block for block in BLOCKS if block.language == "python"]
RUNNABLE = [b for b in PYTHON if b.page != README and "..." not in b.text and "<" not in b.text]
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"")
LINKS = [(page, "".join(groups)) for page in PAGES for groups in LINK.findall(prose_of(page))]
LINKS = [(page, target) for page, target in LINKS if ":" not in target]  # the others lead to other hosts
NAMED_PATHS = sorted(
    {
        (page, word)
        for page in PAGES
        for word in re.findall(r"(?:\.\./)*[\w.*<>{},-]+(?:/[\w.*<>{},-]+)*/?", page.read_text(encoding="utf-8"))
        if word.split("/")[0] in FOLDERS and "/" in word.rstrip("/")
    }
)


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900
    assert len((ROOT / "docs" / "findings.md").read_text(encoding="utf-8").split()) <= 2000


def test_the_readme_counts_the_runs_of_the_tables_that_have_not_been_run(tmp_path):
    counts = []
    for name in ("cifar100", "glue"):
        table = load_table(find_table(name))
        counts.append(len(plan(table, {}, table.seeds, tmp_path)))
        assert not (ROOT / "results" / name).exists()
    assert "{} runs of CIFAR-100 and {} of GLUE".format(*counts) in README.read_text(encoding="utf-8")


def test_the_loop_of_the_readme_trains():
    import torch
    from torch import nn

    torch.manual_seed(0)
    student, teacher = (nn.ModuleDict({"hidden": nn.Linear(20, 64), "last": nn.Linear(64, 5)}) for _ in range(2))
    (block,) = [block for block in PYTHON if block.page == README]
    inputs, steps = torch.randn(64, 20), 120

    def task_loss(labels):
        return nn.functional.cross_entropy(student["last"](student["hidden"](inputs).relu()), labels)

    given = {
        "student": student,
        "teacher": teacher.requires_grad_(False),
        "optimizer": torch.optim.Adam(student.parameters()),
        "batches": [inputs[:, :5].argmax(1)] * steps,
        "T": steps,
        "task_loss": task_loss,
    }
    exec(compile(block.text, "README.md", "exec"), given)
    assert task_loss(given["batches"][0]).item() < 1
    assert (given["dskd"].steps, given["dskd"].choices) == (steps, 1)
    assert len(given["pairs"]) == 2
    assert len(block.text.splitlines()) == 10


def test_the_shell_blocks_of_the_readme_run_one_after_another(tmp_path):
    """In one shell, from the root, each script where it is named; programs are stood in for by one that notes them."""
    for name in ("cv", "nlp", "scripts", "configs", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    stand_ins, log = tmp_path / "bin", tmp_path / "log"
    stand_ins.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for program in ("python", "make", "pip", "torchrun"):
        path = stand_ins / program
        path.write_text(f'#!/bin/sh\necho {program} "$@" >> {log}\n[ {program} != python ] || test -f "$1"\n')
        path.chmod(0o755)
    blocks = [block.text for block in BLOCKS if block.page == README and block.language in SHELL]
    environment = {"PATH": f"{stand_ins}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-eu", "-c", "\n".join(blocks)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(log.read_text().splitlines()) == sum(len(commands_in(text, README)) for text in blocks) - 1  # activate
    assert not any(block.language == "" for block in BLOCKS if block.page == README)


@pytest.mark.parametrize("case", LINKS, ids=name_of)
def test_relative_links_lead_somewhere(case):
    page, target = case
    path, _, anchor = target.partition("#")
    goal = (page.parent / path).resolve() if path else page
    assert goal.exists()
    if anchor and goal.suffix == ".md":
        assert anchor in anchors_of(goal)


@pytest.mark.parametrize("case", NAMED_PATHS, ids=name_of)
def test_named_paths_exist(case):
    """`*` and `{a,b}` as a shell reads them; of a path with <placeholder>, the folders before it."""
    _, path = case
    path = re.split(r"/?[^/]*<", path)[0].rstrip(".,/")
    path = path if "{" in path else path.rstrip("}")
    choices = re.search(r"\{([^}]*)\}", path)
    variants = [path.replace(choices[0], choice) for choice in choices[1].split(",")] if choices else [path]
    for variant in variants:
        assert variant in WRITTEN_BY_THE_READER or list(ROOT.glob(variant)), f"there is no {variant}"


@pytest.mark.parametrize("block", RUNNABLE, ids=name_of)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "__main__"})


class _ParsedError(Exception):
    """Leaves a script as soon as it has read its command line."""


@pytest.mark.parametrize("command", all_commands(LAUNCHERS), ids=name_of)
def test_commands_parse(command, tmp_path, monkeypatch):
    words = list(command.words)
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:  # python -m module, python -c code
        assert words[1] in ("-m", "-c")
        return
    folder = ROOT / command.folder
    script, arguments = (folder / words[place]).resolve(), words[place + 1 :]
    assert script.is_file(), f"there is no {words[place]} in {command.folder or 'the root'}"

    parsed = {}

    def leaving(parse: Callable) -> Callable:
        def parse_and_leave(parser, *others, **named):
            parsed.update(vars(parse(parser, *others, **named)))
            raise _ParsedError

        return parse_and_leave

    for file, block in WRITTEN_BY_THE_READER.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path if WRITTEN_BY_THE_READER.keys() & set(arguments) else folder)
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, leaving(getattr(argparse.ArgumentParser, name)))
        if script.name == "train_svd.py":
            patch.setattr("cv.trainer.train", None)  # whatever happens, nothing is trained here
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        with pytest.raises(_ParsedError):
            runpy.run_path(str(script), run_name="__main__")

    if script.name == "run_glue_SVD_losslayer.py":
        parse_arguments(arguments)
    elif script.name == "train_svd.py" and parsed["cfg"] not in WRITTEN_BY_THE_READER:
        load_config(parsed["cfg"], parsed["overrides"])
    elif script.name == "reproduce.py" and parsed["forest"] is not None:
        assert all(find_table(name) for name in parsed["forest"])
    elif script.name == "reproduce.py":
        table = load_table(find_table(parsed["table"]))
        assert plan(table, dict(parsed["values"]), 1, tmp_path)
        assert set(parsed["cells"] or []) <= table.cells.keys()
        assert set(parsed["tasks"] or []) <= table.tasks.keys()


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {word for command in all_commands(re.compile("make$")) for word in command.words[1:] if "=" not in word}
    assert named <= set(targets)


def test_a_command_that_is_wrong_is_noticed():
    """The checks above can fail: a flag, a key and a cell that do not exist."""
    with pytest.raises(UserError, match="unrecognized arguments: --lambda"):
        parse_arguments(shlex.split("--model_name_or_path m --task_name RTE --output_dir o --do_train --lambda 1"))
    with pytest.raises(UserError, match=r"unknown key DSKD\.LAMDA"):
        load_config("configs/demo/kd_dskd.yaml", ["DSKD.LAMDA", "1"])


def test_commands_are_read_as_a_shell_reads_them():
    text = "$ cd cv && A=1 python x.py --a 'b c' \\\n  --d  # why\nmake demo\n"
    assert [command[:2] for command in commands_in(text, ROOT)] == [
        (("python", "x.py", "--a", "b c", "--d"), "cv"),
        (("make", "demo"), "cv"),
    ]


def apply_edits(copy: Path) -> int:
    """Make the edits that ```diff blocks show (`--- file`, then lines with " ", "-" and "+"); how many there were."""
    edits = [block for block in BLOCKS if block.language == "diff"]
    for edit in edits:
        header, *lines = edit.text.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        path = copy / header.removeprefix("--- ")
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{edit.page.name} line {edit.line}: its context is not in {header}"
        path.write_text(text.replace(old, new), encoding="utf-8")
    return len(edits)


def test_a_network_and_a_method_of_your_own_work_as_described(tmp_path):
    """The edits and files of docs/extending.md in a copy of the sources, then its commands, cut short."""
    for name in ("dskd", "common", "cv", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert apply_edits(tmp_path) == 4
    for file, block in WRITTEN_BY_THE_READER.items():
        (tmp_path / file).write_text(block.text, encoding="utf-8")
    shown = all_commands(re.compile("python$"))
    commands = [c.words[1:] for c in shown if "configs/demo/plain.yaml" in c.words]
    commands = [("cv/train_svd.py", "--cfg", "configs/demo/teacher.yaml"), *commands]
    assert len(commands) == 2
    short = ["SOLVER.EPOCHS", "1", "DATASET.SUBSET", "80", "LOG.PROGRESS", "false", "LOG.TRACKERS", "[]"]
    driver = "import runpy, sys\n"
    for words in commands:
        driver += f"sys.argv = {[*words, *short]!r}\nrunpy.run_path({words[0]!r}, run_name='__main__')\n"
    done = subprocess.run(
        [sys.executable, "-c", driver], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "plain from resnet20 of " in done.stdout
    assert "by logits" in done.stdout
    assert "convs.2.0 <- stages.2.0.conv1" in done.stdout
    assert (tmp_path / "outputs/digits/logits_resnet20_plain_dskd/seed1/student/model.safetensors").is_file()
