"""Memory of a CPU that a step has freed, kept for the next step."""

import ctypes

_NUMBERS = {"M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}
"""Of glibc's malloc.h, and the values that they are set to."""


def keep_freed_memory() -> None:
    """Tells glibc's malloc to give nothing back to the system; other C libraries are left as they are.

    A training step on a CPU allocates gigabytes and frees them at its end. Given back, every page of them is cleared
    and mapped anew in each step, which took a tenth of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for number, value in _NUMBERS.values():
        mallopt(number, value)
