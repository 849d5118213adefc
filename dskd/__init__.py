"""DSKD, Direction Sensitivity-based Knowledge Distillation: a loss on weights, for any network and training loop."""

from .loss import DirectionSensitivityLoss
from .pairing import pair_layers, pair_weights
from .readings import Curvature, Own, Spectrum, Update, low_rank_alignment
from .sensitivity import direction_sensitivity, select_directions

__version__ = "0.2.0"
__all__ = [
    "Curvature",
    "DirectionSensitivityLoss",
    "Own",
    "Spectrum",
    "Update",
    "direction_sensitivity",
    "low_rank_alignment",
    "pair_layers",
    "pair_weights",
    "select_directions",
]
