"""Freed memory is kept: the system need not give, and clear, the same pages again and again."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from bitferry.pipeline import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for _ in range(10):
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_block_that_is_made_again_costs_no_new_pages() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "keep")
    }
    assert faults["keep"] < faults["plain"] / 3
