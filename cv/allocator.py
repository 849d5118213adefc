"""Memory that a step frees is kept for the next one."""

import ctypes

# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h (mallopt(3)), in bytes
_MMAP, _TRIM = -3, -1
_LARGEST = 2**25  # what every glibc takes; larger blocks are given back as ever
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep blocks of up to 32 MB that are freed in this process; another C library is left alone.

    By itself it gives the memory of a step back to the system, which clears every page of it for the next one, in
    which the same feature maps come again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Alpine, Windows
        return
    if mallopt(_MMAP, _LARGEST):  # either alone would cost time: a set one keeps the other from growing by itself
        mallopt(_TRIM, _NEVER)
