"""Singular values of the weights that are aligned: the exported student of a vision run against its teacher."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator
from yacs.config import CfgNode

from scripts.report_lib.load import Run
from scripts.report_lib.plots import panel, svg


def has_spectra(run: Run) -> bool:
    """Whether the run has left a student and names a teacher."""
    return run.vision and bool(run.settings.get("DISTILLER.TEACHER")) and (run.folder / "student").is_dir()


def spectra(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Singular values of (student, teacher) by pair, falling.

    Raises:
        UserError: the teacher is not found, or a network cannot be read or does not pair up.
    """
    from cv.dskd import layer_pairs
    from cv.export import load_model
    from cv.teachers import find_teacher

    cfg = CfgNode(run.config)
    student, teacher = (load_model(Path(folder))[0] for folder in (run.folder / "student", find_teacher(cfg)))
    pairs = layer_pairs(student, teacher, cfg.DSKD)
    return {name: (_singular_values(ours), _singular_values(theirs)) for name, ours, theirs in pairs}


def spectrum(student: np.ndarray, teacher: np.ndarray) -> str:
    """Both spectra on a logarithmic axis; values below 1e-4 of the largest are left out."""
    with panel() as (figure, axis):
        for values, color, style in ((student, "#0072b2", "-"), (teacher, "#d55e00", "--")):
            kept = values[values > 1e-4 * values.max(initial=0)]
            axis.semilogy(np.arange(1, len(kept) + 1), kept, style, color=color, linewidth=1.2)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylabel("singular value")
        return svg(figure)


def _singular_values(weight) -> np.ndarray:
    return np.linalg.svd(weight.detach().flatten(1).numpy(), compute_uv=False)
