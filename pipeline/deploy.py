"""A recipe to every target named: where its precision is "auto", searched first; one that fails stops no other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bitferry.device.errors import BitferryError
from bitferry.pipeline import failing, pages, progress
from bitferry.pipeline.artifacts import Bundle, Unmeasured, Verified
from bitferry.pipeline.bundle import check_output
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.search import choose
from bitferry.pipeline.shipping.provenance import epoch
from bitferry.pipeline.verdict import Failed

Made = TypeVar("Made")


def deploy(run: Run, names: Sequence[str], out: Path) -> list[Bundle | Verified | Unmeasured | Failed]:
    """Take the recipe's model to every target named; outside the budget, a target gives its verdict and no bundle.

    What this machine cannot run is bundled unmeasured, to be verified where it can.
    """
    check_output(run.recipe, list(names), out)
    epoch()  # a fault in it is told before anything is built
    return each(run, names, lambda name: way(run, name).ship(out))


def verify(run: Run, names: Sequence[str]) -> list[Verified | Unmeasured | Failed]:
    """Verify the recipe's model on every target named."""
    return each(run, names, lambda name: way(run, name).verified)


def each(run: Run, names: Sequence[str], make: Callable[[str], Made]) -> list[Made | Failed]:
    """Make something for every target named; where one fails, the others go on.

    What they share, data and float model, is made first: a fault in it is raised, as is that of an only target.
    """
    _ = run.model
    return [_attempt(run, name, make, alone=len(names) == 1) for name in names]


def _attempt(run: Run, name: str, make: Callable[[str], Made], *, alone: bool) -> Made | Failed:
    try:
        with failing.stage(name):
            return make(name)
    except (BitferryError, OSError) as error:
        if alone:
            raise
        progress.stage("failed", f"{name}: {pages.told(error)}")
        return Failed(name, run.recipe.precision, pages.told(error))


def way(run: Run, name: str) -> Deployment:
    """Give the recipe's way to a target, searched for where its precision is left open."""
    precision = run.recipe.precision
    return choose(run, name) if precision == "auto" else Deployment(run, name, precision)
