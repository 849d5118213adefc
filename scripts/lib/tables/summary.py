"""Statistics of a table: mean and sample standard deviation over seeds, paired comparison with another cell."""

import math

import numpy as np
import pandas as pd
from scipy import stats

from scripts.lib.tables.table import Table

CONFIDENCE = 0.95


def paired_difference(values: pd.Series, control: pd.Series) -> dict[str, float]:
    """Mean of `values - control` over the seeds that both have, its 95% interval and the p of a paired t-test.

    Both are indexed by seed. With fewer than two pairs, or where all differences are equal and nothing can be said
    about their spread, interval and p are NaN.
    """
    differences = (values - control).dropna()
    found = {"difference": differences.mean(), "low": math.nan, "high": math.nan, "p": math.nan}
    if len(differences) > 1 and not np.isclose(differences.std(), 0, atol=1e-12):
        seeds = differences.index
        test = stats.ttest_rel(values.loc[seeds], control.loc[seeds])
        interval = test.confidence_interval(CONFIDENCE)
        found |= {"low": interval.low, "high": interval.high, "p": test.pvalue}
    return {**found, "pairs": len(differences)}


def holm(p: pd.Series) -> pd.Series:
    """p values corrected by Holm for their number; NaN, where nothing was tested, counts as none."""
    rising = p.dropna().sort_values()
    scaled = (rising * np.arange(len(rising), 0, -1)).cummax().clip(upper=1)
    return scaled.reindex(p.index)


def _mixed(states: pd.Series, cells: tuple[str, str], seeds: pd.Index) -> bool:
    pairs = [(cell, seed) for cell in cells for seed in seeds]
    found = states.reindex(states.index.intersection(pairs))
    return found.nunique() > 1 or (len(found) > 1 and bool(found.isna().any()))


def summarize(table: Table, rows: pd.DataFrame) -> pd.DataFrame:
    """One line per task and cell, in the table's order and in its display units.

    Columns: task, cell, label, metric, n, last_mean, last_std, best_mean, best_std, versus (the cell that this one is
    compared with), turned (whether the difference is that cell minus this one), difference (of `last`), low, high, p,
    pairs, mixed (whether the pairs were made by different states of the code), holm (p corrected within the table's
    family), published, source. NaN where there is nothing.
    """
    lines = []
    for task in table.tasks:
        mine = rows[rows["task"] == task]
        metrics = mine["metric"].dropna().unique() if "metric" in mine else []
        scores = mine.set_index("seed")[["last", "best"]].astype(float) * table.scale
        by_cell = {name: scores[(mine["cell"] == name).to_numpy()] for name in table.cells}
        states = mine.set_index(["cell", "seed"]).get("sources", pd.Series(dtype=object))
        for name, cell in table.cells.items():
            last, best = by_cell[name]["last"], by_cell[name].dropna(subset="last")["best"]
            versus = table.versus(name)
            other = by_cell[versus]["last"] if versus else pd.Series(dtype=float)
            turned = bool(cell.control_of)
            line = {
                "task": task,
                "cell": name,
                "label": cell.label,
                "metric": ", ".join(map(str, metrics)),
                "n": int(last.count()),
                "last_mean": last.mean(),
                "last_std": last.std(),
                "best_mean": best.mean(),
                "best_std": best.std(),
                "versus": versus,
                "turned": turned,
                **(paired_difference(other, last) if turned else paired_difference(last, other)),
                "mixed": _mixed(states, (name, versus), (last - other).dropna().index),
                "published": cell.published.value.get(task, math.nan),
                "source": cell.published.source,
            }
            lines.append(line)
    summary = pd.DataFrame(lines)
    return summary.assign(holm=holm(summary["p"].where(summary["cell"].isin(table.family))))
