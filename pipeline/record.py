"""What a verification leaves behind: `verdict.json`, the answers image by image, and `report.html`."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from device.arrays import Outputs
from device.errors import InputError
from pipeline import cache, page, verdict
from pipeline.answers import answers
from pipeline.artifacts import Labels, Verified
from pipeline.verdict import SCHEMA, Verdict

VERDICT, ANSWERS, REPORT = "verdict.json", "answers.npz", "report.html"
VERDICTS = TypeAdapter(Verdict)


@dataclass(frozen=True)
class Recorded:
    """What was answered for each evaluation image; a class index, or for multi-label models 0 or 1 per class."""

    digests: NDArray[np.uint8]
    """N×32: the sha256 of each image's pixels."""
    labels: Labels
    float_answers: Labels
    answers: Labels

    @property
    def float_right(self) -> NDArray[np.bool_]:
        return right(self.float_answers, self.labels)

    @property
    def right(self) -> NDArray[np.bool_]:
        return right(self.answers, self.labels)


def write(verified: Verified, build: cache.Cache) -> Path:
    """Write the record of one target and precision into the build folder, replacing the last one; give the report."""
    found = verified.verdict
    final = build.root / "reports" / f"{found.target}-{found.precision}"
    others = [other for path in sorted(final.parent.glob(f"*/{VERDICT}")) if (other := _sibling(path, found))]
    temporary = final.with_name(f".{final.name}")
    with cache.locked(build.root / ".reports.lock", "report"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_figures(verified, temporary)
        images = {worst.index: verified.evaluation.images[worst.index] for worst in found.accuracy.worst}
        page.write(found, images, temporary / REPORT, others=others)
        cache.publish(temporary, final)
    return final / REPORT


def write_figures(verified: Verified, folder: Path, *, private: bool = True) -> None:
    """Write `verdict.json` and the answers; without paths of this machine unless `private`."""
    found = verified.verdict
    verdict.write(found if private else _public(found), folder / VERDICT)
    evaluation = verified.evaluation
    np.savez_compressed(
        folder / ANSWERS,
        digests=np.frombuffer(b"".join(evaluation.digests), np.uint8).reshape(len(evaluation), -1),
        labels=_small(evaluation.labels),
        float_answers=_small(chosen(verified.float_scores, evaluation.labels)),
        answers=_small(chosen(verified.scores, evaluation.labels)),
    )


def read_verdict(path: Path) -> Verdict:
    """Read a `verdict.json`; raise InputError when it is none, or of another schema."""
    try:
        text = path.read_bytes()
        schema = json.loads(text).get("schema")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no verdict: {error}") from error
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}; this bitferry reads schema {SCHEMA}: verify again")
    try:
        return VERDICTS.validate_json(text)
    except ValidationError as error:
        raise InputError(
            f"{path} is damaged: {error.error_count()} faults, the first in {error.errors()[0]['loc']}"
        ) from None


def read_answers(path: Path) -> Recorded:
    """Read the answers beside a verdict."""
    try:
        with np.load(path) as arrays:
            return Recorded(*(arrays[name].astype(np.int64) if name != "digests" else arrays[name] for name in NAMES))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


NAMES = ("digests", "labels", "float_answers", "answers")


def _public(found: Verdict) -> Verdict:
    worst = tuple(replace(one, source=Path(one.source).name) for one in found.accuracy.worst)
    command = " ".join(Path(word).name if "/" in word else word for word in found.command.split(" "))
    return replace(found, accuracy=replace(found.accuracy, worst=worst), command=command)


def _sibling(path: Path, found: Verdict) -> Verdict | None:
    """Give the verdict of another target or precision on the same model and data; None if it is another's or older."""
    try:
        other = read_verdict(path)
    except InputError:
        return None
    same = (other.recipe, other.version, other.data_key) == (found.recipe, found.version, found.data_key)
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
