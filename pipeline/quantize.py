"""Float model → PyTorch int8 (PT2E): a target's scheme says what is int8, the calibration images say how."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bitferry.device import arrays, pixels
from bitferry.device.arrays import Images
from bitferry.pipeline import cache
from bitferry.pipeline.artifacts import Calibration, FloatModel, Quantized
from bitferry.pipeline.capture import captured, export_program, fixed_batch, quiet_imports
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.division import drawn, refuse_equal
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.training.settings import Training
from bitferry.targets import Scheme, usable_cpus

FLOAT_COUNTERPART = "float.pt2"
HERE = Path(__file__).parent
STEPS = [
    *sorted((HERE / "quantization").glob("*.py")),
    *(HERE / f"{name}.py" for name in ("capture", "functional", "rewrites", "statistics", "division")),
    HERE / "training/settings.py",
    *(Path(str(module.__file__)) for module in (arrays, pixels)),
]
"""Source files that decide what comes out, besides this one."""


@dataclass(frozen=True)
class Lessons:
    """What `method = "qat"` trains on, and how."""

    data: Split
    training: Training


def quantize(
    model: FloatModel,
    calibration: Split,
    scheme: Scheme,
    settings: Quantization,
    build: cache.Cache,
    lessons: Lessons | None = None,
) -> Quantized:
    """Calibrate on every image given and convert; the result is shared by all targets of an equal scheme.

    With `lessons` it is fine-tuned, and a run that was killed goes on where it was.
    """
    key = cache.key(
        "quantize",
        code=__file__,
        steps=[cache.file_hash(path) for path in STEPS],
        packages=("torch", "torchao"),
        model=model.key,
        data=calibration.key,
        scheme=scheme,
        settings=settings.model_dump(),
        lessons=(lessons.data.key, lessons.training.model_dump()) if lessons else None,
    )
    checkpoint = build.root / f".fine-tune-{key}.pt"
    whole = partial(_quantize, model, calibration.images, scheme, settings, lessons, checkpoint)
    with calibration.naming():
        done = build.folder("quantize", key, whole)
    for path in (checkpoint, checkpoint.with_suffix(".new")):
        path.unlink(missing_ok=True)
    used = json.loads((done / "calibration.json").read_text())
    return Quantized(
        done / "program.pt2",
        model,
        scheme,
        Calibration(used["images"], len(calibration), used["curve"], used["validation"]),
        key,
        float_counterpart=done / FLOAT_COUNTERPART,
        kept=settings.keep,
    )


def _quantize(
    model: FloatModel,
    calibration: Images,
    scheme: Scheme,
    settings: Quantization,
    lessons: Lessons | None,
    checkpoint: Path,
    out: Path,
) -> None:
    # torchao takes seconds to import, which a run that finds this stage in the cache is spared
    quiet_imports()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: PLC0415

    from bitferry.pipeline.quantization.annotate import SchemeQuantizer  # noqa: PLC0415
    from bitferry.pipeline.quantization.finetune import Course  # noqa: PLC0415
    from bitferry.pipeline.quantization.folding import fold_constants  # noqa: PLC0415
    from bitferry.pipeline.quantization.graph import round_before_pools  # noqa: PLC0415
    from bitferry.pipeline.quantization.steps import calibrate  # noqa: PLC0415

    refuse_equal(calibration)
    torch.set_num_threads(usable_cpus())  # else it is what ran before in this process, and sums depend on it
    images, course = torch.from_numpy(calibration.copy()), None
    example = torch.from_numpy(drawn(calibration, 2))[[0, -1]]  # of one image twice; it is kept in the program's file
    if lessons:
        given = lessons.data.images
        course = Course(given, model.module(), settings.epochs, settings.learning_rate, lessons.training, checkpoint)
    with torch.no_grad():
        graph = captured(model).module()
        dynamic = fixed_batch(graph) is None
        example = example if dynamic else example[:1]
        fold_constants(graph)
        prepared = prepare_pt2e(graph, SchemeQuantizer(scheme, settings.keep))
        found = calibrate(prepared, images, settings, course)
        torch.export.save(export_program(found.float_counterpart, example, dynamic=dynamic), out / FLOAT_COUNTERPART)
        round_before_pools(prepared)
        converted = convert_pt2e(prepared)
        torch.export.save(export_program(converted, example, dynamic=dynamic), out / "program.pt2")
    used = {"images": found.images, "validation": found.validation, "curve": found.curve}
    (out / "calibration.json").write_text(json.dumps(used))
