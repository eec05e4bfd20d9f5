"""Program → TorchScript, by tracing; its answers are compared with the program's on real images."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bitferry.device.errors import StageFailed, first_line
from bitferry.pipeline import cache, progress
from bitferry.pipeline.artifacts import TorchProgram, Traced
from bitferry.pipeline.capture import OneByOne, register_quantized_operators
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.division import drawn

TOLERANCE = 1e-5
CHECKED_IMAGES = 16
BATCH_1 = "batch-1"
"""An empty file beside the model says that its batch is fixed."""


def trace(program: TorchProgram, calibration: Split, build: cache.Cache) -> Traced:
    """Trace on two images and compare on others; where that bakes the batch size in, trace for batch 1, and say so.

    Raises StageFailed when the traced answers differ by more than 1e-5 of the largest score even so.
    """
    key = cache.key("trace", code=__file__, packages=("torch", "torchao"), program=program.key, data=calibration.key)
    done = build.folder("trace", key, partial(_trace, program, calibration))
    batch = 1 if (done / BATCH_1).exists() else None
    return Traced(done / "model.ts", program.precision, key, batch)


def torchscript(traced: Traced) -> nn.Module:
    """Load a traced file; one made for batch 1 gets its images one by one."""
    register_quantized_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated upstream; users still ask for it
        module: nn.Module = torch.jit.load(str(traced.path))  # type: ignore[no-untyped-call]
    return module if traced.batch is None else OneByOne(module)


def _trace(program: TorchProgram, calibration: Split, out: Path) -> None:
    images = torch.from_numpy(drawn(calibration.images, CHECKED_IMAGES))
    module = program.module()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every Python number it meets; the comparison decides
        traced, fault = _traced(module, images[:2], (images, images[2:3], images[3:6]))
        if fault:
            traced, fault = _traced(module, images[:1], torch.split(images, 1))
            if not fault:
                (out / BATCH_1).touch()
                progress.stage("trace", "tracing fixes this model's batch size; the TorchScript file is for batch 1")
        if fault:
            raise StageFailed(f"the TorchScript model answers {len(images)} images differently from PyTorch: {fault}")
        traced.save(str(out / "model.ts"))


def _traced(module: nn.Module, example: Tensor, batches: Sequence[Tensor]) -> tuple[torch.jit.ScriptModule, str | None]:
    """Trace on `example` and say how the answers for `batches` differ; None when they do not."""
    try:
        traced = torch.jit.trace(module, (example.contiguous(),), check_trace=False)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise StageFailed(f"torch.jit.trace cannot trace the model: {first_line(error)}") from error
    try:
        pairs = [(module(batch), traced(batch)) for batch in batches]
    except RuntimeError as error:
        return traced, first_line(error)
    difference = max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs)
    told = f"{difference:.2g} of the largest score, at most {TOLERANCE:g} allowed"
    return traced, None if difference <= TOLERANCE else told
