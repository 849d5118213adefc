"""The DSKD loss as both programs make it, from the settings of common/settings.py. The method itself is in dskd/."""

from collections.abc import Mapping
from typing import Any

from common.run.errors import user_errors
from common.settings import SETTINGS
from dskd import (
    Curvature,
    DirectionSensitivityLoss,
    Own,
    Spectrum,
    Update,
    direction_sensitivity,
    low_rank_alignment,
    select_directions,
)
from dskd.controls import (
    ConstantProgress,
    Dealt,
    DiagonalFisher,
    Plain,
    RandomDirection,
    ReleasedGradient,
    ShuffledFactors,
    shrunk,
    shuffled,
)
from dskd.groups import Pairs
from dskd.readings import Reading
from dskd.sensitivity import magnitude, sensitivity, tempered

__all__ = [
    "DirectionSensitivityLoss",
    "build_loss",
    "direction_sensitivity",
    "low_rank_alignment",
    "select_directions",
]

_READINGS = {"own": Own, "update": Update, "spectrum": Spectrum, "curvature": Curvature}
_SCORES = {"sensitivity": sensitivity, "tempered": tempered, "magnitude": magnitude}


def build_loss(pairs: Pairs, values: Mapping[str, Any], seed: int) -> DirectionSensitivityLoss:
    """The loss of some settings.

    Args:
        pairs: (name, student weight, teacher weight).
        values: by the names of `SETTINGS`, valid together (`conflicts`); "weight" is the program's own business.
        seed: of controls that draw at random.

    Raises:
        UserError: pairs that cannot be aligned.
    """
    with user_errors():
        return DirectionSensitivityLoss(
            _with_control(pairs, values["control"], seed),
            build_reading(values, seed),
            **_part("loss", values),
        )


def build_reading(values: Mapping[str, Any], seed: int) -> Reading:
    """The reading of some settings, within its control."""
    basis, control, score = values["basis"], values["control"], values["score"]
    reading: Reading
    if control == "ewc":
        reading = DiagonalFisher(values["memory"])
    elif basis == "curvature":
        curvature = Curvature(**_part("reading", values))
        reading = ShuffledFactors(curvature, seed) if score == "random" else curvature
    else:
        function = Dealt(sensitivity, seed) if score == "random" else _SCORES[score]
        reading = _READINGS[basis](**_part("reading", values), score=function)
    if control == "released":
        reading = ReleasedGradient(reading)
    elif control == "plain":
        reading = Plain(reading)
    elif control == "random":
        reading = RandomDirection(reading, seed)
    return reading if values["alpha"] is None else ConstantProgress(reading, values["alpha"])


def _part(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a part takes by their names."""
    return {s.name: values[s.name] for s in SETTINGS if s.part == part and values["basis"] in s.bases}


def _with_control(pairs: Pairs, control: str, seed: int) -> Pairs:
    if control == "shuffled":
        return shuffled(pairs, seed)
    return shrunk(pairs) if control == "shrink" else pairs
