"""Whether a set of images fits into memory, asked before the room is taken."""

import os

from common.run.errors import UserError


def check_memory(count: int, height: int, width: int) -> None:
    """Refuse images that are larger together than the machine's memory, where the system tells that.

    Linux grants any room that is asked for and ends the program when it is used.
    """
    if not hasattr(os, "sysconf"):
        return
    needed, there = 3 * count * height * width, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"{count} images of {width}x{height} pixels need {needed / 2**30:.4g} GiB of memory, and this machine has "
            f"{there / 2**30:.4g}; set a smaller DATASET.IMAGE_SIZE"
        )
