"""Microsoft Olive, static int8 for ONNX Runtime; run by `peers.py` with the interpreter of an environment that has it.

    python benchmarks/peer_olive.py quantize MODEL.onnx CALIBRATION.npz OUT
    python benchmarks/peer_olive.py job RECIPE STATE.pt OUT

`quantize` runs Olive's pass OnnxStaticQuantization on a float ONNX that takes uint8 images, with its defaults and with
uint8 activations and weights per channel. `job` is the whole work of a person: load the torchvision model, let Olive
convert and quantize it (uint8 activations, weights per channel), evaluate float and int8 on every evaluation image,
time both at batch 1. Both end with one line of JSON. An environment that it runs in:

    python -m venv olive && olive/bin/pip install olive-ai==0.13.0 requests tabulate onnxruntime torch torchvision

(Olive 0.13.0 imports `requests`, which its package does not ask for.)
"""

import argparse
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
import olive
from olive.data.registry import Registry
from peer_script import main

UINT8 = {"activation_type": "uint8", "precision": "int8", "per_channel": True}
WAYS: Mapping[str, Mapping[str, object]] = {"defaults": {}, "uint8 activations, per channel": UINT8}


@Registry.register_dataset("array")  # type: ignore[untyped-decorator]
def dataset(path: str, name: str, **_: object) -> list[tuple[dict[str, Any], int]]:
    """Give calibration images to Olive, which wants a label with each and asks for none of them."""
    return [({name: image}, 0) for image in np.load(path)["images"]]


def run(model: Mapping[str, object], passes: Mapping[str, object], calibration: Path, name: str, out: Path) -> Path:
    """Run one workflow; the pass that wants data finds it as `calibration`."""
    data = {
        "name": "calibration",
        "type": "DataContainer",
        "load_dataset_config": {"type": "array", "params": {"path": str(calibration), "name": name}},
        "dataloader_config": {"params": {"batch_size": 1}},
    }
    config = {
        "input_model": model,
        "data_configs": [data],
        "passes": passes,
        "output_dir": str(out),
        "cache_dir": str(out / "cache"),
        "evaluate_input_model": False,
        "log_severity_level": 4,
    }
    best = olive.run(config).get_best_candidate()
    if best is None:
        raise RuntimeError("Olive gave no model")
    return Path(best.model_path)


def quantize(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize in every way; give the file of each, or the first line of its error."""
    ways: dict[str, dict[str, str]] = {}
    for label, settings in WAYS.items():
        passes = {"int8": {"type": "OnnxStaticQuantization", "data_config": "calibration"} | dict(settings)}
        model = {"type": "OnnxModel", "model_path": str(options.model)}
        try:
            folder = options.out / label.replace(" ", "-").replace(",", "")
            ways[label] = {"path": str(run(model, passes, options.calibration, "images", folder))}
        except Exception as error:  # noqa: BLE001 - Olive may raise anything, and the other way goes on
            lines = str(error).strip().splitlines() or ["no message"]
            ways[label] = {"why": f"{type(error).__name__}: {lines[0]}"}
    return {"versions": {"Olive": version("olive-ai")}, "ways": ways}


def whole_model(model_path: str) -> object:
    """Load the model that `job` wrote; Olive calls this by its name."""
    import torch  # noqa: PLC0415 - `quantize` does without

    return torch.load(model_path, weights_only=False)


def job(options: argparse.Namespace) -> dict[str, Any]:
    """Do the whole work."""
    import torch  # noqa: PLC0415 - `quantize` does without
    from by_hand import Job, Predict, judge  # noqa: PLC0415
    from onnxruntime import InferenceSession  # noqa: PLC0415

    work = Job.read(options.recipe, options.state)
    images = options.out / "calibration.npz"
    np.savez(images, images=np.concatenate(work.calibration()))
    torch.save(work.model(), options.out / "model.pt")
    named = {"model_script": __file__, "model_loader": "whole_model", "model_path": str(options.out / "model.pt")}
    shapes = {"input_names": ["image"], "input_shapes": [list(work.shape)], "output_names": ["scores"]}
    model = {"type": "PyTorchModel", "io_config": shapes} | named
    convert = {"type": "OnnxConversion", "target_opset": 18}
    float32 = run(model, {"onnx": convert}, images, "image", options.out / "float32")
    passes = {"int8": {"type": "OnnxStaticQuantization", "data_config": "calibration"} | UINT8}
    given = {"type": "OnnxModel", "model_path": str(float32)}
    int8 = run(given, passes, images, "image", options.out / "int8")

    def loaded(path: Path) -> Predict:
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {"image": image})[0]

    found = judge(work, {"float32": loaded(float32), "int8": loaded(int8)})
    return {"versions": {"Olive": version("olive-ai")}, "found": found}


if __name__ == "__main__":
    main(__doc__, quantize=quantize, job=job)
