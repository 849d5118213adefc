"""The runner of the tables, with a training script that takes no time."""

import fcntl
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
from submitit.core.utils import FailedJobError

from common import ROOT
from common.run.errors import UserError, run_cli
from scripts import reproduce
from scripts.lib.tables import collect as collecting
from scripts.lib.tables import forest
from scripts.lib.tables import launch as launching
from scripts.lib.tables import sources as states
from scripts.lib.tables.launch import unfinished
from scripts.lib.tables.plan import SCRIPTS, Run, plan
from scripts.lib.tables.summary import holm, paired_difference
from scripts.lib.tables.table import FOLDER, load_table

SCRIPT = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("output_dir", "init", "data"):
    parser.add_argument("--" + name, type=pathlib.Path)
parser.add_argument("--seed", type=int)
parser.add_argument("--last", type=float, nargs="+", default=[0.0])
parser.add_argument("--result", type=json.loads, default={})
parser.add_argument("--fail", action="store_true")
parser.add_argument("--hang", action="store_true")
parser.add_argument("--seconds", type=float, default=0)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
with open(args.output_dir / "starts.txt", "a") as file:
    file.write("resume\\n" if args.resume else "start\\n")
(args.output_dir / "config.json").write_text("{}")
if args.init and not (args.init / "result.json").exists():
    sys.exit("nothing to start from")
if args.fail:
    sys.exit("the reason of the failure")
time.sleep(600 if args.hang and not args.resume else args.seconds)
last = args.last[(args.seed - 1) % len(args.last)]
result = dict(metric="accuracy", last=last, best=last + 1, dskd=dict(rank=32) if args.init else None, seed=args.seed,
              throughput=50 if args.init else 100, folder=str(args.output_dir.absolute()),
              command=" ".join(sys.argv), versions=dict(python="3"))
result = result | args.result if isinstance(args.result, dict) else args.result
(args.output_dir / "result.json").write_text(json.dumps(result))
"""

TABLE = """
table: fake
title: A fake table
script: fake.py
control: first
placeholders: {data: data/none}
base: {data: "{data}/x"}
cells:
  first: {label: First, args: {last: [1, 2, 3]}}
  second:
    label: Second
    needs: first
    args: {last: [2, 4, 6], init: "{first}"}
    published: {value: 7.5, source: A paper}
smoke: {last: 9}
"""

VERSUS = TABLE.replace("smoke:", "  third: {label: Third, versus: second, args: {last: [3, 8, 7]}}\nsmoke:")


class _Finished:
    """A job that has ended by the time it is submitted, in the place of submitit's."""

    def done(self) -> bool:
        return True

    def stderr(self) -> str:
        return ""


class _AtOnce:
    def submit(self, function, *args) -> _Finished:
        function(*args)
        return _Finished()


@pytest.fixture
def write_table(tmp_path):
    (tmp_path / "fake.py").write_text(SCRIPT)

    def write(text: str = TABLE) -> Path:
        path = tmp_path / "fake.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def run(tmp_path, write_table, monkeypatch):
    """`run(*flags, table=text)` runs the command line in this process and returns its exit code."""
    monkeypatch.setattr(launching, "_executor", lambda *_: _AtOnce())

    def run(*flags: str, table: str = TABLE) -> int:
        folders = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        formats = [] if "--formats" in flags else ["--formats", "tex", "csv", "plots"]
        words = [str(write_table(table)), *folders, *map(str, flags), *formats]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
        try:
            run_cli(reproduce.main)
        except SystemExit as error:
            return error.code
        return 0

    run.runs, run.results = tmp_path / "runs", tmp_path / "results" / "fake"
    return run


def starts(folder: Path) -> dict[str, list[str]]:
    """Cell and seed -> how it was started, in turn."""
    return {
        file.parent.name.rsplit("-", 1)[0]: file.read_text().split() for file in sorted(folder.glob("*/starts.txt"))
    }


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        plan(load_table(path), {}, 1, path.parent)
    return str(caught.value)


def test_dry_run_prints_every_command_and_runs_nothing(run, capsys):
    assert run("--seeds", 2, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# first seed 1: to run",
        "# second seed 1: to run",
        "# first seed 2: to run",
        "# second seed 2: to run",
    ]
    assert shlex.split(lines[1])[2:6] == ["--data", "data/none/x", "--last", "1"]
    assert not run.runs.exists()
    assert not run.results.exists()


def test_a_finished_cell_is_not_run_again(run):
    assert run("--seeds", 1) == 0
    assert run("--seeds", 2) == 0
    assert starts(run.runs) == {
        name: ["start"] for name in ("first-seed1", "first-seed2", "second-seed1", "second-seed2")
    }


def test_a_changed_command_runs_again_together_with_what_starts_from_it(run):
    run("--seeds", 1)
    before = {path.name for path in run.runs.glob("*-seed1-*")}
    run("--seeds", 1, table=TABLE.replace("[1, 2, 3]", "[5, 2, 3]"))
    added = {path.name for path in run.runs.glob("*-seed1-*")} - before
    assert sorted(name.rsplit("-", 1)[0] for name in added) == ["first-seed1", "second-seed1"]
    assert pd.read_csv(run.results / "runs.csv")["last"].tolist() == [5, 2]


def test_the_folder_does_not_depend_on_where_the_runs_are_kept(write_table, tmp_path):
    table = load_table(write_table())
    names = [[run.folder.name for run in plan(table, {}, 1, tmp_path / place)] for place in ("here", "there")]
    assert names[0] == names[1]


