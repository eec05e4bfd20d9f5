"""What a verification leaves behind: `verdict.json`, the answers image by image, and `report.html`."""

import json
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from bitferry.device import pixels
from bitferry.device.arrays import Images, Outputs
from bitferry.device.errors import InputError, first_line
from bitferry.pipeline import cache, verdict
from bitferry.pipeline.artifacts import Unmeasured, Verified
from bitferry.pipeline.data.sample import VIEWS_JOINED
from bitferry.pipeline.data.split import Labels
from bitferry.pipeline.measure import segmentation
from bitferry.pipeline.measure.answers import answers
from bitferry.pipeline.report import page
from bitferry.pipeline.verdict import SCHEMA, Built, Verdict

VERDICT, ANSWERS, REPORT = "verdict.json", "answers.npz", "report.html"
VERDICTS, BUILT = TypeAdapter(Verdict), TypeAdapter(Built)


@dataclass(frozen=True)
class Recorded:
    """What was answered for each evaluation image; a class index, or for multi-label models 0 or 1 per class.

    For segmentation N×K×2: pixels of each class rightly answered, and answered; `labels` are those of a perfect answer.
    """

    digests: NDArray[np.uint8]
    """N×16: the first half of the sha256 of each image's pixels."""
    labels: Labels
    float_answers: Labels
    answers: Labels | None = None
    """None where the artifact was built and not measured."""
    float_scores: Outputs | None = None
    """The float model's scores N×K; None where the judged metric is one of the answers alone, or they are too many."""

    @property
    def float_right(self) -> NDArray[np.bool_]:
        return right(self.float_answers, self.labels)

    @property
    def right(self) -> NDArray[np.bool_]:
        if self.answers is None:
            raise InputError("this artifact was built and not measured: it has no answers to compare")
        return right(self.answers, self.labels)


