"""A recipe to every target named: where its precision is "auto", searched first."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import Bundle, Unmeasured, Verified
from pipeline.bundle import check_output
from pipeline.run import Deployment, Run
from pipeline.search import choose
from pipeline.shipping.provenance import epoch


def deploy(run: Run, names: Sequence[str], out: Path) -> list[Bundle | Verified | Unmeasured]:
    """Take the recipe's model to every target named; outside the budget, a target gives its verdict and no bundle.

    What this machine cannot run is bundled unmeasured, to be verified where it can.
    """
    check_output(run.recipe, list(names), out)
    epoch()  # a fault in it is told before anything is built
    return [way(run, name).ship(out) for name in names]


def way(run: Run, name: str) -> Deployment:
    """Give the recipe's way to a target, searched for where its precision is left open."""
    precision = run.recipe.precision
    return choose(run, name) if precision == "auto" else Deployment(run, name, precision)
