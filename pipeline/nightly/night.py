"""The nouns of a nightly matrix: a cell, what it was made from, what came of it in a night, and a finding about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from bitferry.device.errors import InputError
from bitferry.pipeline.report.record import Recorded
from bitferry.pipeline.verdict import Built, Verdict

Samples = Mapping[str, NDArray[np.float32]]
"""Each candidate's name → the seconds of its timed calls, blocks × calls, as they were measured."""

Status = Literal["measured", "reused", "failed"]
"""measured: built and measured in this night, or built for hardware that is not there; reused: nothing it depends on
changed, so an earlier night's result stands; failed: no verdict came of it, and `error` says why."""

ARTIFACT, EAGER, RUNTIME_FLOAT = "artifact", "eager", "runtime float"
"""The candidates' names in `Samples`; the last only where the target has a float32 and is not itself that."""


@dataclass(frozen=True, order=True)
class Cell:
    """One recipe on one target in one precision, `auto` among them."""

    recipe: str
    target: str
    precision: str

    @property
    def name(self) -> str:
        """Give it as a command line has it: `fashion-resnet18/openvino/int8`."""
        return f"{self.recipe}/{self.target}/{self.precision}"

    @property
    def slug(self) -> str:
        """Give it as a file's name."""
        return self.name.replace("/", "--")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read RECIPE/TARGET/PRECISION; raise InputError for anything else."""
        parts = text.split("/")
        if len(parts) != 3 or not all(parts):
            raise InputError(
                f"'{text}' is no cell; expected RECIPE/TARGET/PRECISION, as fashion-resnet18/openvino/int8"
            )
        return cls(*parts)


@dataclass(frozen=True)
class Inputs:
    """What a cell's result depends on, so that a finding can say what changed between two nights."""

    recipe: Mapping[str, str]
    """Each setting by its dotted name, as `preprocessing.mean`, and its value as JSON; paths and comments left out."""
    data: Mapping[str, str]
    """Each split → the sha256 of what its files hold, labels included."""
    weights: str | None
    """sha256 of the file; None where the model is trained here, from `data`."""
    code: str
    """sha256 of bitferry's own source."""
    commit: str | None
    """Of bitferry's source, where git knows it."""
    packages: Mapping[str, str]
    """Every installed distribution → its version."""
    machine: Mapping[str, str]
    """What measured it, as in `cpu`, `isa`, `cpus`, `system`, `python`, `hostname` and `gpu`."""


@dataclass(frozen=True)
class Result:
    """What came of one cell in one night."""

    cell: Cell
    status: Status
    key: str
    """Hash of everything in `inputs` that the answers depend on; equal keys make a result reusable."""
    inputs: Inputs
    kind: str
    """The kind of node that measured it, as `x86-64 avx512_vnni`: only results of one kind are compared in latency."""
    seconds: float
    """Of work on this cell in this night, shared stages left out."""
    attempts: int
    """2 where a machine was at fault the first time; 0 where it was reused."""
    error: str | None = None
    error_kind: Literal["ours", "machine"] | None = None
    """machine: the node died, ran out of memory or disk; ours: anything else."""
    verdict: Built | None = None
    """A Verdict where the artifact was measured."""
    samples: Samples = field(default_factory=dict)
    answers: Recorded | None = None
    measured_at: str | None = None
    """When the result came about, in UTC, ISO 8601; an earlier night's where it was reused."""

    @property
    def measured(self) -> Verdict | None:
        """Give the verdict, where the artifact was measured."""
        return self.verdict if isinstance(self.verdict, Verdict) else None

    @property
    def outcome(self) -> str:
        """Give what a heat map shows: the verdict's outcome, or `failed`."""
        return self.verdict.outcome if self.verdict else "failed"


def disturbed(verdict: Built | None) -> bool:
    """Say whether other processes were busy during the timing, which slows some candidates more than others."""
    return isinstance(verdict, Verdict) and any(one.kind == "other load" for one in verdict.latency.suspicions)


