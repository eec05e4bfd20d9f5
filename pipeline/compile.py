"""Simplified ONNX, TorchScript or a torch.export program → a target's own file."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import targets
from device.errors import BitferryError, StageFailed, first_line
from pipeline import cache
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
        source=source.key,
        precision=source.precision,
        options=asdict(replace(options, threads=None)),
        environment=target.environment(options=options),
    )
    done = build.folder("compile", key, partial(_compile, target, source, options), of=name)
    return Compiled(done / f"model{target.SUFFIX}", name, source.precision, source, options, key)


def _compile(target: targets.Target[targets.Options], source: Source, options: targets.Options, out: Path) -> None:
    try:
        target.compile(source.path, out / f"model{target.SUFFIX}", precision=source.precision, options=options)
    except BitferryError:
        raise
    except Exception as error:
        raise StageFailed(f"the target's compiler refused {source.path}: {first_line(error)}") from error