def test_a_failed_cell_is_reported_and_does_not_stop_the_others(run, capsys):
    third = "  third: {label: Third, args: {last: 4}}\nsmoke:"
    failing = TABLE.replace("args: {last: [1, 2, 3]}", "args: {fail: true}").replace("smoke:", third)
    assert run("--seeds", 1, table=failing) == 1
    output = capsys.readouterr().out
    assert "first seed 1: failed" in output
    assert "the reason of the failure" in output
    assert "exit code 1" in output
    assert "second seed 1: not run: it needs first seed 1" in output
    assert pd.read_csv(run.results / "runs.csv")["cell"].tolist() == ["third"]


def test_a_cell_gets_the_folder_of_the_cell_that_it_needs_of_the_same_seed(write_table, tmp_path):
    runs = {(run.cell, run.seed): run for run in plan(load_table(write_table()), {}, 2, tmp_path)}
    words = runs["second", 2].command()
    assert words[words.index("--init") + 1] == str(runs["first", 2].folder)


def test_a_shared_cell_runs_once_for_all_seeds(write_table, tmp_path):
    text = """
table: sharing
title: Sharing
script: fake.py
control: second
cells:
  first: {label: One, shared: true}
  second: {label: Two, needs: first, args: {init: "{first}"}}
"""
    runs = plan(load_table(write_table(text)), {}, 3, tmp_path)
    assert [(run.cell, run.seed) for run in runs] == [("first", 1), ("second", 1), ("second", 2), ("second", 3)]
    assert [run.needs for run in runs[1:]] == [(runs[0],)] * 3


def test_a_shared_cell_cannot_need_one_that_is_not(write_table):
    text = (
        "table: t\ntitle: T\nscript: fake.py\ncontrol: a\ncells: {a: {label: A}, b: {label: B, needs: a, shared: true}}"
    )
    with pytest.raises(UserError, match=r"cells.b is shared by all seeds, but 'a', which it needs, is not"):
        load_table(write_table(text))


def test_cells_that_were_asked_for_bring_what_they_need(run):
    assert run("--seeds", 1, "--cells", "second") == 0
    assert starts(run.runs) == {"first-seed1": ["start"], "second-seed1": ["start"]}


def test_tasks_cells_and_smoke_refine_the_arguments_in_this_order(write_table, tmp_path):
    text = """
table: layered
title: Layers
script: fake.py
control: one
base: {a: base, b: base, c: base, d: base, e: base}
tasks:
  A: {args: {b: task, c: task, d: task, e: task}, values: {x: 0.5}}
cells:
  one: {label: One, args: {c: "{task} {x}", d: cell, e: cell}, smoke: {e: "null"}}
smoke: {d: smoke, e: smoke}
"""
    (run,) = plan(load_table(write_table(text)), {}, 1, tmp_path, smoke=True)
    assert run.words[:-4] == ("--a", "base", "--b", "task", "--c", "A 0.5", "--d", "smoke")
    assert run.folder.name.startswith("A-one-seed1-")


def test_an_unfinished_run_with_a_checkpoint_is_resumed(write_table, tmp_path):
    first = plan(load_table(write_table()), {}, 1, tmp_path)[0]
    assert "--resume" not in first.command()
    first.folder.mkdir()
    (first.folder / "config.json").touch()
    assert first.command()[-1] == "--resume"


def test_paired_difference_matches_the_hand_computed_test():
    found = paired_difference(pd.Series({1: 2.0, 2: 4.0, 3: 6.0}), pd.Series({1: 1.0, 2: 2.0, 3: 3.0}))
    t = 2 / (1 / math.sqrt(3))  # differences 1, 2, 3: mean 2, standard deviation 1
    assert found["difference"] == pytest.approx(2)
    assert found["p"] == pytest.approx(1 - t / math.sqrt(t**2 + 2))  # Student's t with 2 degrees of freedom
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # its 97.5% quantile, 4.303
    assert (found["low"], found["high"]) == pytest.approx((2 - quantile / math.sqrt(3), 2 + quantile / math.sqrt(3)))


def test_only_seeds_of_both_are_paired():
    found = paired_difference(pd.Series({1: 2.0, 2: 5.0, 4: 9.0}), pd.Series({1: 1.0, 2: 2.0, 3: 3.0}))
    assert (found["difference"], found["pairs"]) == (2.0, 2)


def test_one_pair_has_a_difference_and_no_interval():
    found = paired_difference(pd.Series({1: 2.0}), pd.Series({1: 1.0}))
    assert found["difference"] == 1.0
    assert math.isnan(found["low"])
    assert math.isnan(found["p"])


def test_a_cell_that_is_trained_once_has_no_partner_in_the_control(run):
    once = TABLE.replace("smoke:", "  third: {label: Third, shared: true, args: {last: 9}}\nsmoke:")
    run("--seeds", 2, table=once)
    assert math.isnan(pd.read_csv(run.results / "table.csv").set_index("cell").loc["third", "difference"])
    run("--seeds", 2, table=once.replace("shared: true,", "shared: true, versus: first,"))
    assert pd.read_csv(run.results / "table.csv").set_index("cell").loc["third", "difference"] == 8


def test_latex_has_no_special_sign_left(run):
    title = r"title: 100% of A & B_#1 < C^2 ~ \{x\} $"
    table = TABLE.replace("title: A fake table", title).replace("[2, 4, 6]", "[1001, 1002.001, 1003]")
    run("--seeds", 3, table=table)
    text = (run.results / "table.tex").read_text()
    escaped = r"100\% of A \& B\_\#1 $<$ C\textasciicircum{}2 \textasciitilde{} "
    escaped += r"\textbackslash{}\{x\textbackslash{}\} \$"
    assert rf"\caption{{{escaped}}}" in text
    assert "& $<$ 0.001 &" in text


