"""Program → TorchScript, by tracing; its answers are compared with the program's on real images."""

import warnings
from functools import partial
from pathlib import Path

import torch

from device.errors import StageFailed, first_line
from pipeline import cache
from pipeline.artifacts import Program, Split, Traced

TOLERANCE = 1e-5
CHECKED_IMAGES = 16


def trace(program: Program, calibration: Split, build: cache.Cache) -> Traced:
    """Trace on two images and compare on others, so that a batch size baked in would show.

    Raises StageFailed when the traced answers differ by more than 1e-5 of the largest score.
    """
    key = cache.key("trace", code=__file__, packages=("torch", "torchao"), program=program.key, data=calibration.key)
    done = build.folder("trace", key, partial(_trace, program, calibration))
    return Traced(done / "model.ts", program.precision, key)


def _trace(program: Program, calibration: Split, out: Path) -> None:
    images = torch.from_numpy(calibration.images[:CHECKED_IMAGES].copy())
    module = program.module()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every Python number it meets; the comparison decides
        try:
            traced = torch.jit.trace(module, (images[:2].contiguous(),), check_trace=False)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise StageFailed(f"torch.jit.trace cannot trace the model: {first_line(error)}") from error
        expected, found = module(images), traced(images)
        traced.save(str(out / "model.ts"))
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= TOLERANCE:
        raise StageFailed(
            f"the TorchScript model answers {len(images)} images differently from PyTorch: "
            f"{difference:.2g} of the largest score, at most {TOLERANCE:g} allowed"
        )
