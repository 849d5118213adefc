"""The tables that are shipped say what their rows say, and the pages say what the tables say."""

import json
import re

import pandas as pd
import pytest

from common import ROOT
from common.settings import settings_table
from scripts.lib.benchmark.page import PAGE, filled
from scripts.lib.benchmark.tables import TABLES
from scripts.lib.tables.collect import read_rows
from scripts.lib.tables.forest import Row, compare, draw, front_lines, lines_of, pages, read_front
from scripts.lib.tables.render import interval_text, render
from scripts.lib.tables.summary import summarize
from scripts.lib.tables.table import FOLDER, find_table, load_table

FOLDERS = sorted({path.parent for pattern in ("*", "*/*") for path in ROOT.glob(f"results/{pattern}/runs.csv")})
SPREAD = re.compile(r"(\d+\.\d\d) ± (\d+\.\d\d)")
INTERVAL = re.compile(r"([+-]?\d+\.\d\d) \[([+-]?\d+\.\d\d), ([+-]?\d+\.\d\d)\]")
MEASURED = ("README.md", "docs/findings.md", "docs/method.md", "docs/deviations.md", "docs/performance.md")


@pytest.fixture(scope="module")
def figures():
    """All that can be cited: differences with their intervals, in both directions, and means with their spreads."""
    summaries = []
    for folder in FOLDERS:
        table = load_table(find_table(folder.relative_to(ROOT / "results").parts[0]))
        summaries.append(summarize(table, read_rows(folder / "runs.csv")))
    rows = pd.concat(summaries)
    front = read_front()
    lines = [*front_lines(front), *map(compare, front.others), *rows.itertuples()]
    known = {interval_text(line) for line in lines}
    known |= {interval_text(turned(line)) for line in lines}
    return known, {f"{row.last_mean:.2f} ± {row.last_std:.2f}" for row in rows.itertuples()}


def turned(line):
    """The same difference, the other way round."""
    return pd.Series({"difference": -line.difference, "low": -line.high, "high": -line.low})


def signed(text: str) -> str:
    return text if text[0] in "+-" else f"+{text}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT / "results")))
def test_a_shipped_table_is_what_its_rows_and_this_code_make(folder, tmp_path):
    table = load_table(find_table(folder.relative_to(ROOT / "results").parts[0]))
    rows = read_rows(folder / "runs.csv")
    render(table, summarize(table, rows), rows, tmp_path)
    assert (folder / "table.md").read_text(encoding="utf-8") == (tmp_path / "table.md").read_text(encoding="utf-8")


def test_the_pages_show_what_the_rows_say():
    """`python scripts/reproduce.py --forest` writes them."""
    front = read_front()
    for path, text in pages(front, front_lines(front)).items():
        assert path.read_text(encoding="utf-8") == text


def test_the_figure_shows_what_the_rows_say(tmp_path):
    draw(front_lines(read_front()), tmp_path)
    made, shipped = ((folder / "forest.svg").read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "results"))
    texts = re.compile(r">([^<>\n]+)</text>")
    assert texts.findall(made) == texts.findall(shipped)


def test_every_table_is_in_one_group():
    named = [name for names in read_front().tables.values() for name in names]
    assert sorted(named) == sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_a_figure_of_any_tables_has_their_differences():
    tables = {name: load_table(find_table(name)) for name in ("transfer_few", "glue_short")}
    rows = {name: read_rows(ROOT / "results" / name / "runs.csv") for name in tables}
    lines = [line for name in tables for line in lines_of(name, tables[name], rows[name])]
    assert {line.table for line in lines} == {"transfer_few", "glue_short"}
    assert "+1.03 [+0.87, +1.18]" in map(interval_text, lines)


@pytest.mark.parametrize("page", MEASURED)
def test_figures_of_a_page_are_those_of_the_rows(page, figures):
    intervals, spreads = figures
    text = re.sub(r"\s+", " ", (ROOT / page).read_text(encoding="utf-8"))
    found = [f"{signed(a)} [{signed(b)}, {signed(c)}]" for a, b, c in INTERVAL.findall(text)]
    assert [each for each in found if each not in intervals] == []
    assert [f"{a} ± {b}" for a, b in SPREAD.findall(text) if f"{a} ± {b}" not in spreads] == []


def test_the_settings_table_is_that_of_the_settings():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    begin, end = "<!-- settings -->\n\n", "\n<!-- /settings -->"
    assert text.partition(begin)[2].partition(end)[0] == settings_table()


def test_the_page_on_cost_shows_what_the_benchmark_measured():
    """`python scripts/benchmark.py render` writes it."""
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"<!-- (\w+) -->", text) == list(TABLES)
    assert filled(text, ROOT / "results" / "benchmark") == text


def test_the_page_on_reliability_shows_what_the_study_of_faults_found():
    page, shipped = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/reliability.md", "results/faults/table.md")
    )
    table = shipped[shipped.index("| fault |") :]
    assert page.partition("<!-- faults -->\n\n")[2].partition("\n<!-- /faults -->")[0] == table
    cases = json.loads((ROOT / "results/faults/faults.json").read_text(encoding="utf-8"))["cases"]
    assert f"| {sum(row['tried'] for row in cases)} | {sum(row['held'] for row in cases)} |" in table.splitlines()[-1]


def test_tasks_that_are_repetitions_are_averaged_first(monkeypatch):
    """Two teachers, of which one has a seed that the control has not."""
    table = load_table(find_table("cifar100_few_rivals_tune"))
    columns = {"task": ["a", "a", "a", "b", "a", "a", "b"], "cell": ["kd"] * 4 + ["own_0.05"] * 3}
    columns |= {"seed": [1, 2, 3, 1, 1, 2, 1], "last": [10.0, 12.0, 99.0, 20.0, 11.0, 14.0, 20.5], "steps": [120] * 7}
    monkeypatch.setattr("scripts.lib.tables.forest._table", lambda _: (table, pd.DataFrame(columns)))
    line = compare(Row(label="x", table="t", task="*", cell="own_0.05", versus="kd"))
    assert (line.pairs, line.difference) == (2, pytest.approx((1.5 + 0.5) / 2))
    assert (line.low, line.high) == (
        pytest.approx(1 - 12.706 * 0.5, abs=1e-3),
        pytest.approx(1 + 12.706 * 0.5, abs=1e-3),
    )
