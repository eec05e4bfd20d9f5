"""`bitferry quickstart`: the whole path once, what it says, and that a second run goes on from what is there."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EMBEDDED, ROOT, Project, plain_environment


@pytest.fixture(scope="module")
def toured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str, dict[str, Any]]:
    """A folder in which the tour was made, what it said, and what it gave."""
    folder = Project(tmp_path_factory.mktemp("toured"))
    done = folder.bitferry("quickstart", "--out", "tour", "--target", "onnxruntime", "--explain", "--json")
    assert done.returncode == 0, done.stderr
    return folder, done.stderr, json.loads(done.stdout)


def test_the_tour_ends_with_a_verified_bundle_that_answers(toured: tuple[Project, str, dict[str, Any]]) -> None:
    folder, _, found = toured
    assert (folder.folder / found["written"]["bundle"] / "run.pyz").is_file()
    assert found["verdicts"][0]["outcome"] == "pass"
    assert re.match(r"tour/photo.png\t.*Ankle boot \d", found["answer"])
    assert all(seconds >= 0 for seconds in found["seconds"].values())


def test_each_stage_says_why_what_was_written_and_the_command_alone(
    toured: tuple[Project, str, dict[str, Any]],
) -> None:
    folder, said, _ = toured
    for number, name in enumerate(("data", "train", "quantize", "trace", "export", "compile", "verify"), start=1):
        assert f"{number} of 8: {name} " in said
    for written in re.findall(r"^done in [\d.]+ s: (.+)$", said, re.MULTILINE):
        assert (folder.folder / written).exists()
    alone = re.findall(r"^  alone: bitferry (.+)$", said, re.MULTILINE)
    assert [command.split()[0] for command in alone] == [
        "train", "quantize", "trace", "export", "compile", "verify", "deploy"
    ]  # fmt: skip
    done = folder.bitferry(*alone[4].split())  # and so it goes on from what is there
    assert done.returncode == 0, done.stderr
    assert " done in " not in done.stderr


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    user = Project(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    assert "bitferry did not make it" in user.refused("quickstart", "--out", "mine")
    assert "did you mean 'openvino'" in user.refused("quickstart", "--target", "openvin")


def test_an_installed_package_has_the_images(tmp_path: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    building: list[str | Path] = [
        uv,
        "build",
        "--quiet",
        "--offline",
        "--no-build-isolation",
        "--wheel",
        "--out-dir",
        tmp_path,
        ROOT,
    ]
    subprocess.run(building, check=True, env=plain_environment(VIRTUAL_ENV=sys.prefix))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in ("calibration.npz", "evaluation.npz"):
            assert archive.read(f"pipeline/tour/{name}") == (EMBEDDED / name).read_bytes()
    assert "pipeline/tour/LICENSE" in names
    assert "pipeline/report/fragment.html.jinja" in names
