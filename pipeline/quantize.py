"""Float model → PyTorch int8 (PT2E): a target's scheme says what is int8, the calibration images say how."""

import logging
from functools import partial
from pathlib import Path

import torch
from torch import nn

from device.errors import InputError
from pipeline import cache
from pipeline.artifacts import FloatModel, Quantized, Split
from pipeline.capture import export_program
from pipeline.recipe import Quantization
from targets import Scheme

STEPS = sorted(Path(__file__).with_name("quantization").glob("*.py"))


def quantize(
    model: FloatModel, calibration: Split, scheme: Scheme, settings: Quantization, build: cache.Cache
) -> Quantized:
    """Calibrate on every image given and convert; the result is shared by all targets of an equal scheme."""
    count = min(len(calibration), settings.images or len(calibration))
    key = cache.key(
        "quantize",
        code=__file__,
        steps={path.name: cache.file_hash(path) for path in STEPS},
        packages=("torch", "torchao"),
        model=model.key,
        data=calibration.key,
        images=count,
        scheme=scheme,
        settings=settings.model_dump(),
    )
    done = build.folder("quantize", key, partial(_quantize, model, calibration, count, scheme, settings))
    equalized = done / "equalized.pt2"
    return Quantized(
        done / "program.pt2", model, scheme, count, key, equalized=equalized if equalized.exists() else None
    )


def read_program(path: Path) -> nn.Module:
    """Load a program that `quantize` wrote."""
    register_quantized_operators()
    module: nn.Module = torch.export.load(path).module()
    return module


def register_quantized_operators() -> None:
    """Make torch know the operators of a quantized program, before one is loaded."""
    _quiet_imports()
    import torchao.quantization.pt2e  # noqa: F401, PLC0415 - seconds to import


def _quiet_imports() -> None:
    """Keep a notice about torchao's own enum, logged on import by torch 2.14, off the user's screen."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def _quantize(model: FloatModel, data: Split, count: int, scheme: Scheme, settings: Quantization, out: Path) -> None:
    # torchao takes seconds to import, which a run that finds this stage in the cache is spared
    _quiet_imports()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: PLC0415

    from pipeline.quantization.annotate import SchemeQuantizer  # noqa: PLC0415
    from pipeline.quantization.steps import calibrate  # noqa: PLC0415

    images = torch.from_numpy(data.images[:count].copy())
    if bool((images == images[:1]).all()):
        raise InputError(f"all {count} calibration images are the same picture; the ranges would mean nothing")
    example = images[:2] if count > 1 else images.repeat_interleave(2, 0)
    with torch.no_grad():
        prepared = prepare_pt2e(
            export_program(model.module(), example).module(), SchemeQuantizer(scheme, settings.keep)
        )
        equalized = calibrate(prepared, images, settings)
        if equalized is not None:
            torch.export.save(export_program(equalized, example), out / "equalized.pt2")
        converted = convert_pt2e(prepared)
        torch.export.save(export_program(converted, example), out / "program.pt2")
