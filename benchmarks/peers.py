"""bitferry against its peers: NNCF by hand, ONNX Runtime's `quantize_static`, plain PT2E, and Olive.

    python benchmarks/peers.py RECIPE... [--seconds 30] [--threads N] [--build build] [--peers nncf,onnxruntime,pt2e]
                               [--nncf PYTHON] [--olive PYTHON] [--no-auto] [--jobs [ROUNDS]] [--readme]
    python benchmarks/peers.py --readme

All get the same float model, the ONNX that bitferry compiles from with the normalization of the pixels inside, and the
same calibration images, uint8 N×H×W×3; plain PT2E gets the PyTorch model and the images. NNCF and Olive quantize in
environments of their own, whose interpreters are named (`make bench` makes NNCF's); what they give is loaded here. All
are timed interleaved in this process at batch 1 with the same threads and the same settings of the runtime; on OpenVINO
what stays in float runs in float32. SQNR is that of the scores on all evaluation images against the float model's.

A recipe's own settings of its targets are left out; `precision = "auto"` has the threads of the others too. A way that
fails is a row that says why. `--jobs` runs whole jobs in turns, each from an image file or array to figures: `bitferry
deploy` with an empty cache (a model that is trained here comes trained), and the peers' scripts (`peer_nncf.py job`).
Each takes the threads it takes by itself. An environment without compiled bytecode, as uv makes one by default, pays
for that in its job: pip compiles it, and so does `make bench`.

Prints tables and sentences and keeps every sample in benchmarks/results/, a file for each recipe. `--readme` writes
what the newest of each recipe says between the marks in README.md, in short, and in docs/peers.md, whole.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, result_path
from peer_jobs import rounds
from peer_table import markdown, summary
from peer_ways import ONNXRUNTIME, OPENVINO, Peers, Way, every_way

from bitferry import targets
from bitferry.device.arrays import Outputs, Predict
from bitferry.device.errors import InputError, first_line
from bitferry.device.timing import Call
from bitferry.pipeline import recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.division import drawn
from bitferry.pipeline.measure import accuracy, latency
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.run import Run
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import float_answers

ROOT = Path(__file__).parents[1]
OPEN, CLOSE = "<!-- peers -->\n", "<!-- /peers -->\n"
PEERS = ("nncf", "onnxruntime", "pt2e", "olive")
AT_ONCE = 64
"""Evaluation images of one call of a Predict."""


def compare(path: Path, peers: Peers, options: argparse.Namespace) -> dict[str, Any]:
    """Give everything that is kept of one recipe, and the versions of the peers in environments of their own."""
    run = _run(path, options, "int8")
    if run.recipe.task == "segmentation":
        raise InputError(f"{path}: the peers are compared on classifiers only, not on segmentation")
    auto = _run(path, options, "auto") if options.auto else None
    baseline = float_answers(run.model, run.evaluation, run.build).scores
    with tempfile.TemporaryDirectory() as folder:
        ways, versions = every_way(run, auto, peers, Path(folder))
        rows = measure(run, ways, baseline, options.seconds)
        jobs = rounds(run, peers, options.jobs, Path(folder)) if options.jobs else {"seconds": {}, "left_out": {}}
    return {
        "name": run.recipe.name,
        "metric": run.recipe.metric,
        "float_percent": accuracy.percent(baseline, run.evaluation, run.recipe),
        "calibration_images": len(drawn(run.calibration.images, run.recipe.quantization.first_images)),
        "images": len(run.evaluation),
        "versions": versions,
        "ways": rows,
        "jobs": jobs,
    }


def _run(path: Path, options: argparse.Namespace, precision: str) -> Run:
    """Read a recipe with the same threads for both runtimes, and nothing else that it sets for them."""
    given: Recipe = recipe.read(path, precision=precision)
    same = given.model_copy(
        update={"targets": {name: {"threads": options.threads} for name in (OPENVINO, ONNXRUNTIME)}}
    )
    return Run(same, path, Cache(options.build / given.name))


def measure(run: Run, ways: Sequence[Way], baseline: Outputs, seconds: float) -> list[dict[str, Any]]:
    """Give a row for each way: the quality of its answers, its size and every sample of its latency."""
    torch.set_num_threads(1)  # nothing of PyTorch's runs, and its threads shall not wait beside
    image = run.evaluation.images[:1].copy()
    rows: list[dict[str, Any]] = []
    calls: dict[str, Call] = {}
    for index, way in enumerate(ways):
        rows.append({"peer": way.peer, "name": way.name, "runtime": way.runtime, "why": way.why})
        if way.path:
            try:
                predict = _load(run, way, way.path)
                rows[-1] |= _quality(run, baseline, predict) | {"bytes": _bytes(way.path)}
                calls[str(index)] = partial(predict, image)
            except Exception as error:  # noqa: BLE001 - a runtime may refuse a peer's file with anything
                rows[-1]["why"] = f"{type(error).__name__}: {first_line(error)}"
    for name, one in latency.interleave(calls, seconds=seconds).items():
        rows[int(name)]["microseconds"] = np.round(1e6 * one.seconds, 1).tolist()
    return rows


def _load(run: Run, way: Way, path: Path) -> Predict:
    target = targets.get(way.runtime)
    predict: Predict = target.load(
        path, precision=way.precision, options=way.options or run.recipe.options(way.runtime)
    )
    return predict


def _quality(run: Run, baseline: Outputs, predict: Predict) -> dict[str, Any]:
    images = run.evaluation.images
    scores = np.concatenate([predict(images[i : i + AT_ONCE].copy()) for i in range(0, len(images), AT_ONCE)])
    noise = sqnr_db(baseline, scores)
    return {
        "sqnr_db": None if noise == np.inf else noise,
        "percent": accuracy.percent(scores, run.evaluation, run.recipe),
    }


def _bytes(path: Path) -> int:
    """Count an IR's two files, or an ONNX file alone: nothing else of that name lies beside them."""
    return sum(one.stat().st_size for one in path.parent.glob(f"{path.stem}.*") if one.suffix != ".json")


