"""What "direction" means: each reading chooses directions and says how far two matrices are apart along them."""

from .curvature import Curvature
from .own import Own, low_rank_alignment
from .reading import Reading, State
from .spectrum import Spectrum
from .update import Update

__all__ = ["Curvature", "Own", "Reading", "Spectrum", "State", "Update", "low_rank_alignment"]
