"""The figures of a verdict: answers, latencies and sizes as they were measured, each documented here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Change:
    """One metric of the float model and of the artifact on the same images, in percent."""

    metric: str
    """`top-1`, `top-5`, `mAP`, `AUC`, `mIoU`, `pixel accuracy`, or `torchmetrics:` and a class name."""
    method: Literal["tango", "bootstrap"]
    """How the bounds were found: Tango's score interval of paired counts, or a paired bootstrap over images."""
    float_percent: float
    percent: float
    drop_pp: float
    """Percentage points that the artifact is worse: `float_percent` − `percent`, or the reverse for a metric that is
    better when lower."""
    drop_lower_pp: float
    drop_upper_pp: float
    """One-sided confidence bounds of the drop, each at `confidence`."""
    confidence: float
    higher_is_better: bool = True


@dataclass(frozen=True)
class Flips:
    """Image by image, where the float model and the artifact differ. A multi-label answer is right when it is whole."""

    lost: int
    """Images the float model gets right and the artifact does not; of maps, those with fewer right pixels."""
    gained: int
    """Images the artifact gets right and the float model does not; of maps, those with more right pixels."""
    flipped: int
    """Images on which the two answers differ, right or wrong, be it in one pixel."""
    mcnemar_p: float
    """Two-sided mid-p McNemar test of lost = gained."""
    pixels_percent: float | None = None
    """Pixels that count whose class differs; segmentation only."""


@dataclass(frozen=True)
class ClassChange:
    """One class before and after: recall in percent of its images; average precision for multi-label models, and
    intersection over union for segmentation."""

    name: str
    images: int
    """Evaluation images that are of this class."""
    float_percent: float | None
    """None where the class has too few images for the measure."""
    percent: float | None
    auc_float_percent: float | None = None
    """Area under the ROC curve; multi-label models only."""
    auc_percent: float | None = None


@dataclass(frozen=True)
class Confusion:
    """How often images of one class were answered as another, before and after."""

    truth: str
    answer: str
    float_images: int
    images: int


@dataclass(frozen=True)
class Bin:
    """Answers whose confidence lies between two values."""

    images: int
    confidence_percent: float
    """Mean confidence of the answers in it."""
    right_percent: float


@dataclass(frozen=True)
class Reliability:
    """Whether confidence means what it says: expected calibration error over 15 equal-width bins (Guo et al. 2017)."""

    float_ece_percent: float
    ece_percent: float
    float_confidence_percent: float
    """Mean confidence of the float model's answers."""
    confidence_shift_pp: float
    """Mean confidence of the artifact's answers − that of the float model's."""
    float_bins: tuple[Bin, ...]
    """Non-empty bins, lowest confidence first."""
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class WorstImage:
    """An evaluation image whose answer changed most, by the largest change of a class's probability; for segmentation
    by the share of its pixels whose class changed."""

    index: int
    """Position in the evaluation data."""
    source: str
    truth: str
    float_answer: str
    float_confidence_percent: float
    answer: str
    confidence_percent: float
    """Of the answer; for segmentation the share of the pixels that are right, and likewise above."""
    change_pp: float
    """Largest change of any class's probability; for segmentation the share of pixels whose class changed."""


@dataclass(frozen=True)
class Accuracy:
    """Everything about the answers: float model and artifact on the same images, paired."""

    images: int
    judged: Change
    """The metric the budget is about."""
    others: tuple[Change, ...]
    flips: Flips
    classes: tuple[ClassChange, ...]
    confusions: tuple[Confusion, ...]
    """Pairs of different classes whose count changed most, at most 20; for classification only."""
    reliability: Reliability
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio of the scores against the float model's; None when they are equal. For
    segmentation, of the scores of a few pixels of each image."""
    worst: tuple[WorstImage, ...]
    """The images whose answers changed most, worst first, twelve at most."""
    further_images: int | None = None
    """When undecided: how many further images would decide it with 80 % power if the observed rates are the true
    ones; None when it is decided, or when no count up to 100 million would."""


@dataclass(frozen=True)
class Percentile:
    """A latency that `percent` of the calls stay under."""

    percent: int
    ms: float
    at_most_ms: float
    """Upper bound at 99 % confidence: the order statistic of MLPerf's early stopping."""


@dataclass(frozen=True)
class Timing:
    """Calls at batch 1, warm-up left out, tails kept."""

    samples: int
    blocks: int
    percentiles: tuple[Percentile, ...]
    """50, 90 and 99, each only where the samples support it (11, 64 and 662)."""
    fastest_tenth_ms: float
    """10th percentile: what the candidate does when nothing disturbs it."""
    median_ms: float
    mean_ms: float
    cov_percent: float
    """Coefficient of variation of all samples."""
    first_ms: float
    """The very first call."""
    warm_up_calls: int
    histogram_ms: tuple[tuple[float, int], ...]
    """Upper edge of each bin and its number of calls; the last edge is the slowest call."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with a two-sided 95 % bootstrap interval over blocks; above 1 the artifact is faster."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Throughput:
    """Images per second with several streams or images at once."""

    images_per_second: float
    streams: int
    """Calls in flight."""
    threads: int
    """Threads of each stream."""
    batch: int


@dataclass(frozen=True)
class Footprint:
    """What a fresh process uses that only loads the artifact and answers for one image."""

    file_bytes: int
    """The artifact with the files that belong to it."""
    load_ms: float
    """From the runtime imported to the model ready."""
    first_answer_ms: float
    peak_memory_bytes: int
    """Of the whole process."""
    base_memory_bytes: int
    """Of the process with the runtime imported and nothing loaded."""


@dataclass(frozen=True)
class Suspicion:
    """What may have disturbed the measurement, and what to do about it."""

    kind: Literal["other load", "noise", "drift", "first run", "clock", "threads", "kernels"]
    finding: str
    remedy: str


@dataclass(frozen=True)
class Candidate:
    """One way to run the model, timed with the others."""

    name: str
    """As in `eager PyTorch float32`, `float ONNX by ONNX Runtime float32` or `openvino int8`."""
    precision: str
    """The precision that really ran, as in `int8` or `bfloat16`; `mixed` has no layer majority."""
    accuracy_percent: float | None
    """The judged metric; None where it was not measured."""
    timing: Timing
    throughput: Throughput | None
    footprint: Footprint | None


@dataclass(frozen=True)
class Latency:
    """The candidates interleaved in one process, in random order per block, with the same thread count."""

    threads: int
    batch: int
    """Images of one call; every time is of a whole call."""
    seconds: float
    """How long was spent on timing."""
    candidates: tuple[Candidate, ...]
    """The float model first, then the same runtime's float where it has one, the artifact last."""
    speedup: Ratio
    """The float model (eager PyTorch, or the recipe's ONNX by ONNX Runtime) over the artifact."""
    runtime_speedup: Ratio | None
    """The same runtime's float over the artifact."""
    suspicions: tuple[Suspicion, ...]

    @property
    def artifact(self) -> Candidate:
        return self.candidates[-1]

    @property
    def eager(self) -> Candidate:
        return self.candidates[0]

    @property
    def baseline(self) -> str:
        """Name the float model in a sentence, as `eager float`, or `float ONNX` where the recipe gives a file."""
        return "eager float" if self.eager.name.startswith("eager") else " ".join(self.eager.name.split()[:2])
