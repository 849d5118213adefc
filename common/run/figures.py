"""Figures as PNG and SVG files, the same bytes for the same figures: no dates, no versions, no random ids.

Texts from files are drawn as they are written, not as formulas.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.run.files import write_aside

_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


@contextmanager
def drawn(folder: Path, name: str, size: tuple[float, float]) -> Iterator:
    """A matplotlib figure of a size in inches to draw on; at the end it is written to `name`.png and `name`.svg."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        folder.mkdir(parents=True, exist_ok=True)
        for kind, metadata in _METADATA.items():
            write_aside(
                folder / f"{name}.{kind}",
                lambda path, kind=kind, metadata=metadata: figure.savefig(
                    path, format=kind, metadata=metadata, dpi=150
                ),
            )


def plain(text: str) -> str:
    """Text from a file, with nothing in it that is drawn as a formula or cannot be drawn."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
