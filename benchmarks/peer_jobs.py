"""Whole jobs, bitferry's and its peers', run in turns on the same machine: seconds from the images to the figures."""

import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer_ways import Peers, command, quiet

from bitferry.pipeline import cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.run import Run

JUDGED = (0, 1)
"""The exit codes of a `bitferry deploy` that measured: inside the budget, and not."""


def rounds(run: Run, peers: Peers, count: int, folder: Path) -> dict[str, Any]:
    """Run every job `count` times, in an order shuffled for each round; one that fails is left out with the reason."""
    state = folder / "state.pt"
    torch.save(getattr(run.model.module(), "model").state_dict(), state)  # noqa: B009 - a Deployable's
    jobs: dict[str, Callable[[Path], float]] = {"bitferry": partial(_bitferry, run)}
    for peer in ("nncf", "olive"):
        if peer in peers.names:
            jobs[peer] = partial(_peer, run, peers, peer, state)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    left_out: dict[str, str] = {}
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    for turn in range(count):
        for name in order.sample(sorted(jobs), len(jobs)):
            if name not in left_out:
                out = folder / f"job-{turn}-{name}"
                out.mkdir()
                try:
                    seconds[name].append(jobs[name](out))
                except RuntimeError as error:
                    left_out[name] = str(error)
                shutil.rmtree(out)
    whole = {name: taken for name, taken in seconds.items() if name not in left_out and "bitferry" not in left_out}
    return {"seconds": whole, "left_out": left_out}


def _bitferry(run: Run, out: Path) -> float:
    """Deploy int8 to OpenVINO with an empty cache, but for training, which no peer does."""
    _prime(run, out / "build")
    words = [sys.executable, "-m", "bitferry.pipeline.cli", "deploy", str(run.path), "--target", "openvino"]
    words += ["--precision", "int8", "--build", str(out / "build"), "--out", str(out / "dist")]
    return _seconds(lambda: quiet(words, accepted=JUDGED))


def _prime(run: Run, build: Path) -> None:
    """Copy what training left: the weights, and the images that it saw."""
    if run.recipe.model.weights is None and not run.recipe.model.whole:
        root = build / run.recipe.name
        cache.own(root)
        for done in (run.weights.path.parent, _kept_in(run.training)):
            shutil.copytree(done, root / done.name)


def _kept_in(split: Split) -> Path:
    """Give the folder that a split's memory-mapped images lie in."""
    memory: Mapping[str, Any] = {"file": getattr(split.images, "filename", None)}
    return Path(memory["file"]).parent


def _peer(run: Run, peers: Peers, peer: str, state: Path, out: Path) -> float:
    return _seconds(lambda: quiet(command(peers, peer, "job", run.path, state, out)))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
