"""The NVIDIA GPU of this machine and memory on it, through cuda-bindings; no torch."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitferry.device.errors import StageFailed

try:
    cuda: Any = import_module("cuda.bindings.runtime")
except ImportError:  # what is built for another machine needs none
    cuda = None


@dataclass(frozen=True)
class Gpu:
    """A GPU, with its compute capability, as 8.6."""

    name: str
    capability: str


def find(index: int) -> Gpu | str:
    """Give the GPU of this index, or say why there is none."""
    if cuda is None:
        return "no NVIDIA GPU can be used without the Python package 'cuda-bindings' (`pip install cuda-bindings`)"
    try:
        count = call(cuda.cudaGetDeviceCount())
    except StageFailed as error:
        return f"no NVIDIA GPU here ({str(error).removeprefix('CUDA: ')})"
    if index not in range(count):
        return f"no NVIDIA GPU has the index {index} here; CUDA finds {count}"
    found = call(cuda.cudaGetDeviceProperties(index))
    return Gpu(found.name.decode().rstrip("\0"), f"{found.major}.{found.minor}")


def call(answer: tuple[Any, ...]) -> Any:
    """Give what a CUDA call returned, or raise StageFailed with CUDA's own words."""
    error, *values = answer
    if error != cuda.cudaError_t.cudaSuccess:
        raise StageFailed(f"CUDA: {cuda.cudaGetErrorString(error)[1].decode()}")
    return values[0] if values else None


class Stream:
    """A queue of work on one GPU; its memory is kept until the process ends."""

    def __init__(self, index: int) -> None:
        call(cuda.cudaSetDevice(index))
        self._stream = call(cuda.cudaStreamCreate())

    @property
    def handle(self) -> int:
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Give the address of `size` bytes on the GPU."""
        return int(call(cuda.cudaMalloc(size)))

    def send(self, array: NDArray[Any], address: int) -> None:
        """Queue the copy of a contiguous array to the GPU."""
        kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self._stream))

    def receive(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Wait for the queue and give the float32 array that it left at `address`."""
        array = np.empty(shape, np.float32)
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self._stream))
        call(cuda.cudaStreamSynchronize(self._stream))
        return array
