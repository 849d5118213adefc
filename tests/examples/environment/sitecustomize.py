"""Read by every interpreter that a test of an example starts: the torchvision repair, unknown to examples."""

from common.torchvision_repair import repair_torchvision

repair_torchvision()
