"""Numbers that a user writes, within bounds; argparse shows their complaints."""

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A whole number (`kind` int) or a number (float) from `lowest` to `highest`, both included, and finite.

    Called with a text it gives the number, or the error that argparse prints.
    """

    kind: type
    lowest: float
    highest: float = math.inf

    def holds(self, value: float) -> bool:
        return self.lowest <= value <= self.highest and value < math.inf  # NaN does not

    def __str__(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        if self.highest < math.inf:
            return f"{noun} from {self.lowest:g} to {self.highest:g}"
        return f"{noun} of at least {self.lowest:g}"

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {self}")
        return value
