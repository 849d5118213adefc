"""Memory: whether a set of images fits into it, asked before the room is taken, and what is said where it is short."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from common.run.errors import UserError


def memory_size() -> float:
    """Bytes of the machine's memory; infinity where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return float("inf")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fits(count: int, height: int, width: int) -> bool:
    """Whether RGB images are together no larger than the machine's memory."""
    return 3 * count * height * width <= memory_size()


def check_memory(count: int, height: int, width: int) -> None:
    """Refuse images that are larger together than the machine's memory, where the system tells that.

    Linux grants any room that is asked for and ends the program when it is used.
    """
    if not fits(count, height, width):
        raise UserError(
            f"{count} images of {width}x{height} pixels need {3 * count * height * width / 2**30:.4g} GiB of memory, "
            f"and this machine has {memory_size() / 2**30:.4g}; set a smaller DATASET.IMAGE_SIZE"
        )


def memory_is_short(error: BaseException) -> bool:
    """Whether that is what an error says; torch's are RuntimeErrors, known by their words."""
    words = ("can't allocate memory", "out of memory", "Storage size calculation overflowed", "numel: integer multip")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Settings that ask for more memory than there is are the user's error."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_is_short(error):
            raise
        raise UserError(
            f"not enough memory ({' '.join(str(error).split())[:200]}); set a smaller SOLVER.BATCH_SIZE or "
            "DATASET.IMAGE_SIZE, smaller networks, or smaller sizes in the method's block"
        ) from error
