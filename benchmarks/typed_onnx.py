"""What TensorRT builds without a GPU: sizes, and what it costs to settle the types of the ONNX.

    python benchmarks/typed_onnx.py RECIPE... [--build build]

ONNX Runtime runs the ONNX that the engine was built from, operator by operator on the CPU, except in bfloat16, in which
it has no convolutions. SQNR is that of the scores of the first evaluation images against the float model.
"""

import argparse
import tempfile
from pathlib import Path

from bitferry import targets
from bitferry.device.arrays import Outputs
from bitferry.pipeline import recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.export import answer
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager
from bitferry.targets import Precision

IMAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    parser.add_argument("--build", type=Path, default=Path("build"), help="where stages keep their output")
    options = parser.parse_args()
    for path in options.recipes:
        run = Run(recipe.read(path), path, Cache(options.build / recipe.read(path).name))
        wanted = eager(run.model.module())(run.evaluation.images[:IMAGES].copy())
        print(f"{run.recipe.name} | engine MB | ONNX MB | SQNR dB as exported | SQNR dB typed")
        for precision in targets.get("tensorrt").SCHEMES:
            print(row(run, precision, wanted), flush=True)


def row(run: Run, precision: Precision, wanted: Outputs) -> str:
    """Build an engine of the precision and measure the ONNX before and after its types were settled."""
    target, given = targets.get("tensorrt"), Deployment(run, "tensorrt", precision).simplified.path
    images = run.evaluation.images[:IMAGES].copy()
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "model.engine"
        target.compile(given, engine, precision=precision, options=target.Options(cache=""))
        typed = engine.with_suffix(".onnx")
        sizes = [f"{file.stat().st_size / 1e6:.1f}" for file in (engine, typed)]
        files = (given,) if precision == "bfloat16" else (given, typed)
        noise = [f"{sqnr_db(wanted, answer(file, images)):.1f}" for file in files]
    return " | ".join([precision, *sizes, *noise])


if __name__ == "__main__":
    main()