def test_latex_names_a_task_in_its_first_row_and_nowhere_else(run):
    tasks = TABLE.replace("cells:", "tasks: {A: {}, B: {}}\ncells:", 1)
    tasks = tasks.replace("value: 7.5", "value: {A: 7.5}").replace("smoke:", "  third: {label: Third}\nsmoke:")
    tasks = tasks.replace("    needs: first\n", "").replace(', init: "{first}"', "")  # the first row is left out
    run("--seeds", 1, "--cells", "second", "third", table=tasks)
    lines = [line.split(" & ")[:2] for line in (run.results / "table.tex").read_text().splitlines() if " & " in line]
    assert lines == [["Task", "Method"], ["A", "Second"], ["", "Third"], ["B", "Second"], ["", "Third"]]


def test_a_label_is_text_and_no_formula_or_argument(run):
    run("--seeds", 2, table=TABLE.replace("label: First", 'label: "[b] cut at $5%_$"'))
    assert r"{[}b] cut at \$5\%\_\$" in (run.results / "table.tex").read_text()
    assert "[b] cut at $5%_$" in (run.results / "table.svg").read_text()


def test_the_plot_says_the_interval_of_every_difference(run):
    run("--seeds", 3)
    text = (run.results / "table.svg").read_text()
    assert ">+2.00 [-0.48, +4.48]<" in text
    assert ">Second minus First (3)<" in text


def test_one_cell_far_from_all_others_does_not_squeeze_the_plot(run, monkeypatch):
    from matplotlib.figure import Figure

    figure = Figure()
    monkeypatch.setattr(forest, "drawn", lambda *_: nullcontext(figure))
    near = "".join(f"  c{i}: {{label: C, args: {{last: [2, 4, {i}]}}}}\n" for i in range(2, 11))
    far = "  far: {label: Far, args: {last: 900}}\n"
    run("--seeds", 2, table=TABLE.replace("smoke:", f"{near}{far}smoke:"))
    (panel,) = figure.axes
    low, high = panel.get_xlim()
    assert 5 < -low == high < 100
    assert [line.get_xdata()[0] for line in panel.lines if line.get_marker() == ">"] == [high]


