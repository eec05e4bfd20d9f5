"""`bitferry quickstart`: the whole path once, what it says, and that a second run goes on from what is there."""

import json
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EMBEDDED, ROOT, Project, plain_environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bitferry as it is published."""
    out, uv = tmp_path_factory.mktemp("wheel"), Path(sys.executable).with_name("uv")
    words: list[str | Path] = [
        uv,
        "build",
        "--quiet",
        "--offline",
        "--no-build-isolation",
        "--wheel",
        "--out-dir",
        out,
        ROOT,
    ]
    subprocess.run(words, check=True, env=plain_environment(VIRTUAL_ENV=sys.prefix))
    (made,) = out.glob("*.whl")
    return made


@dataclass(frozen=True)
class Installed(Project):
    """A folder of a user who has installed the wheel, and has no repository."""

    packages: Path

    def bitferry(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the installed command line in this folder."""
        program = (
            "import bitferry, sys; from bitferry.pipeline.cli import main; "
            f"assert bitferry.__file__.startswith({str(self.packages)!r}), bitferry.__file__; sys.argv[0] = 'bitferry'; main()"
        )
        return subprocess.run(
            [sys.executable, "-P", "-c", program, *arguments], cwd=self.folder, capture_output=True, text=True,
            check=False, env=plain_environment(PYTHONPATH=str(self.packages)),
        )  # fmt: skip


@pytest.fixture(scope="module")
def toured(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str, dict[str, Any]]:
    """A folder in which the tour of the installed wheel was made, what it said, and what it gave."""
    packages = tmp_path_factory.mktemp("packages")
    zipfile.ZipFile(wheel).extractall(packages)
    folder = Installed(tmp_path_factory.mktemp("toured"), packages)
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


def test_the_wheel_takes_one_name_and_has_the_images(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in ("calibration.npz", "evaluation.npz"):
            assert archive.read(f"bitferry/pipeline/tour/{name}") == (EMBEDDED / name).read_bytes()
    assert {name.partition("/")[0] for name in names} == {"bitferry", f"bitferry-{version('bitferry')}.dist-info"}
    for name in ("__init__.py", "py.typed", "pipeline/tour/LICENSE", "pipeline/report/fragment.html.jinja"):
        assert f"bitferry/{name}" in names
    assert not [name for name in names if "/tests/" in name or "/docs/" in name]
