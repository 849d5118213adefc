"""Which student layer stands beside which teacher layer, and the weight pairs that follow from it."""

from .names import expand_patterns, linear_names, pair_weights
from .pair import pair_layers
from .pairs import LayerPairs
from .rules import last_of_group, spread_evenly

__all__ = [
    "LayerPairs",
    "expand_patterns",
    "last_of_group",
    "linear_names",
    "pair_layers",
    "pair_weights",
    "spread_evenly",
]