def test_tables_and_plots_show_the_summary(run):
    assert run("--seeds", 3) == 0
    markdown = (run.results / "table.md").read_text()
    assert "| Second | 3 | 4.00 ± 2.00 | 5.00 ± 2.00 | +2.00 [-0.48, +4.48] | 0.074 | 7.50 |" in markdown
    assert 'last minus the last of the control, "First", seed by seed' in markdown
    assert "Published elsewhere, not measured here: A paper." in markdown
    assert r"Second & 3 & 4.00 $\pm$ 2.00" in (run.results / "table.tex").read_text()
    second = pd.read_csv(run.results / "table.csv").set_index("cell").loc["second"]
    assert (second["n"], second["last_mean"], second["last_std"], second["published"]) == (3, 4.0, 2.0, 7.5)
    assert (run.results / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "Second" in (run.results / "table.svg").read_text()


def test_the_same_rows_give_the_same_files(run):
    run("--seeds", 2, table=TABLE)
    before = {path.name: path.read_bytes() for path in run.results.iterdir()}
    run("--seeds", 2, "--render-only", table=TABLE)
    assert {path.name: path.read_bytes() for path in run.results.iterdir()} == before


def test_a_table_has_seeds_of_its_own(run):
    shared = "  zeroth: {label: Zeroth, shared: true, args: {last: 5}}\nsmoke:"
    table = TABLE.replace("script:", "first_seed: 101\nseeds: 2\nscript:").replace("smoke:", shared)
    run("--cells", "zeroth", table=table)
    run(table=table)
    rows = pd.read_csv(run.results / "runs.csv")
    seeds = {cell: sorted(mine["seed"]) for cell, mine in rows.groupby("cell")}
    assert seeds == {"zeroth": [101], "first": [101, 102], "second": [101, 102]}
    run("--seeds", 1, "--cells", "first", table=table)  # a look at a part keeps the rest
    assert len(pd.read_csv(run.results / "runs.csv")) == len(rows)


def test_a_row_is_compared_with_the_cell_that_it_names(run):
    run("--seeds", 3, table=VERSUS)
    cells = pd.read_csv(run.results / "table.csv").set_index("cell")
    assert cells["versus"].fillna("").to_dict() == {"first": "", "second": "first", "third": "second"}
    assert cells["difference"].fillna(0).tolist() == [0, 2, 2]  # 3 - 2, 8 - 4, 7 - 6: not minus 1, 2, 3
    markdown = (run.results / "table.md").read_text()
    assert "| Method | n | last | best | difference of | difference [95% CI] | p |" in markdown
    assert "| Third | 3 | 6.00 ± 2.65 | 7.00 ± 2.65 | this minus Second | +2.00 [" in markdown
    assert 'Difference: as "difference of" says, of last, seed by seed' in markdown
    assert "& this minus Second & +2.00 [" in (run.results / "table.tex").read_text()


def test_a_control_is_subtracted_from_the_method_that_it_controls(run):
    run("--seeds", 3, table=VERSUS.replace("versus: second", "control_of: second"))
    cells = pd.read_csv(run.results / "table.csv").set_index("cell")
    assert cells["difference"].fillna(0).tolist() == [0, 2, -2]
    assert "| Second minus this | -2.00 [" in (run.results / "table.md").read_text()


def test_comparisons_planned_together_are_corrected_by_holm(run):
    run("--seeds", 3, table=VERSUS.replace("control: first", "control: first\nfamily: [second, third]"))
    cells = pd.read_csv(run.results / "table.csv").set_index("cell")
    low, high = sorted(cells["p"].dropna())
    assert sorted(cells["holm"].dropna()) == pytest.approx([2 * low, max(2 * low, high)], rel=1e-4)
    assert "corrected for the 2 comparisons that were planned together" in (run.results / "table.md").read_text()


def test_holm_is_the_worked_example():
    assert holm(pd.Series([0.01, 0.04, math.nan, 0.03])).tolist()[:2] == pytest.approx([0.03, 0.06])
    assert holm(pd.Series([0.9, 0.8])).tolist() == [1, 1]


def test_other_formats_than_markdown_are_written_on_demand(run):
    run("--seeds", 1, "--formats", "csv", table=TABLE)
    assert {path.name for path in run.results.iterdir()} == {"runs.csv", "table.md", "table.csv"}


@pytest.mark.parametrize(
    ("shared", "versus", "message"),
    [
        ("first", "", "fake.yaml: control: 'first' is shared, one run for all seeds"),
        ("third", ", versus: third", "fake.yaml: cells.fourth.versus: 'third' is shared, one run for all seeds"),
    ],
)
def test_one_run_for_all_seeds_cannot_be_compared_with_many(write_table, shared, versus, message):
    table = TABLE.replace("smoke:", f"  third: {{label: Third}}\n  fourth: {{label: Fourth{versus}}}\nsmoke:")
    table = table.replace(f"{shared}: {{", f"{shared}: {{shared: true, ")
    assert message in error_of(write_table(table))


def test_a_control_is_compared_only_if_it_names_a_cell(run):
    run("--seeds", 3, table=TABLE.replace("{label: First,", "{label: First, versus: second,"))
    cells = pd.read_csv(run.results / "table.csv").set_index("cell")
    assert cells["difference"].to_dict() == {"first": -2, "second": 2}


def test_a_row_without_rows_to_compare_it_with_has_no_difference_until_they_come(run):
    def difference() -> float:
        return pd.read_csv(run.results / "table.csv").set_index("cell").loc["third", "difference"]

    run("--seeds", 2, "--cells", "third", table=VERSUS)
    assert math.isnan(difference())
    run("--seeds", 1, "--cells", "second", table=VERSUS)
    assert difference() == 1


def test_a_table_without_placeholders_has_no_note_on_them(run):
    run("--seeds", 1, table=TABLE.replace("{data: data/none}", "{}").replace("{data}", "data"))
    assert "With:" not in (run.results / "table.md").read_text()


def test_scale_applies_to_tables_and_not_to_rows(run):
    run("--seeds", 2, table=TABLE + "scale: 100\n")
    assert "| First | 2 | 150.00 ± 70.71 |" in (run.results / "table.md").read_text()
    assert pd.read_csv(run.results / "runs.csv")["last"].tolist() == [1, 2, 2, 4]


def test_rows_hold_no_absolute_path(run, tmp_path):
    (tmp_path / "corpus").mkdir()
    assert run("--seeds", 1, "--set", f"data={tmp_path / 'corpus'}") == 0
    text = (run.results / "runs.csv").read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    row = pd.read_csv(run.results / "runs.csv", dtype=str).iloc[1]
    assert row["command"] == (
        "python fake.py --data {data}/x --last 2 4 6 --init {first} --seed 1 --output_dir {output}"
    )
    assert row["placeholders"] == "data=corpus"
    assert row["dskd.rank"] == "32"


def test_rows_of_fewer_seeds_keep_the_rows_of_the_others(run):
    run("--seeds", 3)
    run("--seeds", 1)
    assert len(pd.read_csv(run.results / "runs.csv")) == 6


def test_rows_whose_folders_are_gone_count_as_finished_only_if_asked(run, tmp_path):
    run("--seeds", 2)
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert run("--seeds", 3, "--keep-rows") == 0
    assert starts(run.runs) == {"first-seed3": ["start"], "second-seed3": ["start"]}
    assert len(pd.read_csv(run.results / "runs.csv")) == 6
    assert run("--seeds", 1) == 0
    assert pd.read_csv(run.results / "runs.csv")["seed"].tolist() == [1, 1, 3, 3]


@pytest.fixture
def code(monkeypatch):
    """The state of the code that runs are made by: what is in the list, by the revision of the row or by HEAD."""
    state = {"": "first", "HEAD": "first"}
    monkeypatch.setattr(collecting, "sources", lambda _, revision: state["HEAD" if revision == "now" else ""])
    monkeypatch.setattr(reproduce, "git_revision", lambda: "now")
    return state


def test_rows_that_other_code_has_made_are_kept_only_if_all_are(run, tmp_path, code, capsys):
    run("--seeds", 1)
    (tmp_path / "runs").rename(tmp_path / "gone")
    code["HEAD"] = "second"
    assert run("--seeds", 2, "--keep-rows", "all") == 0
    assert starts(run.runs) == {"first-seed2": ["start"], "second-seed2": ["start"]}
    (tmp_path / "runs").rename(tmp_path / "gone_too")
    capsys.readouterr()
    assert run("--seeds", 1, "--keep-rows") == 0
    assert starts(run.runs) == {"first-seed1": ["start"], "second-seed1": ["start"]}
    said = "4 rows of other revisions of the code are not kept; --keep-rows all keeps them"
    assert said in capsys.readouterr().out


def test_rows_of_a_state_that_nobody_knows_are_not_kept(run, tmp_path, code):
    code[""] = code["HEAD"] = ""
    run("--seeds", 1)
    (tmp_path / "runs").rename(tmp_path / "gone")
    run("--seeds", 1, "--keep-rows")
    assert starts(run.runs) == {"first-seed1": ["start"], "second-seed1": ["start"]}


def test_a_changed_script_of_your_own_is_another_state(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("1")
    before = states.sources(script, "any")
    script.write_text("2")
    states.sources.cache_clear()
    assert len(before) == 12
    assert before != states.sources(script, "any")


def test_rows_are_known_by_the_last_part_of_a_placeholders_path(run, tmp_path):
    run("--seeds", 1, "--set", "data=corpus")
    (tmp_path / "runs").rename(tmp_path / "gone")
    run("--seeds", 1, "--set", "data=some/where/corpus", "--keep-rows", "all", "--dry-run")
    assert not run.runs.exists()
    run("--seeds", 1, "--set", "data=some/where/corpus", "--keep-rows", "all")
    assert pd.read_csv(run.results / "runs.csv")["placeholders"].tolist() == ["data=corpus"] * 2


def test_rows_that_will_go_are_named_before_the_first_run(run, tmp_path, capsys):
    run("--seeds", 2)
    (tmp_path / "runs").rename(tmp_path / "gone")
    capsys.readouterr()
    run("--seeds", 1)
    assert capsys.readouterr().out.startswith("2 earlier rows, of other commands")


def test_a_difference_of_rows_by_two_states_of_the_code_is_marked(run, code):
    run("--seeds", 2)
    assert "†" not in (run.results / "table.md").read_text()
    rows = pd.read_csv(run.results / "runs.csv", dtype=str)
    rows.loc[0, "sources"] = "another"
    rows.to_csv(run.results / "runs.csv", index=False)
    shutil.rmtree(run.runs)
    run("--seeds", 2, "--keep-rows", "all", "--render-only")
    lines = (run.results / "table.md").read_text().splitlines()
    assert [line.count("†") for line in lines if line.startswith("| ")] == [0, 0, 0, 1]
    assert "- † Not all runs of the two rows were made by the same, recorded revision of the code." in lines


def test_the_state_of_the_code_follows_the_files_that_a_run_depends_on(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(file: str) -> str:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(str(len(revisions)))
        git("add", "-A")
        git("commit", "-qm", "a commit")
        return git("rev-parse", "HEAD")

    git("init", "-q")
    monkeypatch.setattr(states, "ROOT", tmp_path)
    revisions: list[str] = []
    for file in ("cv/train.py", "dskd/loss.py", "nlp/run.py", "docs/page.md", "examples/heal.py"):
        revisions.append(commit(file))
    cv, nlp = ([states.sources(tmp_path / each, r) for r in revisions] for each in ("cv/train.py", "nlp/run.py"))
    assert len(set(cv[:2])) == 2
    assert len(set(cv[1:])) == 1
    assert nlp[1] != nlp[2] == nlp[4]
    other = [states.sources(tmp_path / "examples/heal.py", r) for r in revisions]
    assert other[3] != other[4]
    assert states.sources(tmp_path / "cv/train.py", "unknown") == ""
    assert states.sources(tmp_path / "cv/train.py", revisions[0] + "-dirty") == ""
    assert states.sources(tmp_path.parent / "elsewhere.py", revisions[0]) == ""  # there is no such file


def test_runs_of_another_table_with_the_same_commands_are_not_taken(run):
    run(table=TABLE.replace("script:", "first_seed: 101\nseeds: 2\nscript:"))
    (run.results / "runs.csv").unlink()  # it would be in another folder of results
    run("--seeds", 1)
    assert pd.read_csv(run.results / "runs.csv")["seed"].tolist() == [1, 1]


def test_other_seeds_are_planned_alone_and_not_those_between(write_table, tmp_path):
    runs = plan(load_table(write_table()), {}, 2, tmp_path, more=[1000000000, 2])
    assert [run.seed for run in runs[::2]] == [1, 2, 1000000000]


def test_planning_does_not_compare_every_run_with_every_other(write_table, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(Run, "__eq__", lambda *both: compared.append(both) or both[0] is both[1])
    runs = plan(load_table(write_table()), {}, 50, tmp_path)
    assert len(unfinished(runs, lambda _: False)) == len(runs) == 100
    assert len(compared) < 100


def test_rows_of_other_values_of_placeholders_are_neither_finished_nor_kept(run, tmp_path, capsys):
    run("--seeds", 1, "--set", "data=a")
    (tmp_path / "runs").rename(tmp_path / "gone")
    run("--seeds", 1, "--set", "data=b", "--keep-rows")
    assert starts(run.runs) == {"first-seed1": ["start"], "second-seed1": ["start"]}
    assert pd.read_csv(run.results / "runs.csv")["placeholders"].tolist() == ["data=b", "data=b"]
    assert "2 earlier rows, of other commands or --set values" in capsys.readouterr().out


def test_rows_of_a_cell_that_needs_another_one_now_are_neither_finished_nor_kept(run, tmp_path):
    run("--seeds", 2)
    (tmp_path / "runs").rename(tmp_path / "gone")
    changed = TABLE.replace("[1, 2, 3]", "[5, 6, 7]")  # of the first cell, from which the second starts
    run("--seeds", 1, "--keep-rows", table=changed)
    assert starts(run.runs) == {"first-seed1": ["start"], "second-seed1": ["start"]}
    assert pd.read_csv(run.results / "runs.csv")["seed"].tolist() == [1, 1]


def test_a_kept_row_is_printed_as_finished(run, tmp_path, capsys):
    run("--seeds", 1)
    (tmp_path / "runs").rename(tmp_path / "gone")
    capsys.readouterr()
    run("--seeds", 2, "--keep-rows", "--dry-run")
    states = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    ends = {1: "finished", 2: "to run"}
    assert states == [f"# {cell} seed {seed}: {ends[seed]}" for seed in (1, 2) for cell in ("first", "second")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("second,1,", "second,x,"), "runs.csv, line 3: seed is 'x'; give a whole number"),
        (("second,1,", "second,,"), "runs.csv, line 3: seed is nan; give a whole number"),
        (("accuracy,2.0", "accuracy,two"), "runs.csv, line 3: last is 'two'; give a number"),
        (("command", "comand"), "runs.csv has no column 'command'"),
    ],
)
def test_a_mistake_in_runs_csv_is_named_before_anything_runs(run, capsys, wrong, message):
    run("--seeds", 1)
    path = run.results / "runs.csv"
    text = path.read_text()
    assert wrong[0] in text
    path.write_text(text.replace(*wrong))
    assert run("--seeds", 2) == 2
    assert message in capsys.readouterr().err
    assert len(starts(run.runs)) == 2


@pytest.mark.parametrize("flag", ["--output", "--results"])
@pytest.mark.parametrize("below", ["", "further/down"])
def test_a_file_where_a_folder_is_to_be_is_named_before_anything_runs(run, tmp_path, capsys, flag, below):
    (tmp_path / "file").touch()
    assert run(flag, tmp_path / "file" / below) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag} ")
    assert f"{tmp_path / 'file'} is a file" in error
    assert not run.runs.exists()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[]", "holds a list, not a dict; without its folder it is run again"),
        ('{"last": "much"}', "last is 'much'; a number, or null for none, is needed"),
    ],
)
def test_a_result_of_no_use_is_named_and_spoils_no_table(run, capsys, result, message):
    bad = TABLE.replace("{label: First, args: {last: [1, 2, 3]}}", f"{{label: First, args: {{result: '{result}'}}}}")
    assert run("--seeds", 2, table=bad) == 1
    out = capsys.readouterr().out
    assert "first seed 1 is not in the table: " in out
    assert message in out
    assert pd.read_csv(run.results / "runs.csv")["cell"].tolist() == ["second", "second"]


