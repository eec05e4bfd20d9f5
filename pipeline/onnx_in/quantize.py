"""Simplified float ONNX → int8 ONNX (Q/DQ) by ONNX Runtime's quantizer, as a target's scheme wants it."""

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from bitferry.device import arrays, pixels
from bitferry.device.arrays import Images, Outputs, Predict
from bitferry.device.errors import InputError, StageFailed, first_line
from bitferry.pipeline import cache, progress
from bitferry.pipeline.artifacts import Calibration, FloatOnnx, QuantizedOnnx, Simplified
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.division import FEWEST, SEEN, divide, on, refuse_equal, refuse_infinite
from bitferry.pipeline.onnx_in.asked import OBSERVERS, usable
from bitferry.pipeline.onnx_in.looked import corrected
from bitferry.pipeline.onnx_in.plan import Plan, exact_elsewhere, plan
from bitferry.pipeline.onnx_in.session import predict
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import decibels, is_less
from bitferry.targets import Scheme

if TYPE_CHECKING:
    from onnxruntime.quantization.calibrate import TensorsData

    Made = tuple[NDArray[np.float64], ModelProto, TensorsData]
Noise = NDArray[np.float64]
"""Of the scores of each image, its power."""
BATCH = 8
"""Judging images that go through at once."""
CHUNK = 8
"""Batches whose activations are held in memory at once, for histograms."""
PERCENTILE = 99.98
"""All but 0.01 % at either end."""
FIRST, FLAT = 16, 0.1
"""Images that are tried first for `images = "enough"`, and the dB that two doublings must bring to go on."""
SOURCES = [
    *(Path(__file__).with_name(f"{name}.py") for name in ("asked", "plan", "looked", "session")),
    *(Path(__file__).parents[1] / f"{name}.py" for name in ("division", "statistics")),
    *(Path(str(module.__file__)) for module in (arrays, pixels)),
]
"""Source files that decide what comes out, besides this one."""
TOO_FEW = f"fewer than {2 * FEWEST} different calibration images are too few to judge it"
LEFT_OUT = "equalization is left out: it is a step of PyTorch's way"


def quantize(
    model: FloatOnnx,
    simplified: Simplified,
    calibration: Split,
    scheme: Scheme,
    settings: Quantization,
    build: cache.Cache,
) -> QuantizedOnnx:
    """Calibrate and quantize; the result is shared by all targets of an equal scheme.

    Raises InputError for steps that need PyTorch, StageFailed where ONNX Runtime's quantizer fails.
    """
    used = usable(settings)
    key = cache.key(
        "quantize",
        code=__file__,
        steps=[cache.file_hash(path) for path in SOURCES],
        packages=("onnx", "onnxruntime"),
        model=simplified.key,
        data=calibration.key,
        scheme=scheme,
        settings=used.model_dump(),
    )
    make = partial(_quantize, simplified.path, calibration.images, scheme, used, equalize=settings.equalize)
    with calibration.naming():
        done = build.folder("quantize", key, make)
    found = json.loads((done / "calibration.json").read_text())
    calibrated = Calibration(found["images"], len(calibration), found["curve"], found["validation"])
    return QuantizedOnnx(done / "model.onnx", model, simplified.path, scheme, calibrated, key, kept=settings.keep)


def _quantize(path: Path, images: Images, scheme: Scheme, settings: Quantization, out: Path, *, equalize: bool) -> None:
    refuse_equal(images)
    if equalize:
        progress.stage("quantize", LEFT_OUT)
    try:
        division = divide(images, settings.first_images)
        progress.stage("quantize", str(division))
        seen, judges = images[division.fitting], images[division.validation]
        work = _Work(path, scheme, settings, judges)
        work.float_scores(seen)  # which refuses what is not finite
        seen, curve = work.enough(seen) if settings.images == "enough" and len(judges) else (seen, {})
        made = work.made(seen)
    except InputError:
        raise
    except Exception as error:  # ONNX Runtime's quantizer raises anything
        raise StageFailed(f"ONNX Runtime's quantizer failed on {path}: {first_line(error)}") from error
    onnx.save(made, out / "model.onnx")
    used = {"images": len(seen) + len(judges), "validation": len(judges), "curve": curve}
    (out / "calibration.json").write_text(json.dumps(used))


