"""Program → ONNX → simplified ONNX, each compared with what it was made from on real calibration images."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
import torch

from device.arrays import Images, Outputs
from device.errors import StageFailed
from pipeline import cache
from pipeline.artifacts import Onnx, Program, Simplified, Split
from pipeline.statistics import sqnr_db

OPSET = 18
TOLERANCE = 1e-4
"""Of a float graph: the largest difference allowed, as a share of the largest score (at least 1)."""
LEAST_SQNR_DB = 30.0
"""Of an int8 graph: rounding ties fall either way between runtimes, so a few answers may move by one step."""
CHECKED_IMAGES = 16


def export(program: Program, calibration: Split, build: cache.Cache) -> Onnx:
    """Export to ONNX opset 18, batch dynamic, uint8 N×H×W×3 in; raise StageFailed when its answers differ."""
    key = cache.key(
        "export",
        code=__file__,
        packages=("torch", "onnx", "onnxscript"),
        program=program.key,
        data=calibration.key,
    )
    done = build.folder("export", key, partial(_export, program, calibration))
    return Onnx(done / "model.onnx", program.precision, key)


def simplify(model: Onnx, calibration: Split, build: cache.Cache) -> Simplified:
    """Fold constants and drop what does nothing (onnxsim); raise StageFailed when the answers change."""
    key = cache.key("simplify", code=__file__, packages=("onnx", "onnxsim"), model=model.key, data=calibration.key)
    done = build.folder("simplify", key, partial(_simplify, model, calibration))
    return Simplified(done / "model.onnx", model.precision, key)


def answer(model: Path, images: Images) -> Outputs:
    """Run an ONNX file operator by operator, without the rewrites that ONNX Runtime would make for speed."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    scores: Outputs = session.run(None, {session.get_inputs()[0].name: images})[0]
    return scores


def _export(program: Program, calibration: Split, out: Path) -> None:
    images = calibration.images[:CHECKED_IMAGES]
    module = program.module()
    with torch.no_grad(), _quiet():
        try:
            exported = torch.onnx.export(
                module,
                (torch.from_numpy(images[:2].copy()),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                opset_version=OPSET,
                input_names=["images"],
                output_names=["scores"],
            )
        except Exception as error:
            raise StageFailed(f"torch.onnx.export failed: {str(error).strip().splitlines()[0]}") from error
        cast("torch.onnx.ONNXProgram", exported).save(out / "model.onnx", external_data=False)
        expected = module(torch.from_numpy(images.copy())).numpy()
    _compare(
        expected,
        answer(out / "model.onnx", images),
        program.precision == "int8",
        "the exported ONNX",
        "PyTorch",
    )


def _simplify(model: Onnx, calibration: Split, out: Path) -> None:
    try:
        simplified, _ = onnxsim.simplify(onnx.load(model.path))
        _strip(simplified)
        onnx.checker.check_model(simplified, full_check=True)
    except Exception as error:
        raise StageFailed(f"onnxsim failed on {model.path}: {str(error).strip().splitlines()[0]}") from error
    onnx.save(simplified, out / "model.onnx")
    images = calibration.images[:CHECKED_IMAGES]
    before, after = answer(model.path, images), answer(out / "model.onnx", images)
    _compare(before, after, model.precision == "int8", "the simplified ONNX", "the exported one")


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes, which hold the paths of the machine that exported."""
    del model.metadata_props[:]
    model.doc_string = ""
    for thing in (
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        thing.doc_string = ""
        del thing.metadata_props[:]
    for constant in model.graph.initializer:
        del constant.metadata_props[:]


def _compare(expected: Outputs, found: Outputs, quantized: bool, what: str, reference: str) -> None:
    difference = float(np.abs(expected - found).max() / max(1.0, float(np.abs(expected).max())))
    sqnr = sqnr_db(expected, found)
    if (sqnr < LEAST_SQNR_DB) if quantized else not (difference <= TOLERANCE):
        raise StageFailed(
            f"{what} answers {len(found)} calibration images differently from {reference}: the largest difference is "
            f"{difference:.2g} of the largest score, SQNR {sqnr:.1f} dB "
            f"(allowed: {f'at least {LEAST_SQNR_DB} dB' if quantized else f'at most {TOLERANCE:g}'})"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's chatter; failures come as exceptions."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