def test_a_result_that_is_a_folder_spoils_no_table(run, capsys):
    run("--seeds", 1)
    [result] = run.runs.glob("second-*/result.json")
    result.unlink()
    result.mkdir()
    assert run("--seeds", 1, "--render-only") == 1
    assert "second seed 1 is not in the table: " in capsys.readouterr().out
    assert pd.read_csv(run.results / "runs.csv")["cell"].tolist() == ["first"]


def test_a_result_does_not_say_which_row_it_is(run):
    fields = """{label: First, args: {result: '{"cell": "x", "placeholders": "y", "versions": ["z"]}'}}"""
    assert run("--seeds", 1, table=TABLE.replace("{label: First, args: {last: [1, 2, 3]}}", fields)) == 0
    row = pd.read_csv(run.results / "runs.csv").iloc[0]
    assert (row["cell"], row["placeholders"]) == ("first", "data=data/none")
    assert pd.isna(row["versions"])


def test_a_table_whose_runs_name_no_metric_is_drawn(run):
    nameless = TABLE.replace("last: [1, 2, 3]", """last: [1, 2, 3], result: '{"metric": null}'""")
    nameless = nameless.replace("last: [2, 4, 6]", """last: [2, 4, 6], result: '{"metric": null}'""")
    assert run("--seeds", 2, table=nameless) == 0
    assert (run.results / "table.png").exists()


