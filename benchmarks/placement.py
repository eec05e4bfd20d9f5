"""What the int8 placement costs and gives on each runtime, and what a dynamic batch does to OpenVINO.

    python benchmarks/placement.py

ResNet-18 at 32×32, untrained (seed 0), calibrated on the embedded images. For residual additions in int8 and in float:
SQNR of the scores against float PyTorch, and interleaved latency. Prints a table and keeps every sample in
benchmarks/results/.
"""

import json
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
import torch
import torchvision

from bitferry import targets
from bitferry.device.arrays import Images, Outputs, Predict
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset
from bitferry.pipeline.artifacts import FloatModel
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.compile import compile
from bitferry.pipeline.export import export, simplify
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.measure import latency
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager

HERE = Path(__file__).parent
CLASSES = tuple(str(index) for index in range(10))
THREADS = targets.usable_cpus()


def dynamic_openvino(model: Path) -> Predict:
    """Compile an ONNX file with its dynamic batch, which `targets/openvino.py` does not do."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def predict(images: Images) -> Outputs:
        scores: Outputs = request.infer([images], share_inputs=True, share_outputs=False)[0]
        return scores

    return predict


def candidates(build: Cache) -> tuple[dict[str, Predict], Images]:
    contract = Preprocessing(height=32, width=32, mean=(0.286,) * 3, std=(0.353,) * 3)
    data = HERE.parent / "calibration_data/fashion_mnist/calibration.npz"
    images = dataset.split("calibration", data, CLASSES, contract, build)
    torch.manual_seed(0)
    net = Deployable(torchvision.models.resnet18(num_classes=10), contract).eval()
    model = FloatModel(net, contract, CLASSES, key="untrained-resnet18")
    found = {"eager float32": eager(net)}
    for add in (True, False):
        scheme = targets.Scheme(additions="both" if add else "none")
        program = quantize(model, images, scheme, Quantization(), build)
        onnx = simplify(export(program, images, build), images, build)
        where = f"additions in {'int8' if add else 'float'}"
        for name in ("openvino", "onnxruntime"):
            options = targets.get(name).Options(threads=THREADS)
            path = compile(replace(onnx, precision="int8"), name, program, images, build, options=options).path
            found[f"{name}, {where}"] = targets.get(name).load(path, precision="int8", options=options)
        found[f"openvino dynamic batch, {where}"] = dynamic_openvino(onnx.path)
    return found, images.images[:64].copy()


def main() -> None:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        predicts, images = candidates(Cache(Path(folder) / "build"))
        reference = predicts["eager float32"](images)
        quality = {
            name: sqnr_db(reference, np.concatenate([predict(image[None]) for image in images]))
            for name, predict in predicts.items()
        }
        series = latency.interleave({name: partial(p, images[:1]) for name, p in predicts.items()}, seconds=20)
    print(f"{'':44}{'p50 ms':>8}{'SQNR dB':>9}")
    for name, samples in series.items():
        print(f"{name:44}{np.median(samples.seconds) * 1e3:8.2f}{quality[name]:9.1f}")
    environment = targets.get("openvino").environment(options=targets.get("openvino").Options())
    result = {
        "environment": vars(environment),
        "threads": THREADS,
        "sqnr_db": quality,
        "seconds": {name: samples.seconds.tolist() for name, samples in series.items()},
    }
    machine = "-".join(environment.isa[-1:]) or "cpu"
    path = HERE / f"results/{datetime.now(UTC):%Y-%m-%d}-placement-{machine}.json"
    path.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
