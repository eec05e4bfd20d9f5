"""Simplified ONNX or TorchScript → a target's own file."""

from functools import partial
from pathlib import Path

import targets
from device.errors import BitferryError, StageFailed, first_line
from pipeline import cache
from pipeline.artifacts import Compiled, Simplified, Traced


def compile(source: Simplified | Traced, name: str, build: cache.Cache, *, threads: int | None = None) -> Compiled:
    """Compile for the target called `name`; raise StageFailed, with the vendor's error as cause, when it cannot.

    `threads` is what the artifact is verified and run with; None for every CPU this process may use.
    """
    target = targets.get(name)
    environment = target.environment()
    key = cache.key(
        "compile",
        target=name,
        code=targets.source(name),
        source=source.key,
        precision=source.precision,
        environment=environment,
    )
    done = build.folder("compile", key, partial(_compile, target, source), of=name)
    path = done / f"model{target.SUFFIX}"
    return Compiled(path, name, source.precision, source, threads or targets.usable_cpus(), key)


def _compile(target: targets.Target, source: Simplified | Traced, out: Path) -> None:
    try:
        target.compile(source.path, out / f"model{target.SUFFIX}", precision=source.precision)
    except BitferryError:
        raise
    except Exception as error:
        raise StageFailed(f"the target's compiler refused {source.path}: {first_line(error)}") from error
