"""What verification concluded: the nouns of `verdict.json` and how it is written; its figures are in figures.py."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from bitferry.pipeline.figures import Accuracy, Latency, Ratio
from bitferry.targets import Environment, Layer, Precision

SCHEMA = 3
"""Of verdict.json; it rises when a field changes its meaning or goes (docs/verdict.md)."""

Outcome = Literal["pass", "fail", "undecided", "unmeasured"]


@dataclass(frozen=True)
class Execution:
    """What precision each layer was really run in."""

    summary: str
    """As in `int8 requested; 52 of 53 convolutions int8, 1 float32 (features.1)`."""
    layers: tuple[Layer, ...]
    float_summary: str | None
    """The same for the runtime's float; None where it was not measured."""


@dataclass(frozen=True)
class Rung:
    """The same images through one step of the way from the float model to the artifact."""

    name: str
    sqnr_db: float | None
    """Of the scores, against the float model; None for equal scores, and where `missing` says why."""
    flipped: int
    """Answers that differ from the float model's; for segmentation pixels, of those compared."""
    percent: float
    """Top-1, whole multi-label answers, or for segmentation pixels."""
    noise_added: float
    """Noise power over signal power that this rung added to the one before it; negative where it took some away."""
    missing: str | None = None
    """Why it could not be measured."""


@dataclass(frozen=True)
class LayerError:
    """What quantization does to one layer's output, against the float model's."""

    name: str
    sqnr_db: float | None
    """With the error of all layers before it."""
    own_sqnr_db: float | None
    """Of this layer alone: its quantized weights and input, fed what the float model computes; None when equal."""


@dataclass(frozen=True)
class Ladder:
    """Where accuracy is lost between the float model and the artifact."""

    images: int
    rungs: tuple[Rung, ...]
    lost_most: str | None
    """The rung that added most noise; None when none added any."""
    suspects: tuple[str, ...]
    """Rungs that should change nothing and did."""
    layers: tuple[LayerError, ...]
    """In the order they run; empty where nothing was quantized."""
    pixels: int | None = None
    """How many pixels' classes are compared, spread evenly over the images; segmentation only."""
    layer_images: int | None = None
    """Of these images, spread evenly, how many `layers` is of; None where nothing was quantized."""

    @property
    def worst_layers(self) -> tuple[LayerError, ...]:
        """Give the three layers with the largest error of their own, worst first."""
        noisy = [layer for layer in self.layers if layer.own_sqnr_db is not None]
        return tuple(sorted(noisy, key=lambda layer: layer.own_sqnr_db or 0.0)[:3])


@dataclass(frozen=True)
class Blame:
    """How much of the scores' error goes when one layer is computed in float."""

    name: str
    noise: float
    """As a share of the scores' power; negative where the error grows."""


@dataclass(frozen=True)
class Weighed:
    """One candidate of a search."""

    name: str
    """As in `int8`, `int8, 4 layers in float` or `bfloat16, 1 thread`."""
    precision: Precision
    keep: tuple[str, ...]
    """Layers that stay float: what `quantization.keep` in a recipe would be."""
    threads: int
    ms: float
    """Median of a call, timed with the others."""
    over_chosen: Ratio | None
    """Its time over that of the chosen one."""
    sqnr_db: float | None
    """Of the scores of `Search.images` calibration images; None where they equal the float model's."""
    file_bytes: int
    outcome: Outcome | None
    """Of its accuracy on the evaluation data; None where it was not judged, a faster one being inside the budget."""
    drop_upper_pp: float | None
    confidence: float | None
    """Of that bound: each look at the evaluation data spends half of what the ones before have left."""
    pareto: bool
    """Whether no other is as fast, as near to the float model and as small."""
    chosen: bool


@dataclass(frozen=True)
class Search:
    """What `precision = "auto"` weighed, fastest first, and why it chose what it chose."""

    reason: str
    weighed: tuple[Weighed, ...]
    looks: int
    """Candidates that were judged on the evaluation data."""
    seconds: float
    left_out: tuple[str, ...] = ()
    """Candidates that could not be built or do not run as asked, each with why."""
    images: int | None = None
    """Calibration images that each candidate's `sqnr_db` is of: those that validated int8, where there are any."""

    @property
    def lost(self) -> str | None:
        """Say why no int8 was weighed, where it was tried; None where one was."""
        tried = [one for one in self.left_out if one.startswith("int8")]
        weighed = any(one.precision == "int8" for one in self.weighed)
        return None if weighed or not tried else f"int8 could not be had ({tried[0].partition(': ')[2]})"


@dataclass(frozen=True)
class GoldenFile:
    """One image file through the whole path: bytes in, scores out."""

    name: str
    kind: str
    """As in `JPEG`, `grey PNG` or `JPEG turned by EXIF`."""
    score_difference: float
    """Largest difference of the scores between the shipped code in a fresh process and this one, as a share of the
    largest score; for segmentation, of the scores of a few pixels."""
    torchvision_mean: float | None
    """Mean difference of the pixels from torchvision's own decoding and resizing, in levels of 255; None where
    torchvision has no such resampling."""
    torchvision_max: float | None


@dataclass(frozen=True)
class Golden:
    """Image files that the artifact was proved on, and that travel with it."""

    files: tuple[GoldenFile, ...]
    score_limit: float
    """Largest score difference allowed on another machine, as a share of the largest score."""
    torchvision_limit: float
    """Largest mean pixel difference allowed, in levels."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """One artifact and where it comes from: all that is known of one that the machine which built it cannot run."""

    schema: int
    recipe: str
    version: str
    target: str
    precision: Precision
    outcome: Outcome
    headline: str
    """The verdict in words."""
    reasons: tuple[str, ...]
    budget_metric: str
    """The judged metric."""
    budget_confidence: float
    budget_drop_pp: float
    ladder: Ladder
    golden: Golden
    environment: Environment
    versions: dict[str, str]
    command: str
    """What repeats it."""
    compiled_key: str
    model_key: str
    """Of the float model: its architecture, weights and preprocessing."""
    data_key: str
    """Of the evaluation images and labels, by content."""
    measured_at: str
    search: Search | None = None
    """What was weighed, where the precision was left open."""

    @property
    def passed(self) -> bool:
        return self.outcome == "pass"

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        from bitferry.pipeline.report import fragment  # noqa: PLC0415 - which knows verdicts

        return fragment.html(self)


@dataclass(frozen=True, kw_only=True)
class Verdict(Built):
    """Whether one artifact is inside the recipe's budget, with the figures that say so."""

    accuracy: Accuracy
    latency: Latency
    execution: Execution


def searched(verdict: Verdict, search: Search | None) -> Verdict:
    """Give a verdict with the search that led to it; its headline says so where int8 was lost on the way."""
    lost = f"; {search.lost}" if search and search.lost else ""
    return replace(verdict, search=search, headline=verdict.headline + lost)


def write(verdict: Built, path: Path) -> None:
    """Write `verdict.json`."""
    path.write_text(json.dumps(fields(verdict), indent=2, allow_nan=False) + "\n")


def fields(verdict: Built) -> dict[str, object]:
    """Give the verdict as what JSON can hold."""
    return asdict(verdict) | {"passed": verdict.passed}


@dataclass(frozen=True)
class Failed:
    """A target for which a stage failed, beside others that went on."""

    target: str
    precision: str
    """As the recipe has it, which may be auto."""
    error: str
