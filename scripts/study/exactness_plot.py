"""The cosine of the held gradient with the exact one against its age."""

from pathlib import Path

import numpy as np

from common.run.figures import drawn
from scripts.study.held_gradient import Reference

_TITLES = {"cv": "CIFAR-100, ResNet56 -> ResNet20", "nlp": "RTE, BERT with half of its layers"}


def plot(pipelines: dict[str, list[Reference]], folder: Path) -> None:
    """Write exactness.png and .svg: a panel per pipeline, a color per stage, mean and worst pair."""
    with drawn(folder, "exactness", (9, 3.6)) as figure:
        for panel, (name, references) in zip(figure.subplots(1, 2), pipelines.items(), strict=True):
            _panel(panel, references)
            panel.set_title(_TITLES[name])


def _panel(panel, references: list[Reference]) -> None:
    for i, stage in enumerate(dict.fromkeys(reference.stage for reference in references)):
        chosen = [reference for reference in references if reference.stage == stage]
        cosine = np.concatenate([reference.cosine[0.0] for reference in chosen], axis=1)[
            1:
        ]  # (ages, pairs), age 0 is 1
        ages = chosen[0].ages[1:]
        panel.plot(ages, cosine.mean(axis=1), "o-", color=f"C{i}", markersize=3, label=stage)
        panel.plot(ages, cosine.min(axis=1), ":", color=f"C{i}", linewidth=1)
    panel.set_xscale("log")
    panel.set_xticks(ages, [str(age) for age in ages])
    panel.minorticks_off()
    panel.set_xlabel("age of the held gradient, optimizer steps (dotted: worst pair)")
    panel.set_ylabel("cosine with the exact gradient")
    panel.legend(loc="lower left")
    panel.grid(alpha=0.3)
