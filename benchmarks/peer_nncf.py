"""NNCF by hand, as its documentation shows it; run by `peers.py` with the interpreter of an environment that has NNCF.

    python benchmarks/peer_nncf.py quantize MODEL.onnx CALIBRATION.npz OUT [--transformer]
    python benchmarks/peer_nncf.py job RECIPE STATE.pt OUT

`quantize` writes an OpenVINO IR for each preset with fast and with full bias correction, and one more with the images'
extremes as ranges, from a float ONNX that takes uint8 images. `job` is the whole work of a person: load the torchvision
model, convert it, quantize it with the preset mixed and NNCF's other defaults, evaluate float and int8 on every
evaluation image, time both at batch 1. Both end with one line of JSON. The environment is that of
`benchmarks/peers.lock`, which `make bench` makes.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import nncf
import numpy as np
import openvino as ov
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from peer_script import main

PERFORMANCE, MIXED = nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED
EXTREMES = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
WAYS: Mapping[str, Mapping[str, Any]] = {
    "performance, fast bias correction": {"preset": PERFORMANCE},
    "performance, full bias correction": {"preset": PERFORMANCE, "fast_bias_correction": False},
    "mixed, fast bias correction": {"preset": MIXED},
    "mixed, full bias correction": {"preset": MIXED, "fast_bias_correction": False},
    "mixed, full bias correction, min-max ranges": {
        "preset": MIXED,
        "fast_bias_correction": False,
        "advanced_parameters": EXTREMES,
    },
}


def quantize(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize in every way; give the file of each, or the first line of its error."""
    with np.load(options.calibration) as arrays:
        images = [image[None] for image in arrays["images"]]
    ways: dict[str, dict[str, str]] = {}
    for label, settings in WAYS.items():
        path = options.out / f"{label.replace(' ', '-').replace(',', '')}.xml"
        try:
            # Not read_model: NNCF finds no biases to correct in what that gives, and its int8 is slower, too.
            model = ov.convert_model(options.model, input=[1, *images[0].shape[1:]])
            kind = nncf.ModelType.TRANSFORMER if options.transformer else None
            ov.save_model(quantized(model, images, model_type=kind, **settings), path, compress_to_fp16=False)
            ways[label] = {"path": str(path)}
        except Exception as error:  # noqa: BLE001 - NNCF may raise anything, and the other ways go on
            lines = str(error).strip().splitlines() or ["no message"]
            ways[label] = {"why": f"{type(error).__name__}: {lines[0]}"}
    return {"versions": versions(), "ways": ways}


def quantized(model: ov.Model, images: list[Any], **settings: Any) -> ov.Model:
    """Quantize with every image that was given."""
    return nncf.quantize(model, nncf.Dataset(images), subset_size=len(images), **settings)


def job(options: argparse.Namespace) -> dict[str, Any]:
    """Do the whole work."""
    import torch  # noqa: PLC0415 - `quantize` does without
    from by_hand import Job, Pixels, Predict, judge  # noqa: PLC0415

    work = Job.read(options.recipe, options.state)
    converted = ov.convert_model(work.model(), example_input=torch.zeros(work.shape), input=list(work.shape))
    int8 = quantized(converted, work.calibration(), preset=MIXED)
    ov.save_model(int8, options.out / "model.xml", compress_to_fp16=False)

    def loaded(model: ov.Model) -> Predict:
        compiled = ov.Core().compile_model(
            model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        )
        request = compiled.create_infer_request()

        def predict(image: Pixels) -> Pixels:
            scores: Pixels = request.infer([image], share_inputs=True)[0]
            return scores

        return predict

    return {"versions": versions(), "found": judge(work, {"float32": loaded(converted), "int8": loaded(int8)})}


def versions() -> dict[str, str]:
    return {"NNCF": nncf.__version__, "OpenVINO": ov.get_version().split("-")[0]}


if __name__ == "__main__":
    main(__doc__, quantize=quantize, job=job)
