"""Recipes and command lines with faults, folders that are not ours, and Ctrl-C: told in one line, nothing touched."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import BITFERRY, Project, begun, half_made, write_project


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("accuracy_drop_pp", "accuracy_drop", "unknown key 'budget.accuracy_drop', did you mean 'accuracy_drop_pp'?"),
        ("[training]", "[trainig]", "unknown key 'trainig', did you mean 'training'?"),
        ("epochs = 6", 'epochs = "six"', "(found 'six')"),
        ("accuracy_drop_pp = 5.0", "accuracy_drop_pp = -1", "budget.accuracy_drop_pp: "),
        ("accuracy_drop_pp = 5.0", "accuracy_drop_pp = 101", "budget.accuracy_drop_pp: "),
        ("accuracy_drop_pp = 5.0", "min_speedup = 0", "budget.min_speedup: "),
        ('calibration = "calibration.npz"', 'calibration = "gone.npz"', "the data gone.npz does not exist"),
        ('source = "module', 'weights = "gone.pth"\nsource = "module', "gone.pth do not exist; put the file there"),
        ("[targets.openvino]", "[targets.opnvino]", "unknown target 'opnvino'; did you mean 'openvino'?"),
        ('name = "small"', 'name = "../small"', "(found '../small')"),
        ("[data]", "[data", "cannot be read: "),
    ],
)
def test_56_a_recipe_with_a_fault(project: Project, old: str, new: str, told: str) -> None:
    project.edit((old, new))
    before = {path.name for path in project.folder.iterdir()}
    assert told in project.refused("deploy", "small.toml")
    assert {path.name for path in project.folder.iterdir()} - before <= {"build", "dist", "__pycache__"}


def test_56_a_command_line_with_a_fault(project: Project) -> None:
    told = project.refused("deploy", "small.toml", "--target", "opnvino")
    assert "unknown target 'opnvino'; did you mean 'openvino'?" in told
    assert "gone.toml does not exist" in project.refused("deploy", "gone.toml")
    assert not (project.folder / "build").exists()


def test_56_a_recipe_that_is_no_text(project: Project) -> None:
    for content in (b"\xff\xfe\x00", b"\x00" * 100, b"a=" + b"[" * 100_000):
        project.recipe.write_bytes(content)
        assert "small.toml" in project.refused("deploy", "small.toml")


def test_56_a_budget_that_cannot_be_kept(deployed: Project, tmp_path: Path) -> None:
    strict = Project(Path(shutil.copytree(deployed.folder, tmp_path / "strict")))
    strict.edit(("accuracy_drop_pp = 5.0", "accuracy_drop_pp = 0.0\nmin_speedup = 1e9"))
    done = strict.bitferry("deploy", "small.toml", "--target", "onnxruntime", "--out", "new", "--quick")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not list((strict.folder / "new").glob("small-*"))


@pytest.mark.parametrize("option", ["--out", "--build"])
def test_57_a_folder_that_is_not_ours(project: Project, option: str) -> None:
    papers = project.folder / ("papers" if option == "--out" else "papers/small")
    papers.mkdir(parents=True)
    (papers / "thesis.txt").write_text("dear")
    line = project.refused("deploy", "small.toml", option, "papers")
    assert f"{papers.relative_to(project.folder)} is not empty and bitferry did not make it" in line
    assert [path.name for path in papers.iterdir()] == ["thesis.txt"]


def test_57_a_bundle_s_place_that_is_taken(deployed: Project, tmp_path: Path) -> None:
    taken = Project(Path(shutil.copytree(deployed.folder, tmp_path / "taken")))
    place = taken.folder / "dist/small-openvino-1.0.0"
    (place / "manifest.json").unlink()
    told = "small-openvino-1.0.0 exists and is no bundle of bitferry's"
    assert told in taken.refused("--quiet", "deploy", "small.toml", "--target", "openvino")
    assert (place / "model.xml").exists()
    shutil.rmtree(place)
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    assert told in taken.refused("--quiet", "deploy", "small.toml", "--target", "openvino")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("option", ["--out", "--build"])
def test_57_a_place_that_cannot_be_written(project: Project, option: str) -> None:
    (project.folder / "file").write_text("")
    assert "cannot be written to" in project.refused("deploy", "small.toml", option, "file/dist")
    assert "cannot be written to" in project.refused("deploy", "small.toml", option, "/proc/dist")


STAGES = ("data", "train", "quantize", "export", "simplify", "compile", "baseline", "answers", "verify")


def stop_when(stage: str, project: Project) -> tuple[int, str]:
    """Start a deployment and press Ctrl-C as soon as it says that `stage` began; give its exit code and last line."""
    command: list[str | Path] = [BITFERRY, "deploy", "small.toml", "--quick"]
    with begun(command, stage, project) as running:
        assert running.stderr is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of them
        rest = running.stderr.read()
    assert "Traceback" not in rest
    return running.returncode, rest.strip().splitlines()[-1]


@pytest.mark.slow
def test_58_ctrl_c_at_any_stage_stops_cleanly_and_the_next_run_goes_on(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    project.edit(("epochs = 6", "epochs = 20"))
    for stage in STAGES:
        code, last = stop_when(stage, project)
        assert (code, last.partition(";")[0]) == (130, "stopped"), stage
        assert not half_made(project.folder / "build/small", stage), stage
        assert not (project.folder / "dist/small-openvino-1.0.0").exists()
    done = project.bitferry("deploy", "small.toml", "--quick")
    assert done.returncode == 0, done.stderr