def write(verified: Verified | Unmeasured, build: cache.Cache) -> Path:
    """Write the record of one target and precision into the build folder, replacing the last one; give the report."""
    found = verified.verdict
    final = build.root / "reports" / f"{found.target}-{found.precision}"
    temporary = final.with_name(f".{final.name}")
    with cache.locked(build.root / ".reports.lock", "report"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_figures(verified, temporary)
        _write_page(verified, temporary / REPORT, sorted(final.parent.glob(f"[!.]*/{VERDICT}")))
        cache.publish(temporary, final)
    return final / REPORT


def _write_page(verified: Verified | Unmeasured, path: Path, siblings: Sequence[Path]) -> None:
    if isinstance(verified, Unmeasured):
        page.write_built(verified.verdict, path)
        return
    found = verified.verdict
    others = [other for sibling in siblings if (other := _sibling(sibling, found))]
    images = {worst.index: _picture(verified, worst.index) for worst in found.accuracy.worst}
    page.write(found, images, path, others=others)


def _picture(verified: Verified, index: int) -> Images:
    """Put the views of one answer side by side, and any masks with them: of truth, float model and artifact."""
    evaluation = verified.evaluation
    image = evaluation.images[index]
    views = np.concatenate(list(image), axis=1) if image.ndim == 4 else image
    if not verified.maps:
        return views
    masks = [np.asarray(pixels.picture(one[index]).convert("RGB")) for one in (evaluation.labels, *verified.maps)]
    return page.grid([views, *masks])


def write_figures(verified: Verified | Unmeasured, folder: Path, *, private: bool = True) -> None:
    """Write `verdict.json` and the answers; without paths of this machine unless `private`."""
    found = verified.verdict
    verdict.write(found if private else _public(found), folder / VERDICT)
    evaluation = verified.evaluation
    scores = [verified.float_scores, *([verified.scores] if isinstance(verified, Verified) else [])]
    labels, given = evaluation.labels, [chosen(one, evaluation.labels) for one in scores if not verified.maps]
    if verified.maps:
        counts = [segmentation.counts(one, labels, scores[0].shape[1]) for one in verified.maps]
        labels, given = segmentation.perfect(counts[0]), [segmentation.packed(one) for one in counts]
    arrays: dict[str, Any] = dict(zip(NAMES[1:], map(_small, (labels, *given)), strict=False))
    if not verified.maps and found.budget_metric != "top-1" and scores[0].nbytes <= MOST_SCORES:
        arrays[SCORES] = scores[0].astype(np.float32)
    digests = np.frombuffer(b"".join(evaluation.digests), np.uint8).reshape(len(evaluation), -1)
    np.savez_compressed(folder / ANSWERS, digests=digests, **arrays)


def read_verdict(path: Path) -> Verdict:
    """Read a measured `verdict.json`; raise InputError when it is none, or was not measured."""
    found = read_built(path)
    if not isinstance(found, Verdict):
        remedy = "`bitferry verify BUNDLE --data IMAGES` measures it where it runs, into the bundle's manifest"
        raise InputError(f"{path} holds no measurement: {found.headline}; {remedy}")
    return found


def read_built(path: Path) -> Built:
    """Read a `verdict.json`, a Verdict where the artifact was measured.

    Raises InputError when it is none, or of another schema.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} is no verdict: {first_line(error)}") from error
    return parsed(text, str(path))


def parsed(text: bytes, place: str) -> Built:
    """Read the text of a `verdict.json`, which is kept at `place`; raise InputError as `read_built` does."""
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is no verdict: {first_line(error)}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{place} has schema {schema!r}; this bitferry reads schema {SCHEMA}: verify again")
    kind: TypeAdapter[Built] | TypeAdapter[Verdict] = BUILT if found["outcome"] == "unmeasured" else VERDICTS
    try:
        built = kind.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        told = f"{error.error_count()} faults, the first in {field or 'its nesting'}: {first['msg']}"
        raise InputError(f"{place} is damaged: {told}") from None
    if isinstance(built, Verdict) and not (
        built.latency.candidates and min(built.latency.speedup.lower, built.latency.speedup.value) > 0
    ):
        raise InputError(f"{place} is damaged: it holds no speed-up of one candidate over another")
    return built


def _refuse(token: str) -> float:
    raise ValueError(f"{token} is no number of JSON")


def read_answers(path: Path) -> Recorded:
    """Read the answers beside a verdict."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
                raise InputError(f"{path} unpacks to more than {MOST_BYTES / 1e9:g} GB; it is not one of bitferry's")
        with np.load(path) as arrays:
            return recorded(arrays, str(path))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def recorded(arrays: Mapping[str, NDArray[Any]], place: str) -> Recorded:
    """Take the answers out of the arrays kept at `place`; raise KeyError or InputError when they are none."""
    names = [name for name in NAMES if name in arrays or name != "answers"]
    found: list[Any] = [arrays[name].astype(np.int64) if name != "digests" else arrays[name] for name in names]
    if (
        any(array.ndim == 0 for array in found)
        or len({array.shape[:1] for array in found}) != 1
        or len({array.shape for array in found[1:]}) != 1
    ):
        raise InputError(f"{place} is damaged: its arrays are not of the same images")
    scores = arrays[SCORES].astype(np.float32) if SCORES in arrays else None
    if scores is not None and (scores.ndim != 2 or len(scores) != len(found[0]) or not np.isfinite(scores).all()):
        raise InputError(f"{place} is damaged: its scores are not those of the same images")
    return replace(Recorded(*found), float_scores=scores)


MOST_BYTES, MOST_SCORES = 500_000_000, 64_000_000
SCORES = "float_scores"
NAMES = ("digests", "labels", "float_answers", "answers")


def _public(found: Built) -> Built:
    command = shlex.join(Path(word).name for word in shlex.split(found.command))
    rungs = tuple(replace(one, missing=one.missing and _placeless(one.missing)) for one in found.ladder.rungs)
    if isinstance(found, Verdict):
        worst = tuple(replace(one, source=_file_names(one.source)) for one in found.accuracy.worst)
        found = replace(found, accuracy=replace(found.accuracy, worst=worst))
    return replace(found, ladder=replace(found.ladder, rungs=rungs), command=command)


def _file_names(source: str) -> str:
    return VIEWS_JOINED.join(Path(view).name for view in source.split(VIEWS_JOINED))


def _placeless(text: str) -> str:
    return " ".join(Path(word).name if "/" in word else word for word in text.split(" "))


def _comparable(found: Verdict) -> tuple[object, ...]:
    environment = found.environment
    return (found.model_key, found.data_key, found.latency.threads, environment.system, environment.isa)


def _sibling(path: Path, found: Verdict) -> Verdict | None:
    """Give the verdict of another target or precision on the same model and data; None if it is another's or older."""
    try:
        other = read_verdict(path)
    except InputError:
        return None
    same = _comparable(other) == _comparable(found)
    return other if same and (other.target, other.precision) != (found.target, found.precision) else None


def chosen(scores: Outputs, labels: Labels) -> Labels:
    """Turn scores N×K into class indices N, or for multi-label data into 0 and 1, N×K."""
    return answers(scores, labels, "classification" if labels.ndim == 1 else "multilabel").chosen


def right(chosen: Labels, labels: Labels) -> NDArray[np.bool_]:
    """Say of each image whether its whole answer is right."""
    same = np.asarray(chosen == labels).reshape(len(labels), -1)
    return np.asarray(same.all(axis=1))


def _small(labels: Labels) -> NDArray[np.int32]:
    return labels.astype(np.int32)
