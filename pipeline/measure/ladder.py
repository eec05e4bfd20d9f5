"""The same images through every step from the float model to the artifact, to name the one that loses accuracy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bitferry.device import pixels
from bitferry.device.arrays import Images, Outputs, Predict
from bitferry.device.errors import first_line
from bitferry.pipeline import progress
from bitferry.pipeline.data.split import Labels, Split
from bitferry.pipeline.measure.answers import Answers, answers, flips, of_pixels
from bitferry.pipeline.statistics import noise_share, sqnr_db
from bitferry.pipeline.verdict import Ladder, LayerError, Rung

PIXELS, FEWEST, MOST = 3_200_000, 64, 512
"""How many images are taken: as many as have this many pixels together, within bounds."""
BATCH_PIXELS = 1_600_000
SHOULD_LOSE_NOTHING = 2.0
"""A rung after quantization is suspect where noise grows by this factor (3 dB): two right int8 programs differ from
each other, rounding ties falling either way, but stay as far from the float model as each other."""
FLOAT_NOISE = 1e-6
"""Noise (60 dB below the signal) that a float rung may add by summing in another order."""


@dataclass(frozen=True)
class Step:
    """One way to run the model between the float model and the artifact."""

    key: str
    """Of what it runs, so that targets share the answers of the steps they share."""
    load: Callable[[], Predict]
    rounds: bool = False
    """Whether it is the one that quantizes."""


Steps = Mapping[str, Step]
Answering = Callable[[str, Step, Images], Outputs]


def answer(name: str, step: Step, images: Images) -> Outputs:
    """Load a step and send the images N×H×W×3 through it, in small batches; of maps a few pixels' scores are kept."""
    predict = step.load()
    batch = max(1, BATCH_PIXELS // (images[0].size // 3))
    starts = range(0, len(images), batch)
    tracked = progress.track(starts, f"ladder: {name}", total=len(starts))
    return np.concatenate([pixels.thin(predict(images[i : i + batch].copy())) for i in tracked])


@dataclass(frozen=True)
class Sample:
    """The images of a ladder, spread evenly over the evaluation data, with the float model's scores for them."""

    images: Images
    labels: Labels
    """Of masks, those pixels whose scores are kept, N×P."""
    baseline: Outputs
    of: str = "float PyTorch"
    """What the float model is."""


def sample(evaluation: Split, baseline: Outputs, of: str = Sample.of) -> Sample:
    """Take images for a ladder; `baseline` holds the float model's scores N×K, or those kept of maps N×K×P."""
    wanted = int(np.clip(PIXELS // (evaluation.images[0].size // 3), FEWEST, MOST))
    picked = np.unique(np.linspace(0, len(evaluation) - 1, min(wanted, len(evaluation))).astype(int))
    labels = evaluation.labels[picked]
    if baseline.ndim == 3:
        labels = pixels.thin_masks(labels, baseline.shape[1])
    return Sample(evaluation.images[picked], labels, baseline[picked], of)


def climb(
    sample: Sample,
    steps: Steps,
    *,
    lossy: str | None,
    layers: tuple[LayerError, ...] = (),
    answering: Answering = answer,
) -> Ladder:
    """Send the sample through each step, named in order; `lossy` names the one that may lose, None when none may.

    A step that cannot be loaded is kept with the reason. Noise is measured from the float model, so what a step did
    is the noise it added to the step before.
    """
    rungs = [Rung(sample.of, None, 0, _percent(_decided(sample.baseline, sample)), 0.0)]
    suspects, before = [], 0.0
    for name, step in steps.items():
        try:
            scores = answering(name, step, sample.images)
        except Exception as error:  # noqa: BLE001 - a runtime may raise anything; the verdict does not hang on a rung
            rungs.append(Rung(name, None, 0, 0.0, 0.0, first_line(error)))
            continue
        if not np.isfinite(scores).all():
            rungs.append(Rung(name, None, 0, 0.0, 0.0, "its scores are NaN or infinite"))
            suspects.append(name)
            continue
        noise = noise_share(sample.baseline, scores)
        rungs.append(_rung(name, scores, sample, noise - before))
        if name != lossy and noise > max(SHOULD_LOSE_NOTHING * before, before + FLOAT_NOISE):
            suspects.append(name)
        before = noise
    worst = max((rung for rung in rungs if rung.missing is None), key=lambda rung: rung.noise_added)
    return Ladder(
        images=len(sample.images),
        rungs=tuple(rungs),
        lost_most=worst.name if worst.noise_added > 0 else None,
        suspects=tuple(suspects),
        layers=layers,
        pixels=int((sample.labels != pixels.IGNORED).sum()) if sample.baseline.ndim == 3 else None,
    )


def _rung(name: str, scores: Outputs, sample: Sample, added: float) -> Rung:
    decibels = sqnr_db(sample.baseline, scores)
    before, after = _decided(sample.baseline, sample), _decided(scores, sample)
    shown = None if decibels == np.inf else decibels
    return Rung(name, shown, flips(before, after).flipped, _percent(after), added)


def _percent(found: Answers) -> float:
    """Give the share of right answers; 0 where every pixel is one that does not count."""
    return 100 * float(found.right.mean()) if found.right.size else 0.0


def _decided(scores: Outputs, sample: Sample) -> Answers:
    """Decide for each image; of maps, for each pixel that counts."""
    if scores.ndim == 3:
        return of_pixels(scores, sample.labels)
    return answers(scores, sample.labels, "classification" if sample.labels.ndim == 1 else "multilabel")
