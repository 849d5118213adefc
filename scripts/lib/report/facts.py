"""The figures of a run as text."""

from collections.abc import Callable, Sequence
from typing import Any

from scripts.lib.report.labels import without_dskd
from scripts.lib.report.load import Run, is_number, metric_name
from scripts.lib.report.networks import teacher_score

_UNKNOWN = "–"


def headline(run: Run) -> list[tuple[str, Any]]:
    """What was run, where and how."""
    result = run.result or {}
    student = run.setting("DISTILLER.STUDENT", "num_successor_layers") or "the default number of layers"
    teacher = run.setting("DISTILLER.TEACHER", "model_name_or_path") or ", ".join(
        run.settings.get("DISTILLER.TEACHERS", [])
    )
    facts = [
        ("Status", "finished" if run.result else f"in progress, last log line at step {run.last_step}"),
        ("Method", run.method),
        ("Dataset", run.task),
        ("Student", f"{student} layers" if isinstance(student, int) else student),
        ("Teacher", teacher or "none"),
        ("Seed", run.seed),
    ]
    later = {"Device": "device", "Revision": "git_revision", "Command": "command"}
    return facts + [(name, result.get(key, "not known before the run has finished")) for name, key in later.items()]


def figures(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What is measured -> its value in every run, where at least one knows it; of a run in progress, by its log."""
    columns = [_figures(run, without_dskd(run, runs)) for run in runs]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    return {name: values for name, values in rows.items() if set(values) != {_UNKNOWN}}


def _figures(run: Run, baseline: Run | None) -> dict[str, str]:
    result = run.result or {}
    last, memory = _reached(run, "last"), result.get("peak_memory_bytes")
    base = _reached(baseline, "last") if baseline else None
    gain = f" ({last - base:+.{2 if run.vision else 4}f} with it)" if is_number(base) and is_number(last) else ""
    return {
        "metric": str(result.get("metric", metric_name((run.metric_keys or [_UNKNOWN])[0]))),
        "last": _score(run, last),
        "best": _score(run, _reached(run, "best")),
        "teacher": _score(run, teacher_score(run)),
        "last without DSKD": _score(run, base) + gain,
        "throughput": _amount(result.get("throughput"), str(result.get("throughput_unit", ""))),
        "wall time": _written(result.get("wall_seconds"), _duration),
        "peak memory": _amount(memory / 1e9 if is_number(memory) else memory, "GB"),
        "optimizer steps": _amount(result.get("steps", run.last_step)),
        "parameters": _amount(result.get("parameters")),
    }


def _reached(run: Run, which: str) -> Any:
    """The "last" or "best" value of the metric."""
    _, values = run.series(run.metric_keys[0]) if run.metric_keys else ((), ())
    so_far = {"last": values[-1], "best": values.max()} if len(values) else {}
    return (so_far | (run.result or {})).get(which)


def _written(value: Any, form: Callable[[Any], str]) -> str:
    return form(value) if is_number(value) else _UNKNOWN if value is None else str(value)


def _score(run: Run, value: Any) -> str:
    return _written(value, lambda score: f"{score:.2f} %" if run.vision else f"{score:.4f}")


def _amount(value: Any, unit: str = "") -> str:
    return _written(value, lambda x: f"{x:,.0f} {unit}".strip() if abs(x) >= 100 else f"{x:.3g} {unit}".strip())


def _duration(seconds: float) -> str:
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"{seconds / size:.1f} {unit}"