@dataclass(frozen=True)
class Point:
    """One cell in one night in the few figures that trends are about; None for what was not measured."""

    night: str
    cell: Cell
    status: Status
    outcome: str
    kind: str
    key: str
    headline: str
    """The verdict's, or the error."""
    percent: float | None = None
    float_percent: float | None = None
    drop_pp: float | None = None
    drop_lower_pp: float | None = None
    drop_upper_pp: float | None = None
    images: int | None = None
    latency_ms: float | None = None
    """Median of a call of the artifact."""
    baseline_ms: float | None = None
    """Of what it is compared with in the same night: the runtime's own float, or where there is none eager PyTorch."""
    ratio: float | None = None
    """The artifact's time over the baseline's, interleaved in one process: what a slow night leaves as it is."""
    ratio_lower: float | None = None
    ratio_upper: float | None = None
    file_bytes: int | None = None
    memory_bytes: int | None = None
    """Peak of a fresh process that loads the artifact and answers, less that of one that only imports the runtime."""

    @classmethod
    def of(cls, night: str, result: Result) -> Self:
        """Take the figures out of a result."""
        verdict, head = result.measured, result.verdict.headline if result.verdict else result.error or ""
        plain = cls(night, result.cell, result.status, result.outcome, result.kind, result.key, head)
        if verdict is None:
            return plain
        judged, timed = verdict.accuracy.judged, verdict.latency
        speedup = timed.runtime_speedup or timed.speedup
        footprint = timed.artifact.footprint
        return replace(
            plain,
            percent=judged.percent,
            float_percent=judged.float_percent,
            drop_pp=judged.drop_pp,
            drop_lower_pp=judged.drop_lower_pp,
            drop_upper_pp=judged.drop_upper_pp,
            images=verdict.accuracy.images,
            latency_ms=timed.artifact.timing.median_ms,
            baseline_ms=timed.candidates[1 if timed.runtime_speedup else 0].timing.median_ms,
            ratio=1 / speedup.value,
            ratio_lower=1 / speedup.upper,
            ratio_upper=1 / speedup.lower,
            file_bytes=footprint.file_bytes if footprint else None,
            memory_bytes=footprint.peak_memory_bytes - footprint.base_memory_bytes if footprint else None,
        )


@dataclass(frozen=True)
class Finding:
    """What changed about a cell, judged against its reference night."""

    cell: Cell
    kind: Literal["accuracy", "float accuracy", "latency", "size", "memory", "verdict", "failure"]
    severity: Literal["regression", "improvement", "notice"]
    """regression: the exit code tells of it; improvement: the reference may be moved by `bitferry accept`;
    notice: worth a look, proved to be neither."""
    sentence: str
    """What a reader of one line must know, with figures, as in `openvino int8 answers 12 of 4,000 images fewer
    right than on 2026-11-02 (0.30 pp, 0.05 to 0.55)`."""
    before: float | None
    after: float | None
    lower: float | None
    upper: float | None
    """Of the change from before to after, in `unit`, two-sided 95 %."""
    unit: Literal["pp", "ratio", "bytes", ""]
    """ratio: after over before."""
    reference: str
    """The night it is compared with."""
    since: str | None
    """The first night that shows it, where a change point was found."""
    changed: tuple[str, ...]
    """What differs between the two nights, most likely cause first, as in `package pillow 12.0.0 → 12.1.0`."""


@dataclass(frozen=True)
class Night:
    """One run of the matrix."""

    id: str
    """When it began, in UTC, as `2026-11-22T02:00:00Z`: also its name everywhere."""
    results: tuple[Result, ...]
    findings: tuple[Finding, ...]
    seconds: float
    finished: bool
    """False where it was stopped; the next `bitferry matrix` goes on with it."""

    @property
    def regressed(self) -> bool:
        return any(one.severity == "regression" for one in self.findings)