def test_mean_and_best_are_over_the_same_runs(run):
    one_diverges = TABLE.replace("args: {last: [1, 2, 3]}", "args: {last: [1, nan, 3]}")
    assert run("--seeds", 3, table=one_diverges) == 0
    first = pd.read_csv(run.results / "table.csv").set_index("cell").loc["first"]
    assert (first["n"], first["last_mean"], first["best_mean"]) == (2, 2, 3)


def test_a_needed_run_whose_folder_goes_away_meanwhile_is_run_again(run, monkeypatch):
    execute = launching.execute

    def removing(one, environment):
        execute(one, environment)
        if one.title.startswith("second seed 1"):
            for folder in run.runs.glob("common-*"):
                shutil.rmtree(folder)

    monkeypatch.setattr(launching, "execute", removing)
    needs = "  common: {label: Common, shared: true}\n  second:\n    label: Second\n    needs: common"
    table = TABLE.replace("  second:\n    label: Second\n    needs: first", needs).replace("{first}", "{common}")
    assert run("--seeds", 2, table=table) == 0
    assert list(starts(run.runs)) == ["common-seed1", "first-seed1", "first-seed2", "second-seed1", "second-seed2"]
    assert len(pd.read_csv(run.results / "runs.csv")) == 5


def test_a_label_of_several_lines_is_one_line_of_the_tables(run):
    run("--seeds", 1, table=TABLE.replace("{label: First,", '{label: "First\\nof all\\n",'))
    assert "| First of all | 1 |" in (run.results / "table.md").read_text()


def test_a_run_without_a_measurement_has_a_row_and_the_others_a_table(run):
    nothing = """{label: First, args: {result: '{"last": null, "best": null, "versions": null}'}}"""
    assert run("--seeds", 2, table=TABLE.replace("{label: First, args: {last: [1, 2, 3]}}", nothing)) == 0
    rows = pd.read_csv(run.results / "runs.csv").set_index(["cell", "seed"])
    assert rows["last"].fillna(-1).to_dict() == {
        ("first", 1): -1,
        ("second", 1): 2,
        ("first", 2): -1,
        ("second", 2): 4,
    }
    assert "| Second | 2 |" in (run.results / "table.md").read_text()


