"""docs/performance.md shows what the JSON files of the benchmark say: every table stands between two markers."""

import json
import re
from pathlib import Path

from common import ROOT
from common.run.errors import UserError
from common.run.files import write_text
from scripts.lib.benchmark.tables import TABLES

PAGE = ROOT / "docs" / "performance.md"


def render(folder: Path) -> str:
    """Write the page's tables anew from the files of a folder; returns the page's place.

    Raises:
        UserError: a file is missing, or is of another version of the benchmark.
    """
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), folder))
    return str(PAGE)


def filled(text: str, folder: Path) -> str:
    """The page's text with its tables made anew. Each has its device, torch and revision below it."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        file, make = TABLES[name]
        path = folder / f"{file}.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; python scripts/benchmark.py {file} writes it")
        results = json.loads(path.read_text(encoding="utf-8"))
        try:
            shown = make(results)
        except (KeyError, TypeError) as error:
            again = f"python scripts/benchmark.py {file} writes it anew"
            raise UserError(f"{path}: of another version of the benchmark, without {error}; {again}") from None
        return f"<!-- {name} -->\n\n{shown}\n\n{source(file, results)}\n\n<!-- /{name} -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) -->\n.*?<!-- /\1 -->", made, text, flags=re.DOTALL)


def source(file: str, results: dict) -> str:
    """Where a table's figures come from."""
    torch, revision = results["versions"]["torch"], results["git_revision"]
    where = f"{results['device']}, torch {torch}, revision {revision[:7]}{'-dirty' * revision.endswith('-dirty')}"
    run = {"cv": "; {case}", "nlp": "; {case}, {precision}, seeds: {seeds}"}.get(file, "").format(**results)
    return f"[{file}.json](../results/benchmark/{file}.json): {where}{run}"
