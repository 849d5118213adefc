"""A summary as Markdown, LaTeX and CSV."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from common.run.files import write_text
from scripts.lib.tables.table import FOLDER, Table

_LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)
_MATH = str.maketrans({"±": r"$\pm$", "<": "$<$", ">": "$>$"})
_TEXTS = ("Task", "Method", "compared with")  # columns of words, set to the left


def render(table: Table, summary: pd.DataFrame, rows: pd.DataFrame, folder: Path, curves: Sequence[str] = ()) -> None:
    """Write `table.md` (with links to the pictures of `curves`), `table.tex` and `table.csv`."""
    shown = summary[summary["n"] > 0]
    texts = {
        "table.md": markdown(table, shown, rows, curves),
        "table.tex": latex(table, shown),
        "table.csv": shown.to_csv(index=False, lineterminator="\n", float_format="%.6g"),
    }
    for name, text in texts.items():
        write_text(folder / name, text)


def markdown(table: Table, summary: pd.DataFrame, rows: pd.DataFrame, curves: Sequence[str] = ()) -> str:
    """One section per task, the curves, then what the columns mean and where the rows come from."""
    parts = [f"# {table.title}", table.description]
    references = _references(table, summary)
    for task in summary["task"].unique():
        section = summary[summary["task"] == task]
        metric = section["metric"].iloc[0]
        parts += [f"## {task} ({metric})" if task else f"## {metric}", _markdown_table(_columns(section, references))]
    if curves:
        parts += ["## Curves", *(f"![{table.curves[name].label}](curve_{name}.png)" for name in curves)]
    if len(references) > 1:
        reference = 'the row named under "compared with"'
    else:
        reference = f'the control, "{next(iter(references.values()), table.cells[table.control].label)}"'
    notes = [
        "last: at the end of training; best: a run's best evaluation. Mean ± sample standard deviation over n seeds.",
        f"Difference: last minus the last of {reference}, seed by seed over the seeds that both have, with its 95% "
        "confidence interval; p of a paired t-test, not corrected for the number of comparisons. Means of rows with "
        "different n are of different seeds.",
    ]
    if curves:
        notes.append("Curves: over the seeds that the control and all cells of a curve have, which its axis names.")
    if any(table.curves[name].by_cost for name in curves):
        notes.append("Cost: throughput of the control divided by the row's, of the same seed; the median over seeds.")
    sources = summary.loc[summary["published"].notna(), "source"].unique()
    if len(sources):
        notes.append(f"Published elsewhere, not measured here: {'; '.join(sources)}.")
    columns = {"placeholders": "With", "device": "Measured on", "git_revision": "Revisions", "versions": "Versions"}
    for column, text in columns.items():
        found = [str(value) for value in rows.get(column, pd.Series()).dropna().unique() if value]
        notes += [f"{text}: {'; '.join(found)}."] if found else []
    name = table.path.stem if table.path.parent == FOLDER else table.path.name
    command = f"`python scripts/reproduce.py {name}`"
    notes.append(f"Every run is a row of [runs.csv](runs.csv), with its command; {command} makes the whole table.")
    return "\n\n".join(filter(None, [*parts, "\n".join(f"- {note}" for note in notes)])) + "\n"


def latex(table: Table, summary: pd.DataFrame) -> str:
    """A booktabs table; `\\usepackage{booktabs}`."""
    columns = _columns(summary, _references(table, summary))
    if any(summary["task"]):
        starts = summary["task"].ne(summary["task"].shift())
        columns.insert(0, "Task", summary["task"].where(starts, "").to_numpy())  # by position, not by index
    text = columns.to_latex(
        index=False,
        escape=True,  # not the caption
        column_format="".join("l" if name in _TEXTS else "r" for name in columns),
        caption=table.title.translate(_LATEX),
        label=f"tab:{table.name}",
    )
    return text.translate(_MATH).replace("\n[", "\n{[}")  # a bracket after a row's end would be an argument of it


def spread_text(mean: float, std: float) -> str:
    """`mean ± standard deviation`, which a single run does not have."""
    return _number(mean) + (f" ± {std:.2f}" if not math.isnan(std) else "")


def _references(table: Table, summary: pd.DataFrame) -> dict[str, str]:
    """Names and labels of the cells that others are compared with."""
    return {name: table.cells[name].label for name in summary.loc[summary["difference"].notna(), "versus"].unique()}


def _columns(summary: pd.DataFrame, references: Mapping[str, str]) -> pd.DataFrame:
    """What a reader sees, as text; columns that would be empty, or have one `references` in them, are left out."""
    named = references if len(references) > 1 else {}
    lines = [
        {
            "Method": line.label,
            "n": str(line.n),
            "last": spread_text(line.last_mean, line.last_std),
            "best": spread_text(line.best_mean, line.best_std),
            "compared with": "" if math.isnan(line.difference) else named.get(line.versus, ""),
            "difference [95% CI]": _interval(line),
            "p": "" if math.isnan(line.p) else f"{line.p:.3f}" if line.p >= 0.001 else "< 0.001",
            "published elsewhere": _number(line.published),
        }
        for line in summary.itertuples()
    ]
    columns = pd.DataFrame(lines)
    return columns.loc[:, columns.ne("").any()]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _interval(line) -> str:
    if math.isnan(line.difference):
        return ""
    interval = "" if math.isnan(line.low) else f" [{line.low:+.2f}, {line.high:+.2f}]"
    return f"{line.difference:+.2f}{interval}"


def _markdown_table(columns: pd.DataFrame) -> str:
    def line(cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"

    rule = ["---" if name in _TEXTS else "---:" for name in columns]
    return "\n".join([line(columns), line(rule), *(line(row) for row in columns.itertuples(index=False))])
