"""The steps of quantization, each alone and together: SQNR of the scores in PyTorch and on a target, and seconds.

    python benchmarks/quantization.py RECIPE... [--target openvino] [--only 'NAME;NAME'] [--build build]

SQNR is that of the scores on the evaluation images against the float model's; seconds are those of the whole stage,
torch.export and saving with it. Prints a table for each recipe and keeps it in benchmarks/results/.
"""

import argparse
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bitferry import targets
from bitferry.pipeline import recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import artifact_answers, eager, float_answers

HERE = Path(__file__).parent
PLAIN = {"observer": "mean-minmax", "equalize": False, "bias_correction": "none"}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "minmax": PLAIN | {"observer": "minmax"},
    "percentile": PLAIN | {"observer": "percentile"},
    "mse": PLAIN | {"observer": "mse"},
    "histogram": PLAIN | {"observer": "histogram"},
    "mean-minmax": PLAIN,
    "scores": PLAIN | {"observer": "scores"},
    "mean-minmax, equalize": PLAIN | {"equalize": True},
    "mean-minmax, fast bias": PLAIN | {"bias_correction": "fast"},
    "mean-minmax, full bias": PLAIN | {"bias_correction": "full"},
    "default": {},
    "default, full bias": {"bias_correction": "full"},
    "default, rounding by layers": {"rounding": "layers"},
    "default, learned ranges": {"ranges": "learned"},
    "default, both": {"rounding": "layers", "ranges": "learned"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    parser.add_argument("--target", default="openvino")
    parser.add_argument("--only", help="some of the ways, separated by semicolons")
    parser.add_argument("--iterations", type=int, default=Quantization().iterations)
    parser.add_argument("--build", type=Path, default=Path("build"), help="where stages keep their output")
    options = parser.parse_args()
    ways = {name: WAYS[name] for name in (options.only.split(";") if options.only else WAYS)}
    kept: dict[str, list[dict[str, Any]]] = {}
    for path in options.recipes:
        kept[path.stem] = rows = []
        print(f"\n| {path.stem} | PyTorch dB | {options.target} dB | seconds |\n|---|---|---|---|", flush=True)
        for name, settings in ways.items():
            row = {"way": name} | measure(path, dict(settings) | {"iterations": options.iterations}, options)
            rows.append(row)
            print(f"| {name} | {row['torch']:.2f} | {row['target']:.2f} | {row['seconds']:.1f} |", flush=True)
    isa = targets.cpu_isa()
    out = HERE / f"results/{datetime.now(UTC):%Y-%m-%d}-quantization-{isa[-1] if isa else 'cpu'}.json"
    out.write_text(json.dumps({"isa": isa, "threads": targets.usable_cpus(), "recipes": kept}) + "\n")


def measure(path: Path, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Quantize one way and give what it is worth; seconds mean nothing where the stage was in the cache."""
    whole = recipe.read(path).model_copy(update={"quantization": Quantization(**settings)})
    run = Run(whole, path, Cache(options.build / whole.name))
    baseline = float_answers(run.model, run.evaluation, run.build).scores
    deployment = Deployment(run, options.target, "int8")
    start = time.perf_counter()
    program = deployment.program
    seconds = time.perf_counter() - start
    answer, images = eager(program.module()), run.evaluation.images
    found = np.concatenate([answer(images[i : i + 8].copy()) for i in range(0, len(images), 8)])
    scores = artifact_answers(deployment.compiled, run.evaluation, run.build).scores
    return {
        "settings": settings,
        "torch": sqnr_db(baseline, found),
        "target": sqnr_db(baseline, scores),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
