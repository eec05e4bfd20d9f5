"""kill -9 at every stage, and run again: the result is that of an undisturbed run."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitferry.device import atomic, runner
from bitferry.pipeline import cache
from tests.conftest import BITFERRY, ROOT, Project, begun, plain_environment, write_project

STAGES = (
    "data", "train", "quantize", "export", "simplify", "compile", "baseline", "answers", "rung", "verify", "bundle"
)  # fmt: skip
TIMED = {"metrics.jsonl", "manifest.json", "verdict.json", "report.html", "bom.cdx.json"}
TRACES = ("quantize", "trace", "export")
COMMAND: list[str | Path] = [BITFERRY, "deploy", "small.toml", "--target", "openvino", "--quick"]


def digests(project: Project) -> dict[str, str]:
    """Hash what a deployment made, by path.

    Left out: what holds times; PyTorch's own archives and the ONNX as exported, which hold the
    exporting process's stack traces. What is made from those, the simplified ONNX and the artifact, is compared.
    """
    kept = sorted((project.folder / "build/small").glob("[a-z]*/*")) + sorted((project.folder / "dist").glob("*/*"))
    return {
        str(path.relative_to(project.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in kept
        if path.is_file() and path.name not in TIMED and path.parent.name.split("-")[0] not in TRACES
    }


def kill_when(stage: str, project: Project) -> None:
    """Start a deployment and kill it, with everything it started, as soon as it says that `stage` began."""
    with begun(COMMAND, stage, project) as running:
        time.sleep(0 if stage == "bundle" else 0.05)  # into the stage; the last takes milliseconds
        os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL or stage == "bundle"  # which may be done before the kill arrives


@pytest.mark.slow
def test_killed_at_every_stage_the_result_is_the_same(tmp_path: Path) -> None:
    undisturbed, killed = write_project(tmp_path / "undisturbed"), write_project(tmp_path / "killed")
    done = undisturbed.bitferry(*map(str, COMMAND[1:]))
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        kill_when(stage, killed)
        for bundle in killed.folder.glob("dist/small-*"):  # a kill may come just after the last rename
            runner.check(bundle, runner.read_manifest(bundle))
    done = killed.bitferry(*map(str, COMMAND[1:]))
    assert done.returncode == 0, done.stderr
    assert digests(killed) == digests(undisturbed)
    assert len(digests(killed)) > 10


KILLED = """
import os, sys
from pathlib import Path
from bitferry.device import atomic
from bitferry.pipeline import cache

if sys.argv[1] == "two renames":
    atomic._exchange = lambda one, other: False
count, rename = 0, os.rename

def counted(*places, **more):
    global count
    rename(*places, **more)
    count += 1
    if count == int(sys.argv[2]):
        os._exit(9)

os.rename = counted
cache.publish(Path(".new"), Path("bundle"))
"""


@pytest.mark.parametrize("system", ["exchange", "two renames"])
@pytest.mark.parametrize("renames", [1, 2])
def test_a_publication_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path, system: str, renames: int) -> None:
    for folder, text in (("bundle", "old"), (".new", "new")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").write_text(text)
    if system == "exchange" and not _exchanges(tmp_path / "trial"):
        pytest.skip("this system or file system cannot exchange two folders")
    command = [sys.executable, "-c", KILLED, system, str(renames)]
    done = subprocess.run(command, cwd=tmp_path, env=plain_environment(PYTHONPATH=str(ROOT)), check=False)
    assert done.returncode == (9 if renames == 1 or system == "two renames" else 0)
    if system == "two renames":
        cache.recover(tmp_path / "bundle")
    assert (tmp_path / "bundle/manifest.json").read_text() in ("old", "new")


def _exchanges(place: Path) -> bool:
    """Say whether two folders can trade places here."""
    (place / "one").mkdir(parents=True)
    (place / "other").mkdir()
    return atomic._exchange(place / "one", place / "other")
