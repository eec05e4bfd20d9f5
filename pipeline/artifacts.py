"""The nouns: one frozen value per stage output, so that stages fit together in one order only.

Each carries the `key` of what it was made from (see `cache.py`). Models that a later run may need are files;
they are loaded when a stage asks for them, not before.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from device.arrays import Images
from device.preprocess import Preprocessing
from targets import Environment, Precision, Scheme

if TYPE_CHECKING:
    from torch import nn

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images of one purpose, decoded and resized by the recipe's contract: N×H×W×3 uint8, memory-mapped."""

    name: str
    images: Images
    labels: Labels
    sources: tuple[str, ...]
    """Where each image came from, for messages."""
    digests: tuple[bytes, ...]
    """A hash of each image's pixels, for the leak check."""
    key: str

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Weights:
    """A state dict as safetensors, trained here."""

    path: Path
    key: str


class Program(Protocol):
    """A model that can be traced and exported: float or quantized."""

    @property
    def key(self) -> str: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def baseline(self) -> "FloatModel":
        """Give the float model it was made from, itself if it is that."""

    def module(self) -> "nn.Module":
        """Give the model, uint8 N×H×W×3 in and scores N×K out, in evaluation mode."""


@dataclass(frozen=True)
class FloatModel:
    """The float baseline with the contract's arithmetic inside: uint8 N×H×W×3 in, scores N×K out."""

    eager: "nn.Module"
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    key: str
    precision: Precision = "float32"

    @property
    def baseline(self) -> "FloatModel":
        return self

    def module(self) -> "nn.Module":
        return self.eager


@dataclass(frozen=True)
class Quantized:
    """A PyTorch int8 program made by PT2E for one scheme, as a `.pt2` file."""

    path: Path
    baseline: FloatModel
    scheme: Scheme
    calibration_images: int
    key: str
    precision: Precision = "int8"

    def module(self) -> "nn.Module":
        from pipeline.quantize import read_program  # noqa: PLC0415 - this file stays free of torch

        return read_program(self.path)


@dataclass(frozen=True)
class Traced:
    """A TorchScript file whose answers equal those of the program it was traced from."""

    path: Path
    precision: Precision
    key: str


@dataclass(frozen=True)
class Onnx:
    """An ONNX file as exported, batch dynamic, compared with its program."""

    path: Path
    program: Program
    key: str


@dataclass(frozen=True)
class Simplified:
    """An ONNX file after onnxsim, compared with the file before."""

    path: Path
    precision: Precision
    key: str


@dataclass(frozen=True)
class Compiled:
    """A target's own file, alone in its folder with what belongs to it."""

    path: Path
    target: str
    precision: Precision
    source: Simplified | Traced
    threads: int
    """The CPU threads it is verified with, and runs with on the device."""
    key: str


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of the float model and of the artifact on the same images, paired."""

    images: int
    float_correct: int
    correct: int
    lost: int
    """Images the float model gets right and the artifact does not."""
    gained: int
    """Images the artifact gets right and the float model does not."""
    flipped: int
    """Images on which the two answers differ, right or wrong."""
    drop_pp: float
    drop_upper_pp: float
    """One-sided upper confidence bound of the drop, in percentage points (Tango 1998)."""
    drop_lower_pp: float
    confidence: float


@dataclass(frozen=True)
class Timing:
    """Milliseconds per image at batch 1."""

    samples: int
    p50_ms: float
    p90_ms: float


@dataclass(frozen=True)
class Latency:
    """The eager float model and the artifact, interleaved in one process with the same thread count."""

    threads: int
    eager_float: Timing
    artifact: Timing
    speedup: float
    """Ratio of the medians, eager float over artifact."""
    speedup_lower: float
    speedup_upper: float
    """Two-sided 95 % bootstrap interval of the ratio over blocks."""
    suspicions: tuple[str, ...]
    """What may have disturbed the measurement, each with its remedy."""


Outcome = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """Whether one artifact is inside the recipe's budget, with the figures that say so."""

    target: str
    precision: Precision
    outcome: Outcome
    reasons: tuple[str, ...]
    accuracy: Accuracy
    latency: Latency
    executed: dict[str, int]
    environment: Environment
    compiled_key: str
    measured_at: str = field(compare=False)

    @property
    def passed(self) -> bool:
        return self.outcome == "pass"


@dataclass(frozen=True)
class Bundle:
    """A folder that is shipped: the artifact, its ONNX, the manifest and the runner."""

    path: Path
    verdict: Verdict
    size_bytes: int
