"""kill -9 at every stage, and run again: the result is that of an undisturbed run."""

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from device import runner
from tests.conftest import BITFERRY, Project, begun, write_project

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
