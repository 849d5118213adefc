"""What the two programs share: DSKD's settings and the record of a run. Knows neither BERT nor ResNet."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
