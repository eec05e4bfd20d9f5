"""Every target × precision that this machine can build, for one or more recipes: one table of figures.

    python benchmarks/every_target.py RECIPE... [--seconds 60] [--build build]

All artifacts of a recipe are timed interleaved in one process with eager PyTorch, batch 1, the same threads. SQNR is
that of the scores on the evaluation images against the float model. What cannot run here is listed with the reason.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bitferry import targets
from bitferry.device.arrays import Outputs
from bitferry.device.errors import BitferryError
from bitferry.pipeline import recipe
from bitferry.pipeline.artifacts import Compiled
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.measure import accuracy, execution, latency
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import ratio_interval, sqnr_db
from bitferry.pipeline.verify import artifact_answers, eager, float_answers, load_artifact

HERE = Path(__file__).parent
EAGER = "eager PyTorch"
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    parser.add_argument("--seconds", type=float, default=60, help="of timing for each recipe (default: 60)")
    parser.add_argument("--build", type=Path, default=Path("build"), help="where stages keep their output")
    options = parser.parse_args()
    kept = {str(path.stem): measure(path, options.build, options.seconds) for path in options.recipes}
    isa = targets.cpu_isa()
    path = HERE / f"results/{datetime.now(UTC):%Y-%m-%d}-every-target-{isa[-1] if isa else 'cpu'}.json"
    path.write_text(json.dumps({"isa": isa, "threads": targets.usable_cpus(), "recipes": kept}) + "\n")


def measure(path: Path, build: Path, seconds: float) -> dict[str, object]:
    """Print one recipe's table; give its raw samples."""
    run = Run(recipe.read(path), path, Cache(build / recipe.read(path).name))
    baseline = float_answers(run.model, run.evaluation, run.build).scores
    made: dict[str, Compiled] = {}
    rows = {EAGER: cells(run, baseline, baseline, compiled=None)}
    for name in targets.names():
        for precision in schemes(name):
            label = f"{name} {precision}"
            try:
                compiled = Deployment(run, name, precision).compiled
                if compiled.environment.unmeasured:
                    rows[label] = {"size MB": size(compiled), "why": f"not measured: {compiled.environment.unmeasured}"}
                    continue
                scores = artifact_answers(compiled, run.evaluation, run.build).scores
                rows[label] = cells(run, baseline, scores, compiled=compiled)
                made[label] = compiled
            except BitferryError as error:
                rows[label] = {"why": f"not built: {error}"}
    samples = time(run, made, rows, seconds)
    show(f"{run.recipe.name}, {len(run.evaluation)} images", rows)
    return {"rows": rows, "seconds": samples}


def schemes(name: str) -> Sequence[targets.Precision]:
    """List the precisions of a target; none where it is not installed."""
    try:
        return tuple(targets.get(name).SCHEMES)
    except BitferryError as error:
        print(f"left out: {error}", file=sys.stderr)
        return ()


def time(run: Run, made: dict[str, Compiled], rows: dict[str, Row], seconds: float) -> dict[str, list[float]]:
    """Time all of them interleaved, and write the medians and ratios into their rows."""
    torch.set_num_threads(targets.usable_cpus())
    image = run.evaluation.images[:1].copy()
    calls = {EAGER: partial(eager(run.model.module()), image)}
    calls |= {label: partial(load_artifact(compiled), image) for label, compiled in made.items()}
    series = latency.interleave(calls, seconds=seconds)
    for label, one in series.items():
        value, low, high = ratio_interval(series[EAGER].block_medians, one.block_medians)
        rows[label] |= {"ms": f"{np.median(one.seconds) * 1e3:.2f}", "×": f"{value:.2f} ({low:.2f} to {high:.2f})"}
    return {label: one.seconds.tolist() for label, one in series.items()}


def cells(run: Run, baseline: Outputs, scores: Outputs, *, compiled: Compiled | None) -> Row:
    noise = sqnr_db(baseline, scores)
    return {
        "SQNR dB": "" if noise == np.inf else f"{noise:.1f}",
        "accuracy %": f"{accuracy.percent(scores, run.evaluation, run.recipe):.2f}",
        "size MB": size(compiled) if compiled else "",
        "ran": ran(compiled) if compiled else "float32",
    }


def size(compiled: Compiled) -> str:
    return f"{sum(p.stat().st_size for p in compiled.path.parent.rglob('*') if p.is_file()) / 1e6:.1f}"


def ran(compiled: Compiled) -> str:
    target = targets.get(compiled.target)
    layers = target.executed(compiled.path, precision=compiled.precision, options=compiled.options)
    told = execution.summary(compiled.precision, tuple(layers))
    return re.sub(r"^\w+ requested; ", "", told)


def show(title: str, rows: dict[str, Row]) -> None:
    columns = ["ms", "×", "SQNR dB", "accuracy %", "size MB", "ran"]
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for label, row in rows.items():
        found = [row.get(column, "") for column in columns]
        print(f"| {label} | {' | '.join(found if 'why' not in row else [*found[:-1], row['why']])} |")


if __name__ == "__main__":
    main()
