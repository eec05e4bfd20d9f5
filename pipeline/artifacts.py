"""The nouns: one frozen value per stage output, so that stages fit together in one order only.

Each carries the `key` of what it was made from (see `cache.py`). Models that a later run may need are files;
they are loaded when a stage asks for them, not before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bitferry import targets
from bitferry.device.arrays import Outputs
from bitferry.device.pixels import Maps
from bitferry.device.preprocess import Preprocessing
from bitferry.device.timing import Series
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.verdict import Built, Verdict
from bitferry.targets import Options, Precision, Scheme

if TYPE_CHECKING:
    from torch import nn

    from bitferry.pipeline.training.record import Record


@dataclass(frozen=True)
class Weights:
    """A state dict as safetensors, trained here."""

    path: Path
    key: str


class Program(Protocol):
    """A model that can answer: float or quantized, PyTorch's or an ONNX file's."""

    @property
    def key(self) -> str: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def quantized(self) -> bool: ...
    @property
    def baseline(self) -> "Baseline":
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
    quantized = False
    record: "Record | None" = None
    """What the file of weights says that they reach."""
    name, timed_as = "float PyTorch", "eager PyTorch"
    """What a report calls it, and its time."""

    @property
    def baseline(self) -> "FloatModel":
        return self

    def module(self) -> "nn.Module":
        return self.eager


@dataclass(frozen=True)
class FloatOnnx:
    """The float baseline of a recipe that gives an ONNX file, with the contract's arithmetic in front of its graph."""

    path: Path
    given: Path
    """The file as the recipe names it."""
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    key: str
    batch: int | None = None
    """What the graph fixes; None for any."""
    precision: Precision = "float32"
    quantized = False
    record = None
    name, timed_as = "float ONNX", "float ONNX by ONNX Runtime"

    @property
    def baseline(self) -> "FloatOnnx":
        return self

    def module(self) -> "nn.Module":
        from bitferry.pipeline.onnx_in.session import Session  # noqa: PLC0415 - this file stays free of torch

        return Session(self.path)


Baseline = FloatModel | FloatOnnx


@dataclass(frozen=True)
class Calibration:
    """The images that a quantized program was calibrated on."""

    images: int
    """That went through, to fit on or to validate."""
    given: int
    sqnr_db_by_count: Mapping[str, float]
    """SQNR on the validation images by the count fitted on, where that was searched; else empty."""
    validation: int = 0
    """Of `images`, those that judged; 0 where there were too few to divide. Ranges may have seen them in the end."""


@dataclass(frozen=True)
class Quantized:
    """A PyTorch int8 program made by PT2E for one scheme, as a `.pt2` file."""

    path: Path
    baseline: FloatModel
    scheme: Scheme
    calibration: Calibration
    key: str
    precision: Precision = "int8"
    """float8 where a target makes that of the int8 program."""
    float_counterpart: Path | None = None
    """The program without its grids: the same layers, equalized where they were, their batch norms folded."""
    kept: tuple[str, ...] = ()
    """Layers that were to stay float."""
    quantized = True

    def module(self) -> "nn.Module":
        from bitferry.pipeline.capture import read_program  # noqa: PLC0415 - this file stays free of torch

        return read_program(self.path)


@dataclass(frozen=True)
class QuantizedOnnx:
    """An int8 ONNX file (Q/DQ) made by ONNX Runtime's quantizer for one scheme."""

    path: Path
    baseline: FloatOnnx
    simplified: Path
    """The float file that it was made of, node by node."""
    scheme: Scheme
    calibration: Calibration
    key: str
    precision: Precision = "int8"
    """float8 where a target makes that of the int8 file."""
    kept: tuple[str, ...] = ()
    """Layers that were to stay float."""
    quantized = True

    def module(self) -> "nn.Module":
        from bitferry.pipeline.onnx_in.session import Session  # noqa: PLC0415 - this file stays free of torch

        return Session(self.path, rewritten=False)


TorchProgram = FloatModel | Quantized
"""What can be traced, captured and exported."""


@dataclass(frozen=True)
class Traced:
    """A TorchScript file whose answers equal those of the program it was traced from."""

    path: Path
    precision: Precision
    key: str
    batch: int | None = None
    """1 where tracing fixed it; None for any."""


@dataclass(frozen=True)
class Captured:
    """A torch.export program as a `.pt2` file, batch dynamic."""

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
    source: "Source"
    options: Options
    """It is compiled, verified and run on the device with these; the number of threads is always given."""
    key: str

    @property
    def threads(self) -> int:
        return self.options.threads or 1

    @property
    def batch(self) -> int:
        """Images of one call; 1 where any number goes."""
        return 1 if self.options.batch == "dynamic" else self.options.batch

    @property
    def environment(self) -> targets.Environment:
        """Say what it is tied to, as this machine has it."""
        return targets.get(self.target).environment(options=self.options)


Source = Simplified | Traced | Captured
"""What targets compile from."""


@dataclass(frozen=True)
class Verified:
    """A verdict with the answers it was drawn from, image by image."""

    verdict: Verdict
    float_scores: Outputs
    scores: Outputs
    golden_scores: Outputs
    """Of the golden files, in their order, from a fresh process."""
    golden: Path
    """The folder of golden files."""
    evaluation: Split
    maps: tuple[Maps, ...] = ()
    """The classes of all pixels, N×H×W, as the float model and the artifact say; of segmentation alone, whose scores
    are those of a few pixels."""
    series: tuple[Series, ...] = ()
    """Every timed call, in the order of the verdict's candidates."""

    def _repr_html_(self) -> str:
        """Show its verdict in a notebook, with the images whose answers changed most."""
        return _shown(self)


@dataclass(frozen=True)
class Unmeasured:
    """An artifact that this machine can build and cannot run, with what another one needs to judge it."""

    verdict: Built
    float_scores: Outputs
    golden_scores: Outputs
    """Of the last step that runs here."""
    golden: Path
    evaluation: Split
    maps: tuple[Maps, ...] = ()
    """As in `Verified`; the float model's alone."""

    def _repr_html_(self) -> str:
        """Show its verdict in a notebook."""
        return _shown(self)


@dataclass(frozen=True)
class Bundle:
    """A folder that is shipped: the artifact, its ONNX, the manifest and the runner."""

    path: Path
    verified: Verified | Unmeasured
    size_bytes: int

    def _repr_html_(self) -> str:
        """Show its verdict in a notebook, and where it lies."""
        return _shown(self.verified, self)


def _shown(verified: Verified | Unmeasured, bundle: Bundle | None = None) -> str:
    """Give a verdict as HTML, with the images that changed most where one answer is about one image."""
    from bitferry.pipeline.report import fragment  # noqa: PLC0415 - which knows these nouns

    found, images = verified.verdict, verified.evaluation.images
    shown = {one.index: images[one.index] for one in found.accuracy.worst} if isinstance(found, Verdict) else {}
    flat = {index: image for index, image in shown.items() if image.ndim == 3}
    where = (bundle.path, bundle.size_bytes) if bundle else (None, 0)
    return fragment.html(found, images=flat, path=where[0], size_bytes=where[1])