def keep(name: str, found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Write what was found of a recipe with what it was measured with."""
    packages = {"bitferry": "bitferry", "torchao": "torchao", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    kept = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "isa": targets.cpu_isa(),
        "threads": options.threads,
        "versions": {title: version(name) for name, title in packages.items()} | found.pop("versions"),
        "recipe": found,
    }
    result_path(f"peers-{name}").write_text(json.dumps(kept) + "\n")
    return kept


def newest() -> list[dict[str, Any]]:
    """Read the newest kept result of each recipe; by the files' names, which begin with the date."""
    files = {path.name[len("2026-01-01") :]: path for path in sorted(RESULTS.glob("*-peers-*.json"))}
    if not files:
        raise InputError(f"no results of this benchmark are in {RESULTS}")
    return [json.loads(path.read_text()) for _, path in sorted(files.items())]


def write(root: Path = ROOT) -> None:
    """Put the newest kept results between the marks."""
    every = newest()
    for path, text in {
        root / "README.md": summary(every),
        root / "docs/peers.md": "\n".join(markdown(kept) for kept in every),
    }.items():
        before, opened, rest = path.read_text().partition(OPEN)
        _, closed, after = rest.partition(CLOSE)
        if not opened or not closed:
            raise InputError(f"{path} lacks the lines {OPEN.strip()} and {CLOSE.strip()}")
        path.write_text(f"{before}{OPEN}\n{text}\n{CLOSE}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE")
    parser.add_argument("--seconds", type=float, default=30, help="of timing for each recipe (default: 30)")
    parser.add_argument("--threads", type=int, default=targets.usable_cpus())
    parser.add_argument("--build", type=Path, default=Path("build"), help="where stages keep their output")
    parser.add_argument("--peers", help=f"some of {','.join(PEERS)}; default: those that can run")
    parser.add_argument("--nncf", metavar="PYTHON", help="of an environment with NNCF")
    parser.add_argument("--olive", metavar="PYTHON", help="of an environment with Olive")
    parser.add_argument("--auto", action=argparse.BooleanOptionalAction, default=True, help="search the fastest, too")
    parser.add_argument("--jobs", type=int, nargs="?", const=3, default=0, metavar="ROUNDS", help="time whole jobs")
    parser.add_argument(
        "--readme", action="store_true", help="write the newest kept results into README.md and docs/peers.md"
    )
    options = parser.parse_args(arguments)
    if not options.recipes and not options.readme:
        parser.error("name a recipe, or --readme")
    if options.recipes:
        logging.disable(logging.WARNING)  # quantize_static and the exporters warn of what is done on purpose here
        peers = _peers(parser, options)
        for path in options.recipes:
            print(f"\n{markdown(keep(path.stem, compare(path, peers, options), options))}", end="", flush=True)
    if options.readme:
        write()


def _peers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Peers:
    """Read which peers are wanted; without a list those whose environment was named or is this one."""
    interpreters = {name: getattr(options, name) for name in ("nncf", "olive") if getattr(options, name)}
    default = [name for name in PEERS if name in interpreters or name not in ("nncf", "olive")]
    names = [name.strip() for name in options.peers.split(",")] if options.peers else default
    if strange := [name for name in names if name not in PEERS]:
        parser.error(f"no such peer: {', '.join(strange)}; there are {', '.join(PEERS)}")
    return Peers(names, interpreters)


if __name__ == "__main__":
    main()
