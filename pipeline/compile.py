"""Simplified ONNX, TorchScript or a torch.export program → a target's own file, run once and compared with it."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import onnx

from bitferry import targets
from bitferry.device.errors import BitferryError, InputError, StageFailed, first_line
from bitferry.pipeline import cache, conditioning, fault, first_run, unsupported
from bitferry.pipeline.artifacts import Captured, Compiled, Program, Simplified, Source
from bitferry.pipeline.capture import fixed_batch, read_graph
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.own_source import shipped

CHECKS = [Path(str(module.__file__)) for module in (first_run, fault, conditioning)]


def compile(
    source: Source, name: str, program: Program, calibration: Split, build: cache.Cache, *, options: targets.Options
) -> Compiled:
    """Compile for the target called `name`, and run the artifact on calibration images where it runs here.

    Raises StageFailed, with the vendor's error as cause, when it cannot be compiled or fails when it runs, and when
    float32 answers otherwise than `source`, which was made from `program`. `options` are of the target's own kind;
    without a number of threads, every CPU this process may use is meant.
    """
    target = targets.get(name)
    options = replace(options, threads=options.threads or targets.usable_cpus())
    key = cache.key(
        "compile",
        target=name,
        code=targets.source(name),
        shipped=shipped([targets.source(name).read_text()]),
        checks=[cache.file_hash(path) for path in CHECKS],
        source=source.key,
        data=calibration.key,
        precision=source.precision,
        options=asdict(replace(options, threads=None)),
        environment=target.environment(options=options),
    )
    made = Compiled(Path(f"model{target.SUFFIX}"), name, source.precision, source, options, key)
    done = build.folder("compile", key, partial(_compile, made, program, calibration), of=name)
    return replace(made, path=done / made.path)


def _compile(made: Compiled, program: Program, calibration: Split, out: Path) -> None:
    name, source = made.target, made.source
    _refuse_batch(made)
    compiled = replace(made, path=out / made.path)
    try:
        targets.get(name).compile(source.path, compiled.path, precision=made.precision, options=made.options)
    except BitferryError:
        raise
    except Exception as error:
        place = unsupported.in_compile(error, source.path, name)
        raise StageFailed(f"{name}'s compiler refused {source.path}: {first_line(error)}; {place}") from error
    if not compiled.environment.unmeasured:
        first_run.check(compiled, program, calibration)


def _refuse_batch(made: Compiled) -> None:
    """Raise InputError where the target is to have another batch than the one that the model's code fixes."""
    fixed = _fixed_batch(made.source)
    if fixed is not None and made.options.batch != fixed:
        raise InputError(
            f"this model's code fixes the number of images at {fixed}, and [targets.{made.target}] asks for batch = "
            f"{made.options.batch!r}; set batch = {fixed} there, or work with x.shape[0] in the model"
        )


def _fixed_batch(source: Source) -> int | None:
    if isinstance(source, Captured):
        return fixed_batch(read_graph(source.path))
    if isinstance(source, Simplified):
        (images,) = onnx.load(source.path, load_external_data=False).graph.input
        size = images.type.tensor_type.shape.dim[0]
        return size.dim_value if size.HasField("dim_value") else None
    return source.batch
