"""Draw resources/overview.png and overview.svg: DSKD in one figure, with the method's own functions on toy matrices.

python resources/draw_overview.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as MplPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.svd_loss import direction_sensitivity, select_directions

FOLDER = Path(__file__).resolve().parent
N, RANK = 14, 6  # size of the toy matrices, directions to select
TEACHER, STUDENT, UPDATE, CHOSEN, OTHER = "#7b4fa3", "#1f6fb2", "#c05a1c", "#d1495b", "#c9ccd1"
INK, FAINT = "#22262b", "#6b7280"


def smooth_matrix(generator: torch.Generator, scale: float, decay: float) -> torch.Tensor:
    """A random matrix of N x N with singular values that fall geometrically, largest entry about `scale`."""
    left, right = (torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    matrix = left @ torch.diag(decay ** torch.arange(N, dtype=torch.float64)) @ right.T
    return scale * matrix / matrix.abs().max()


def aligned(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """W~ of the reading `own`."""
    U, sigma, Vh = torch.linalg.svd(matrix)
    return (U * (weights.sqrt() * sigma)) @ Vh


def heat(figure: Figure, box: tuple, matrix: torch.Tensor, color: str, title: str, below: str = "") -> None:
    """A matrix as an image in the frame colour of its network; box = (left, bottom, side) in inches."""
    axes = inches(figure, box[0], box[1], box[2], box[2])
    limit = matrix.abs().max().item() or 1.0
    axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2.2)
    axes.set_title(title, fontsize=13, color=color, pad=5)
    axes.set_xlabel(below, fontsize=10, color=FAINT, labelpad=4)


def bars(figure: Figure, box: tuple, values: torch.Tensor, chosen: torch.Tensor, title: str, below: str = "") -> None:
    """Bars per direction, the chosen ones in colour."""
    axes = inches(figure, *box)
    axes.patch.set_visible(False)
    colors = np.where(chosen.numpy(), CHOSEN, OTHER)
    axes.bar(range(1, N + 1), values.numpy(), color=colors, width=0.78)
    axes.set_xlim(0.3, N + 0.7)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.set_title(title, fontsize=11, color=INK, pad=4)
    axes.set_xlabel(below, fontsize=10, color=FAINT, labelpad=4)


def inches(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def arrow(canvas: Axes, *corners: tuple[float, float], color: str = FAINT) -> None:
    """An arrow along the corners."""
    path = MplPath(corners)
    canvas.add_patch(
        FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=16, linewidth=1.8, color=color, joinstyle="round")
    )


def panel(canvas: Axes, box: tuple, title: str) -> None:
    left, bottom, width, height = box
    canvas.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc="#f6f7f9", ec="#e0e3e8"
        )
    )
    canvas.text(left + 0.18, bottom + height - 0.16, title, fontsize=13, weight="bold", color=INK, va="top")


def draw() -> Figure:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (smooth_matrix(generator, 1.0, 0.8) for _ in range(2))
    update, grad = smooth_matrix(generator, 0.1, 0.93), smooth_matrix(generator, 1.0, 0.85)
    early, late = (direction_sensitivity(update, grad, alpha) for alpha in (0.0, 1.0))
    weights = select_directions(direction_sensitivity(update, grad, 0.5), RANK)

    figure = plt.figure(figsize=(11, 5.5))
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, 11), ylim=(0, 5.5))
    canvas.axis("off")
    panel(canvas, (0.1, 2.95, 10.8, 2.45), "In every step: align the weights along the selected directions")
    panel(canvas, (0.1, 0.1, 10.8, 2.45), "Every svd_steps steps: find the directions that matter to the optimiser now")

    heat(figure, (0.5, 3.25, 1.4), teacher, TEACHER, "$W_t$", "teacher, frozen")
    heat(figure, (2.2, 3.25, 1.4), student, STUDENT, "$W_s$", "student, trained")
    heat(figure, (5.8, 3.25, 1.4), aligned(teacher, weights), TEACHER, r"$\tilde W_t$")
    heat(figure, (7.5, 3.25, 1.4), aligned(student, weights), STUDENT, r"$\tilde W_s$")
    arrow(canvas, (3.8, 3.95), (5.65, 3.95))
    formula = r"$\tilde W = \sum_{i \in K}\sqrt{w_i}\,\sigma_i u_i v_i^\top$"
    canvas.text(4.7, 4.12, formula, fontsize=12, ha="center", va="bottom", color=INK)
    canvas.text(9.95, 4.12, r"$L_{task} +$", fontsize=15, ha="center", color=INK)
    canvas.text(9.95, 3.62, r"$\lambda\,\|\tilde W_s - \tilde W_t\|_F^2$", fontsize=15, ha="center", color=INK)

    heat(figure, (0.5, 0.4, 1.4), update, UPDATE, r"$\Delta W$", "update of $W_s$")
    heat(figure, (2.2, 0.4, 1.4), grad, UPDATE, "$G$", "gradient of $W_s$")
    arrow(canvas, (3.75, 1.1), (4.5, 1.1))
    canvas.text(4.1, 1.2, "SVD", fontsize=11, ha="center", va="bottom", color=INK)
    first = r"early: $\sigma_i\,|u_i^\top G v_i|$"
    second = r"late: $\frac{1}{2}\sigma_i^2\,\|G^\top u_i\|^2\,\|G v_i\|^2$"
    bars(figure, (4.65, 1.36, 2.2, 0.5), early, early >= early.topk(RANK).values[-1], first)
    bars(
        figure,
        (4.65, 0.4, 2.2, 0.5),
        late,
        late >= late.topk(RANK).values[-1],
        second,
        "sensitivity $J_i$ of direction $i$",
    )
    arrow(canvas, (7.0, 1.1), (7.75, 1.1))
    canvas.text(7.35, 1.2, "top $K$", fontsize=11, ha="center", va="bottom", color=INK)
    bars(figure, (7.9, 0.4, 2.2, 1.3), weights, weights > 0, "", "weight $w_i$")
    arrow(canvas, (9.0, 1.85), (9.0, 2.75), (4.7, 2.75), (4.7, 3.85), color=CHOSEN)
    canvas.text(6.85, 2.75, "$K$, $w$", fontsize=12, ha="center", va="center", color=CHOSEN, backgroundcolor="white")
    return figure


def main() -> None:
    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "overview", "svg.fonttype": "path"})
    figure = draw()
    figure.savefig(FOLDER / "overview.png", dpi=160, facecolor="white", metadata={"Software": None})
    figure.savefig(FOLDER / "overview.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
