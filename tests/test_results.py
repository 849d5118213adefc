"""The tables that are shipped say what their rows say."""

import pytest

from common import ROOT
from scripts.lib.tables.collect import read_rows
from scripts.lib.tables.curves import draw_curves
from scripts.lib.tables.render import render
from scripts.lib.tables.summary import summarize
from scripts.lib.tables.table import find_table, load_table

SHIPPED = sorted(path.parent for path in ROOT.glob("results/*/runs.csv"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_table_is_what_its_rows_and_this_code_make(folder, tmp_path):
    table = load_table(find_table(folder.name))
    rows = read_rows(folder / "runs.csv")
    render(table, summarize(table, rows), rows, tmp_path, draw_curves(table, rows, tmp_path))
    for name in ("table.md", "table.csv", "table.tex"):
        made = (tmp_path / name).read_text(encoding="utf-8")
        assert (folder / name).read_text(encoding="utf-8") == made
