"""Read by interpreters that a test starts with this folder in PYTHONPATH: the torchvision repair."""

from common.torchvision_repair import repair_torchvision

repair_torchvision()
