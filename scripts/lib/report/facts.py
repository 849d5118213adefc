"""The figures of a run as text."""

from typing import Any

from scripts.lib.report.load import Run, metric_name

RESULT_HEADER = ("", "last", "best", "throughput", "wall time", "peak memory", "optimizer steps", "parameters")


def headline(run: Run) -> list[tuple[str, Any]]:
    """What was run, where and how."""
    result = run.result or {}
    unknown = "not known before the run has finished"
    facts = [
        ("Status", "finished" if run.result else f"in progress, last log line at step {run.last_step}"),
        ("Method", run.method),
        ("Dataset", run.task),
        ("Student", run.setting("DISTILLER.STUDENT", "num_successor_layers") or "the default number of layers"),
        ("Teacher", run.setting("DISTILLER.TEACHER", "model_name_or_path") or "none"),
        ("Seed", run.seed),
        ("Device", result.get("device", unknown)),
        ("Revision", result.get("git_revision", unknown)),
        ("Command", result.get("command", unknown)),
    ]
    if not run.vision and isinstance(facts[3][1], int):
        facts[3] = ("Student", f"{facts[3][1]} layers")
    return facts


def result_row(run: Run, label: str) -> list[str]:
    """A row under `RESULT_HEADER`; of a run in progress, what its log says."""
    result = run.result or {}
    metric = str(result.get("metric", metric_name((run.metric_keys or [""])[0])))
    _, values = run.series(run.metric_keys[0]) if run.metric_keys else ((), ())
    so_far = {"last": values[-1], "best": values.max()} if len(values) else {}
    memory, seconds = result.get("peak_memory_bytes"), result.get("wall_seconds")
    return [
        f"{label}: {metric}" if metric else label,
        *(_score(run, result.get(name, so_far.get(name))) for name in ("last", "best")),
        _amount(result.get("throughput"), str(result.get("throughput_unit", ""))),
        _duration(seconds),
        _amount(memory / 1e9 if _is_number(memory) else memory, "GB"),
        _amount(result.get("steps", run.last_step)),
        _amount(result.get("parameters")),
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _score(run: Run, value: Any) -> str:
    if not _is_number(value):
        return "–" if value is None else str(value)
    return f"{value:.2f} %" if run.vision else f"{value:.4f}"


def _amount(value: Any, unit: str = "") -> str:
    if not _is_number(value):
        return "–" if value is None else str(value)
    digits = f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{digits} {unit}".strip()


def _duration(seconds: Any) -> str:
    if not _is_number(seconds):
        return "–" if seconds is None else str(seconds)
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
