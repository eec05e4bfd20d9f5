"""Keep the memory that PyTorch frees for its next call, in place of giving it back to the system each time."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h: from how many free bytes at its end the heap shrinks, and from what size a block is mapped by itself."""
BLOCK, HEAP = 1 << 30, 2**31 - 1


def keep_freed() -> bool:
    """Raise both thresholds of glibc's malloc; False where this is no glibc, and nothing was done.

    By default every large activation is mapped when it is made and given back when it is freed, and the system clears
    each of its pages anew, which can take as long as the arithmetic.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, HEAP))