def test_a_table_without_any_measurement_is_not_drawn(run, capsys):
    nothing = TABLE.replace("last: [1, 2, 3]", """result: '{"last": null}'""")
    assert run("--seeds", 1, "--cells", "first", table=nothing) == 0
    assert "no run with these commands and --set values has measured anything in " in capsys.readouterr().out
    assert not (run.results / "table.md").exists()


def test_a_cell_may_be_called_none(run, tmp_path):
    table = TABLE.replace("  first:", "  None:").replace("control: first", "control: None")
    table = table.replace("needs: first", "needs: None").replace("{first}", "{None}")
    run("--seeds", 2, table=table)
    (tmp_path / "runs").rename(tmp_path / "gone")
    run("--seeds", 2, "--keep-rows", "--render-only", table=table)
    rows = pd.read_csv(run.results / "runs.csv", keep_default_na=False)
    assert rows["cell"].tolist() == ["None", "second"] * 2


@pytest.mark.parametrize(("before", "after"), [("data/", "data"), ("./data", "data"), ("data/cifar", "data/cifar")])
def test_a_folder_that_a_run_has_made_is_the_one_that_it_was_given(tmp_path, monkeypatch, before, after):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scripts.lib.tables.plan.ROOT", tmp_path)
    assert reproduce._anchored(before) == after
    (tmp_path / after).mkdir(parents=True)
    assert reproduce._anchored(before) == after


@pytest.mark.parametrize(
    ("text", "value"),
    [("10:00:00", "10:00:00"), ("0123", "0123"), ("on", "on"), ("a: b: c", "a: b: c"), ("600", 600), ("true", True)],
)
def test_slurm_gets_numbers_as_numbers_and_times_as_they_were_written(text, value):
    assert reproduce._plain_value(text) == value


def test_slurm_jobs_have_the_threads_that_they_asked_cores_for(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("cpus_per_task", "slurm_cpus_per_task"):
        assert launching._environment("slurm", {name: 8}, jobs=1, slot=0) == {"OMP_NUM_THREADS": "8"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launching._environment("slurm", {"cpus_per_task": 8}, jobs=1, slot=0) == {"OMP_NUM_THREADS": "3"}


def test_what_slurm_refuses_is_one_line_and_exit_code_2(run, monkeypatch, capsys):
    class Refusing:
        def submit(self, *_):
            raise FailedJobError("sbatch: error: invalid partition specified: nope")

    monkeypatch.setattr(launching, "_executor", lambda *_: Refusing())
    assert run("--launcher", "slurm", "--slurm", "slurm_partition=nope") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error == "error: --launcher slurm: sbatch: error: invalid partition specified: nope; look at the --slurm values"
    )


def test_a_smoke_run_writes_outside_of_results(write_table, monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "_executor", lambda *_: _AtOnce())
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", str(write_table()), "--smoke"])
    reproduce.main()
    rows = pd.read_csv(tmp_path / "outputs/reproduce-smoke/results/fake/runs.csv")
    assert rows["last"].tolist() == [9, 9]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("titel: A fake table", "title: A fake table", "fake.yaml: unknown key 'titel'; did you mean 'title'?"),
        ("needs: frist", "needs: first", "cells.second.needs: unknown cell 'frist'; did you mean 'first'?"),
        ("needs: second", "needs: first", "cells.second.needs: 'second' must stand above 'second'"),
        ("needs: first\n    versus: frist", "needs: first", "cells.second.versus: unknown cell 'frist'; did you mean"),
        (
            "needs: first\n    versus: second",
            "needs: first",
            "cells.second.versus: this is the cell itself; valid:",
        ),
        ("control: frist", "control: first", "control: unknown cell 'frist'; did you mean 'first'?"),
        ('"{dta}/x"', '"{data}/x"', "unknown placeholder {dta}; did you mean 'data'?"),
        ("script: fke.py", "script: fake.py", "script: there is no file 'fke.py'"),
        ("{label: First, lable: x,", "{label: First,", "cells.first: unknown key 'lable'; did you mean 'label'?"),
        ("value: much", "value: 7.5", "cells.second.published.value: 'much' is no number"),
        ("{last: 9, last: 8}", "{last: 9}", "line 15: the key 'last' occurs twice"),
        ("title: A f\x07ke", "title: A fake", "fake.yaml, line 3: special characters are not allowed"),
        ("description: {a: b}\nscript:", "script:", "fake.yaml: description: expected a text, got {'a': 'b'}"),
        ("needs: {first: x}", "needs: first", "cells.second.needs: expected a cell or a list of cells"),
        ("seed: {label: S}\n  second:", "second:", "cells: 'seed' is already the name of a built-in placeholder"),
        (
            "published: {value: {A: 1}, source: A paper}\ntasks: {A: {values: {first: x}}}",
            "published: {value: 7.5, source: A paper}",
            "tasks.A.values: 'first' is already the name of a cell",
        ),
        (
            f"{'x' * 101}: {{label: X}}\n  second:",
            "second:",
            "is no name; letters, digits, and . _ - inside, 100 at most",
        ),
        ("script: cv", "script: fake.py", "cells.first: cfg is missing; give the config file in base"),
    ],
)
def test_a_mistake_in_a_table_file_names_the_key_and_what_is_near(write_table, wrong, right, message):
    assert right in TABLE
    assert message in error_of(write_table(TABLE.replace(right, wrong)))


