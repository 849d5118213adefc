"""Memory that a step frees is kept for the next one."""

import ctypes

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h, in bytes (mallopt(3)), and the largest value they take
_TRIM, _MMAP, _NEVER = -1, -3, 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed in this process; with another C library this does nothing.

    By itself it gives the memory of large tensors back to the system, which clears every page of it for the next
    tensor of that size: on a CPU a tenth of a training step, in which the same feature maps come again and again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Alpine, Windows
        return
    for threshold in (_TRIM, _MMAP):
        mallopt(threshold, _NEVER)
