"""Evaluation images given again for a bundle: those it was verified on, and its answers for them, paired."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitferry.device import runner
from bitferry.device.arrays import Images, Outputs
from bitferry.device.errors import InputError
from bitferry.device.kept import Kept
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache, dataset, progress
from bitferry.pipeline.data.split import Labels, Split
from bitferry.pipeline.figures import Change
from bitferry.pipeline.measure import accuracy, segmentation
from bitferry.pipeline.measure.accuracy import Terms, paired_change, refuse_strange
from bitferry.pipeline.measure.answers import answers
from bitferry.pipeline.report import record
from bitferry.pipeline.verdict import Built


@dataclass(frozen=True)
class Shown:
    """Those of some images that a bundle was verified on."""

    images: Images
    labels: Labels
    float_answers: Labels
    """The float model's, as recorded in the bundle."""
    float_scores: Outputs | None = None
    """Its scores, where the judged metric needs them."""


def show_again(bundle: Path, manifest: dict[str, Any], data: Path) -> Shown:
    """Find in `data` the images that the bundle was verified on, by their pixels; raise InputError where none is."""
    recorded = record.read_answers(bundle / record.ANSWERS)
    images = _split(manifest, data)
    rows = {digest.tobytes(): i for i, digest in enumerate(recorded.digests)}
    pairs = [(i, rows[digest]) for i, digest in enumerate(images.digests) if digest in rows]
    if not pairs:
        raise InputError(f"none of the {len(images)} images of {data} is one that {bundle} was verified on")
    if len(pairs) < len(images):
        progress.stage("verify", f"{len(images) - len(pairs)} images left out: the bundle was not verified on them")
    pairs = list({row: (i, row) for i, row in reversed(pairs)}.values())  # each once: a repetition proves nothing
    ours, theirs = (np.array(column) for column in zip(*sorted(pairs), strict=True))
    labels, scores = images.labels[ours], recorded.float_scores
    _refuse_other_labels(labels, recorded.labels[theirs], len(manifest["classes"]), data)
    return Shown(
        images.images[ours], labels, recorded.float_answers[theirs], scores if scores is None else scores[theirs]
    )


def _refuse_other_labels(labels: Labels, recorded: Labels, classes: int, data: Path) -> None:
    """Raise InputError where the images have other labels than they were verified with: another proof of something."""
    given = labels
    if labels.ndim == 3:
        given = segmentation.perfect(segmentation.counts(labels.astype(np.uint8), labels, classes))
    others = int((given.reshape(len(given), -1) != recorded.reshape(len(recorded), -1)).any(axis=1).sum())
    if others:
        raise InputError(
            f"{others} of {len(labels)} images of {data} have other labels than those they were verified with; give "
            "the evaluation data as it was, or deploy again with the new labels"
        )


def change_of(answered: Kept, shown: Shown, verified: Built, manifest: dict[str, Any]) -> Change:
    """Pair each answer with the float model's recorded one."""
    labels, before, confidence = shown.labels, shown.float_answers, verified.budget_confidence
    if answered.maps is not None:
        after = segmentation.counts(answered.maps, labels, len(manifest["classes"]))
        exact = segmentation.unpacked(segmentation.perfect(after), before)
        return segmentation.change(verified.budget_metric, exact, after, confidence)
    if shown.float_scores is not None:
        task = runner.task_of(manifest)
        refuse_strange(shown.float_scores, answered.scores)
        options = dict(budget(manifest).get("metric_options") or {})
        own, found = (answers(scores, labels, task) for scores in (shown.float_scores, answered.scores))
        terms = Terms(task, len(manifest["classes"]), options, confidence)
        return accuracy.change(verified.budget_metric, own, found, labels, terms)
    right = record.right(record.chosen(answered.scores, labels), labels)
    name = "top-1" if labels.ndim == 1 else "whole answers"
    return paired_change(name, record.right(before, labels), right, confidence)


def _split(manifest: dict[str, Any], data: Path) -> Split:
    contract, task = Preprocessing.from_json(manifest["preprocessing"]), runner.task_of(manifest)
    with tempfile.TemporaryDirectory() as folder:
        build = cache.Cache(Path(folder) / "build")
        found = dataset.split("evaluation", data, manifest["classes"], contract, build, task=task)
        return Split(
            found.name, np.array(found.images), np.array(found.labels), found.sources, found.digests, found.key
        )


def budget(manifest: dict[str, Any]) -> Mapping[str, Any]:
    """Give the budget of the recipe that a bundle was built from, as its manifest has it."""
    found: Any = manifest
    for name in ("provenance", "recipe", "budget"):
        found = found.get(name, {}) if isinstance(found, Mapping) else {}
    return found if isinstance(found, Mapping) else {}
