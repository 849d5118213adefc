"""The replacing probability over training (BERT-of-Theseus, Xu et al., EMNLP 2020, section 3.4)."""

from collections.abc import Callable


def replacing_schedule(kind: str, rate: float, k: float, steps_for_replacing: int) -> Callable[[int], float]:
    """The probability p of replacing a module, as a function of optimizer steps done.

    Args:
        kind: "constant": p = rate, then 1 after `steps_for_replacing` steps (0: never);
            "linear": p = min(k t + rate, 1).
        rate: p at the start, in (0, 1].
        k: slope of the linear schedule per step.
        steps_for_replacing: see "constant".
    """
    if kind == "linear":
        return lambda step: min(k * step + rate, 1.0)
    if kind == "constant":
        return lambda step: 1.0 if 0 < steps_for_replacing <= step else rate
    raise ValueError(f"unknown replacing schedule {kind!r}")
