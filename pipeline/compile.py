"""Simplified ONNX, TorchScript or a torch.export program → a target's own file."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import targets
from device import errors
from device.errors import BitferryError, StageFailed, first_line
from pipeline import cache, unsupported
from pipeline.artifacts import Compiled, Source


def compile(source: Source, name: str, build: cache.Cache, *, options: targets.Options) -> Compiled:
    """Compile for the target called `name`; raise StageFailed, with the vendor's error as cause, when it cannot.

    `options` are of the target's own kind; without a number of threads, every CPU this process may use is meant.
    """
    target = targets.get(name)
    options = replace(options, threads=options.threads or targets.usable_cpus())
    key = cache.key(
        "compile",
        target=name,
        code=targets.source(name),
        shipped={path.name: cache.file_hash(path) for path in sorted(Path(errors.__file__).parent.glob("*.py"))},
        source=source.key,
        precision=source.precision,
        options=asdict(replace(options, threads=None)),
        environment=target.environment(options=options),
    )
    done = build.folder("compile", key, partial(_compile, name, source, options), of=name)
    return Compiled(done / f"model{target.SUFFIX}", name, source.precision, source, options, key)


def _compile(name: str, source: Source, options: targets.Options, out: Path) -> None:
    target = targets.get(name)
    try:
        target.compile(source.path, out / f"model{target.SUFFIX}", precision=source.precision, options=options)
    except BitferryError:
        raise
    except Exception as error:
        place = unsupported.in_compile(error, source.path, name)
        raise StageFailed(f"{name}'s compiler refused {source.path}: {first_line(error)}; {place}") from error
