"""A summary as Markdown, and on demand as LaTeX and CSV."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from common.run.files import write_text
from scripts.lib.tables.table import FOLDER, Table

_LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)
_MATH = str.maketrans({"±": r"$\pm$", "<": "$<$", ">": "$>$", "†": r"$\dagger$"})
MIXED = "†"
# columns of words, set to the left
_TEXTS = ("Task", "Method", "difference of", "comparison", "table", "what it compares", "status", "command")


def render(table: Table, summary: pd.DataFrame, rows: pd.DataFrame, folder: Path, formats: Sequence[str] = ()) -> None:
    """Write `table.md` and, if `formats` has tex or csv, `table.tex` and `table.csv`."""
    shown = summary[summary["n"] > 0]
    write_text(folder / "table.md", markdown(table, shown, rows))
    if "tex" in formats:
        write_text(folder / "table.tex", latex(table, shown))
    if "csv" in formats:
        write_text(folder / "table.csv", shown.to_csv(index=False, lineterminator="\n", float_format="%.6g"))


def markdown(table: Table, summary: pd.DataFrame, rows: pd.DataFrame) -> str:
    """One section per task, then what the columns mean and where the rows come from."""
    parts = [f"# {table.title}", table.description]
    references = _references(table, summary)
    for task in summary["task"].unique():
        section = summary[summary["task"] == task]
        metric = section["metric"].iloc[0]
        parts += [f"## {task} ({metric})" if task else f"## {metric}", markdown_table(_columns(section, references))]
    what = 'as "difference of" says, of last'
    if _is_plain(summary, references):
        control = next(iter(references.values()), table.cells[table.control].label)
        what = f'last minus the last of the control, "{control}"'
    notes = [
        "last: at the end of training; best: a run's best evaluation. Mean ± sample standard deviation over n seeds.",
        f"Difference: {what}, seed by seed over the seeds that both have, with its 95% confidence interval; p of a "
        "paired t-test, not corrected for the number of comparisons. Means of rows with different n are of different "
        "seeds.",
    ]
    if summary["mixed"].any():
        notes.append(f"{MIXED} Not all runs of the two rows were made by the same, recorded revision of the code.")
    if compared := int(summary["holm"].notna().sum()):
        notes.append(f"p (Holm): corrected for the {compared} comparisons that were planned together.")
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


def mean_text(values: Sequence[float], digits: int, sign: str = "") -> str:
    """`mean ± sample standard deviation`, which a single value does not have."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{deviation}"


def _references(table: Table, summary: pd.DataFrame) -> dict[str, str]:
    """Names and labels of the cells that others are compared with."""
    return {name: table.cells[name].label for name in summary.loc[summary["difference"].notna(), "versus"].unique()}


def _is_plain(summary: pd.DataFrame, references: Mapping[str, str]) -> bool:
    """Whether every difference is that of a row to one and the same other row."""
    return len(references) < 2 and not summary.loc[summary["difference"].notna(), "turned"].any()


def _difference_of(line, references: Mapping[str, str]) -> str:
    other = references.get(line.versus, "")
    return f"{other} minus this" if line.turned else f"this minus {other}"


def _columns(summary: pd.DataFrame, references: Mapping[str, str]) -> pd.DataFrame:
    """What a reader sees, as text; columns that would be empty, or say the same in all rows, are left out."""
    plain = _is_plain(summary, references)
    lines = [
        {
            "Method": line.label,
            "n": str(line.n),
            "last": spread_text(line.last_mean, line.last_std),
            "best": spread_text(line.best_mean, line.best_std),
            "difference of": "" if plain or math.isnan(line.difference) else _difference_of(line, references),
            "difference [95% CI]": interval_text(line) + (f" {MIXED}" if line.mixed else ""),
            "p": _probability(line.p),
            "p (Holm)": _probability(line.holm),
            "published elsewhere": _number(line.published),
        }
        for line in summary.itertuples()
    ]
    columns = pd.DataFrame(lines)
    return columns.loc[:, columns.ne("").any()]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _probability(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def interval_text(line) -> str:
    """`difference [low, high]`, without an interval where there is none; "" without a difference."""
    if math.isnan(line.difference):
        return ""
    interval = "" if math.isnan(line.low) else f" [{line.low:+.2f}, {line.high:+.2f}]"
    return f"{line.difference:+.2f}{interval}"


def markdown_table(columns: pd.DataFrame) -> str:
    def line(cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"

    rule = ["---" if name in _TEXTS else "---:" for name in columns]
    return "\n".join([line(columns), line(rule), *(line(row) for row in columns.itertuples(index=False))])
