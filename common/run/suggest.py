"""What a user may have meant by a name that is unknown."""

import difflib
from collections.abc import Iterable


def nearest(wrong: str, valid: Iterable[str]) -> str | None:
    """The valid name that is most like a wrong one, if any is."""
    return next(iter(difflib.get_close_matches(wrong, valid, n=1, cutoff=0.5)), None)


def suggest(wrong: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'? valid: x, y`, to end an error message with."""
    valid = list(valid)
    near = nearest(wrong, valid)
    return (f"did you mean {near!r}? " if near else "") + f"valid: {', '.join(valid) or 'none'}"
