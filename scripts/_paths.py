"""Lets the scripts import the repository's packages from any working directory; imported first by each of them."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "nlp" / "BERT-of-Theseus")]
