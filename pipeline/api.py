"""What `import bitferry` offers: a recipe opened, and its way to a target. `bitferry` itself has an example."""

from pathlib import Path

from bitferry import targets
from bitferry.device.errors import InputError
from bitferry.pipeline import memory
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.deploy import way
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.recipe import read
from bitferry.pipeline.run import Deployment, Run
from bitferry.targets import Precision

__all__ = ["open", "to"]


def open(
    recipe: str | Path,
    *,
    build: str | Path = "build",
    precision: str | None = None,
    effort: Effort = "default",
    trust: bool = False,
) -> Run:
    """Read a recipe, `precision` in place of its own if given; its stages are kept under `build`, as by the commands.

    Raises InputError with every fault in it. `trust` lets a `.pt2` program be loaded, which can run code.
    """
    path = Path(recipe)
    found = read(path, precision=precision)
    memory.keep_freed()
    return Run(found, path, Cache(Path(build) / found.name), trust, effort)


def to(run: Run, target: str, precision: Precision | None = None) -> Deployment:
    """Give the way to a target at a precision: the recipe's where none is given, searched for where that is "auto".

    Raises InputError for a target or a precision that there is not, TargetUnavailable where this machine lacks it.
    """
    schemes = targets.get(target).SCHEMES
    if precision is None:
        return way(run, target)
    if precision not in schemes:
        raise InputError(f"target '{target}' cannot run {precision}; it runs {', '.join(schemes)}")
    return Deployment(run, target, precision)