def test_a_list_in_the_place_of_a_config_file_is_named(write_table):
    text = "table: t\ntitle: T\nscript: cv\ncontrol: a\ncells: {a: {label: A, args: {cfg: [a.yaml, b.yaml]}}}"
    assert "cells.a: cfg: expected one config file, got ['a.yaml', 'b.yaml']" in error_of(write_table(text))


def test_a_table_file_in_another_encoding_is_named(write_table):
    path = write_table()
    path.write_bytes(TABLE.replace("A fake table", "Ein käsiger Tisch").encode("latin-1"))
    assert error_of(path) == f"{path} is not UTF-8 (byte 26)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["glue_shrot", "--dry-run"], "unknown table 'glue_shrot'; did you mean 'glue_short'?"),
        (
            ["glue_short", "--set", "modle=x"],
            "--set modle: glue_short.yaml has no such placeholder; did you mean 'model'?",
        ),
        (["glue_short", "--set", "model"], "'model' is not KEY=VALUE"),
        (["glue_short", "--cells", "theseos"], "--cells: glue_short.yaml has no 'theseos'; did you mean 'theseus'?"),
        (["glue_short", "--set", "data=" + 300 * "x", "--dry-run"], "error: File name too long: xxx"),
        (["glue_short", "--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["glue_short", "--slurm", "partition=gpu"], "--slurm needs --launcher slurm"),
        (["glue_short", "--launcher", "slurm", "--output", "{tmp}"], "--launcher slurm: "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", "")  # no Slurm
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)])
    with pytest.raises(SystemExit) as caught:
        run_cli(reproduce.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_scripts_accept_every_command_of_every_table(path, smoke, tmp_path):
    from bert_of_theseus.arguments import parse_arguments
    from cv.config import load_config

    for run in plan(load_table(path), {}, 1, tmp_path, smoke=smoke):
        if run.script is SCRIPTS["nlp"]:
            assert parse_arguments(run.command()[2:]).output_dir == str(run.folder)
        elif run.script is SCRIPTS["cv"]:
            assert load_config(run.words[1], run.words[2:]).OUTPUT_DIR


def test_the_layers_that_tables_name_pair_up(tmp_path):
    import torch

    from cv.config import load_config
    from cv.dskd import layer_pairs
    from cv.models import build_model

    tables = [table for path in FOLDER.glob("*.yaml") if (table := load_table(path)).script == "cv"]
    runs = [run for table in tables for run in plan(table, {}, 1, tmp_path)]
    configs = [cfg for run in runs if (cfg := load_config(run.words[1], run.words[2:])).DSKD.PAIRS]
    networks = {(cfg.DISTILLER.STUDENT, cfg.DISTILLER.TEACHER): cfg for cfg in configs}
    assert networks
    for names, cfg in networks.items():
        with torch.device("meta"):
            student, teacher = (build_model(name, 100) for name in names)
        layer_pairs(student, teacher, cfg.DSKD)


def test_a_command_outlives_its_killed_launcher_and_nobody_starts_it_twice(write_table, tmp_path):
    text = TABLE.replace("args: {last: [1, 2, 3]}", "args: {seconds: 2}")
    first = plan(load_table(write_table(text)), {}, 1, tmp_path)[0]
    first.folder.mkdir()
    launcher = _execute_elsewhere(first)
    _wait_for(first.folder / "starts.txt")
    launcher.kill()
    launcher.wait()
    assert not first.finished
    launching.execute(first, {})
    assert first.finished
    assert (first.folder / "starts.txt").read_text().split() == ["start"]


def test_who_waited_for_a_command_that_died_resumes_from_its_checkpoint(write_table, tmp_path):
    first = plan(load_table(write_table()), {}, 1, tmp_path)[0]
    first.folder.mkdir()
    with (first.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = _execute_elsewhere(first)
        _wait_for(first.folder / launching.LOG)  # it is opened before the lock
        (first.folder / "config.json").touch()
    assert waiting.wait(timeout=60) == 0
    assert (first.folder / "starts.txt").read_text().split() == ["resume"]


def _execute_elsewhere(run: Run) -> subprocess.Popen:
    code = "import pickle, sys; from scripts.lib.tables.launch import execute\n"
    code += f"execute(pickle.loads({pickle.dumps(run)!r}), {{}})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)


def test_a_terminated_runner_ends_its_jobs_and_resumes_them_later(write_table, tmp_path):
    text = TABLE.replace("args: {last: [1, 2, 3]}", "args: {hang: true}")
    folders = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = [sys.executable, "scripts/reproduce.py", str(write_table(text)), "--seeds", "2", "--jobs", "2", *folders]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    in_background = ["sh", "-c", """trap "" INT; exec "$@" """, "sh", *command]  # ignores Ctrl-C, as do its children
    runner = subprocess.Popen(in_background, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    first = {run.seed: run for run in plan(load_table(tmp_path / "fake.yaml"), {}, 2, tmp_path / "runs")[::2]}
    for run in first.values():  # both at once: --jobs 2
        _wait_for(run.folder / "config.json")
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(timeout=20) == 130
    assert not any(run.finished for run in first.values())
    # the next runner gets the lock of the folders only if the jobs have ended
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "4 runs in" in again.stdout
    assert starts(tmp_path / "runs")["first-seed1"] == ["start", "resume"]
    assert json.loads((first[2].folder / "result.json").read_text())["seed"] == 2


def _wait_for(path: Path, seconds: float = 40) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(("asked", "expected"), [(None, "2"), ("5", "5")])
def test_jobs_share_the_cores_unless_the_user_sets_the_threads(monkeypatch, asked, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launching._environment("local", {}, jobs=4, slot=0)["OMP_NUM_THREADS"] == expected