class _Work:
    """One float file on its way to int8, and the images that judge what is made of it, none where there are too few."""

    def __init__(self, path: Path, scheme: Scheme, settings: Quantization, judges: Images) -> None:
        self.path, self.scheme, self.settings, self.judges = path, scheme, settings, judges
        self.judged = on(judges)
        self.model = onnx.shape_inference.infer_shapes(onnx.load(path))
        self.plan: Plan = plan(self.model, scheme, settings.keep)
        self.wanted: Outputs = self.float_scores(judges) if len(judges) else np.zeros((0, 1), np.float32)

    def made(self, seen: Images) -> ModelProto:
        """Quantize with every observer asked for, keep the best, and correct its biases where that helps.

        Another observer than the first is taken only where it answers better beyond chance.
        """
        if not self.plan.nodes:
            return self.model
        names: tuple[str, ...] = OBSERVERS if self.settings.observer == "best" else (self.settings.observer,)
        names, best = names if len(self.judges) else names[:1], names[0]
        tried: dict[str, Made] = {}
        for name in progress.track(names, "observe", total=len(names)):
            ranges = self.ranges(seen, name)
            int8 = self.quantized(self.model, ranges)
            tried[name] = self.noise(int8), int8, ranges
            best = name if is_less(tried[name][0], tried[best][0]) else best
        if len(self.judges):
            told = ", ".join(f"{name} {self.db(noise):.1f} dB" for name, (noise, *_) in tried.items())
            progress.stage("quantize", f"observer {best}: {told}, {self.judged}")
            return self.better(*self.of_all(seen, best, tried[best]), seen)
        return self.better(*tried[best], seen)

    def of_all(self, seen: Images, observer: str, made: "Made") -> "Made":
        """Quantize with the ranges of all images, of the judges too, unless these then answer worse."""
        ranges = self.ranges(np.concatenate([seen, self.judges]), observer)
        int8 = self.quantized(self.model, ranges)
        before, after = made[0], self.noise(int8)
        if after.sum() > before.sum():
            progress.stage("quantize", "ranges of all images answer worse; those of the images fitted on stay")
            return made
        self.judged += SEEN
        told = f"{self.db(before):.1f} → {self.db(after):.1f} dB {self.judged}"
        progress.stage("quantize", f"ranges of all images in place of those fitted on: {told}")
        return after, int8, ranges

    def better(self, before: Noise, int8: ModelProto, ranges: "TensorsData", seen: Images) -> ModelProto:
        """Correct the biases by what rounding shifts the mean of each layer, and keep that where it is better."""
        if self.settings.bias_correction == "none":
            return int8
        better = corrected(self.model, int8, seen)
        if better is None:
            progress.stage("quantize", "bias correction: no layer has anything to correct")
            return int8
        again = self.quantized(better, ranges)
        if not len(self.judges):
            progress.stage("quantize", f"bias correction is taken as it is: {TOO_FEW}")
            return again
        after = self.noise(again)
        without, having = self.db(before), self.db(after)
        if not is_less(after, before):
            chance = ", no more than chance" if having > without else ""
            told = f"bias correction dropped: {without:.1f} dB without it, {having:.1f} with it{chance}"
            progress.stage("quantize", f"{told}, {self.judged}")
            return int8
        progress.stage("quantize", f"bias correction: {without:.1f} → {having:.1f} dB {self.judged}")
        return again

    def enough(self, seen: Images) -> tuple[Images, Mapping[int, float]]:
        """Double the number of images until two doublings bring nothing on those that judge."""
        name = OBSERVERS[0] if self.settings.observer == "best" else self.settings.observer
        count, found = min(FIRST, len(seen)), dict[int, float]()
        while self.plan.nodes:
            found[count] = self.db(self.noise(self.quantized(self.model, self.ranges(seen[:count], name))))
            last = list(found.values())
            if (len(last) > 2 and last[-1] - last[-3] < FLAT) or count == len(seen):
                break
            count = min(2 * count, len(seen))
        told = ", ".join(f"{tried} {worth:.1f} dB" for tried, worth in found.items()) or f"{count}"
        end = "more bring nothing" if count < len(seen) else "more may be better"
        progress.stage("quantize", f"calibration images to fit on: {told}, {self.judged}; {end}")
        return seen[:count], found

    def float_scores(self, images: Images) -> Outputs:
        """Answer images with the float model; raise NotFinite where an answer is not."""
        answer = predict(self.path)

        def checked(batch: Images) -> Outputs:
            found = answer(batch)
            refuse_infinite(found, batch)
            return found

        return self.scores(checked, images)

    def scores(self, answer: Predict, images: Images) -> Outputs:
        """Answer images; of maps keep the scores of a few pixels, as all of a hundred fill a memory."""
        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return np.concatenate([pixels.thin(answer(batch)) for batch in batches])

    def noise(self, int8: ModelProto) -> Noise:
        """Give the power of each image's difference from the float scores; none without images that judge."""
        if not len(self.judges):
            return np.zeros(0)
        found = self.scores(predict(int8.SerializeToString()), self.judges).astype(np.float64) - self.wanted
        return np.asarray(np.square(found).reshape(len(found), -1).sum(1), np.float64)

    def db(self, noise: Noise) -> float:
        """Give the SQNR of the scores of all images together, in dB."""
        found = decibels(float(np.square(self.wanted, dtype=np.float64).sum()), float(noise.sum()))
        return float("inf") if found is None else found

    def ranges(self, images: Images, observer: str) -> "TensorsData":
        """Observe every activation, one image at a time where the graph's batch is open."""
        from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator  # noqa: PLC0415

        methods = {"percentile": CalibrationMethod.Percentile, "histogram": CalibrationMethod.Entropy}
        more: dict[str, Any] = {"moving_average": True} if observer == "mean-minmax" else {}
        more |= {"percentile": PERCENTILE} if observer == "percentile" else {}
        more |= {"symmetric": self.scheme.activation_symmetric}
        given = self.model.graph.input[0]
        batch = given.type.tensor_type.shape.dim[0].dim_value or 1
        feeds = [{given.name: _filled(images[i : i + batch], batch)} for i in range(0, len(images), batch)]
        step = CHUNK if observer in methods else len(feeds)
        with tempfile.TemporaryDirectory() as folder:
            calibrator = create_calibrator(
                self.path,
                [*self.plan.kinds, "Add"],
                augmented_model_path=f"{folder}/augmented.onnx",
                calibrate_method=methods.get(observer, CalibrationMethod.MinMax),
                extra_options=more,
            )
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
                for start in range(0, len(feeds), step):
                    calibrator.collect_data(_Reader(feeds[start : start + step]))
                return calibrator.compute_data()

    def quantized(self, model: ModelProto, ranges: "TensorsData") -> ModelProto:
        """Put Q/DQ pairs where the scheme wants them."""
        from onnxruntime.quantization import QuantType  # noqa: PLC0415 - scipy comes with it
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer  # noqa: PLC0415

        scheme, copied = self.scheme, ModelProto()
        copied.CopyFrom(model)
        quantizer = QDQQuantizer(
            copied,
            True,  # weights per channel
            scheme.weight_bits < 8,
            QuantType.QInt8,
            QuantType.QUInt8 if scheme.activation == "uint8" else QuantType.QInt8,
            ranges,
            list(self.plan.nodes),
            [],
            list(self.plan.kinds),
            {
                "ActivationSymmetric": scheme.activation_symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": scheme.bias == "int32",
                "OpTypesToExcludeOutputQuantization": list(self.plan.silent),
                "ForceQuantizeNoInputCheck": scheme.outputs == "float32",
            },
        )
        for _, value in self.plan.skips:
            quantizer.quantize_activation_tensor(value)
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        made: ModelProto = quantizer.model.model
        if scheme.outputs == "float32":
            exact_elsewhere(made, self.plan)
        del made.metadata_props[:]
        onnx.checker.check_model(made)
        return made


def _filled(images: Images, batch: int) -> Images:
    return np.concatenate([images, np.repeat(images[:1], batch - len(images), 0)])


class _Reader:
    """Hand out what a calibrator asks for."""

    def __init__(self, feeds: Sequence[Mapping[str, Images]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Mapping[str, Images] | None:
        """Give the next images, None at the end."""
        return next(self.feeds, None)
