"""Ctrl-C at random moments of a deployment: every run must end by itself, with 130 or finished, and the next go on.

    python benchmarks/interrupt.py RECIPE [--target openvino,onnxruntime] [--runs 50] [--seed 0]

The first run is undisturbed and says how long one takes. Each further run gets a SIGINT at a random moment of that
time, as a terminal sends it (to all that was started), and half of them a second one up to five seconds later. A build
folder is used until a run finishes in it, then thrown away. Prints a line for each run and what came of all; ends with
1 when a run died of a signal, hung, or ended with any other code than 0, 1 and 130.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

BITFERRY = Path(sys.executable).with_name("bitferry")
FINISHED, STOPPED = (0, 1), 130
STARTED = 1.0
"""Seconds until Python has imported what handles the signal."""
LONGEST = 900.0
"""Seconds that a run may still take after its last SIGINT."""


@dataclass(frozen=True)
class Ended:
    """What came of one run."""

    code: int | None
    """None where it hung."""
    seconds: float
    """From its last SIGINT to its end."""
    said: str
    """The last line on stderr."""

    @property
    def right(self) -> bool:
        return self.code in (*FINISHED, STOPPED)


def run(command: list[str], moments: list[float]) -> Ended:
    """Start a run, and interrupt it at these seconds after its start."""
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=told, start_new_session=True, env=environment
        )
        last = time.monotonic()
        for moment, before in zip(moments, [0.0, *moments], strict=False):
            try:
                process.wait(moment - before)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)
                last = time.monotonic()
        code = _ended(process, LONGEST if moments else None)
        told.seek(0)
        lines = told.read().strip().splitlines() or [""]
    return Ended(code, time.monotonic() - last, lines[-1] if code in (*FINISHED, STOPPED) else "\n".join(lines[-40:]))


def _ended(process: subprocess.Popen[bytes], longest: float | None) -> int | None:
    try:
        return process.wait(longest)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def main() -> int:
    """Interrupt a number of runs, and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--target", default="openvino,onnxruntime")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance, counts, wrong, start = random.Random(given.seed), Counter[str](), 0, time.monotonic()  # noqa: S311
    with tempfile.TemporaryDirectory() as folder:
        build, out = Path(folder) / "build", Path(folder) / "dist"
        command = [str(BITFERRY), "deploy", str(given.recipe), "--target", given.target, "--precision", "auto"]
        command += ["--quick", "--build", str(build), "-o", str(out)]
        whole = run(command, [])
        print(f"undisturbed: exit {whole.code} after {whole.seconds:.0f} s", flush=True)
        fresh = True
        for number in range(given.runs):
            if time.monotonic() - start > 60 * given.minutes:
                break
            if fresh:
                shutil.rmtree(build)
            first = chance.uniform(STARTED, whole.seconds)
            moments = [first, first + chance.uniform(0, 5)] if number % 2 else [first]
            ended = run(command, moments)
            fresh = ended.code in FINISHED
            wrong += not ended.right
            counts[f"exit {ended.code}"] += 1
            told = ", ".join(f"{moment:.1f}" for moment in moments)
            print(
                f"{number}: SIGINT at {told} s: exit {ended.code}, {ended.seconds:.1f} s later: {ended.said}",
                flush=True,
            )
        last = run(command, [])
    print(f"{dict(counts)}; then undisturbed: exit {last.code}")
    return int(bool(wrong) or last.code not in FINISHED)


if __name__ == "__main__":
    sys.exit(main())
