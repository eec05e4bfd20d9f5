"""A bundle's model built again on the device: used when it is whole, refused when it is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitferry import targets
from bitferry.device import commands, rebuilt, runner
from bitferry.device.errors import InputError, StageFailed, TargetUnavailable
from bitferry.device.whole import sha256
from bitferry.pipeline.bundle import write_runner
from tests.conftest import Project

NAMES = ("openvino", "onnxruntime")


@pytest.fixture(params=NAMES)
def bundle(request: pytest.FixtureRequest, deployed: Project, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed.folder / f"dist/small-{request.param}-1.0.0", tmp_path / "bundle"))


@pytest.fixture
def openvino(deployed: Project, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed.folder / "dist/small-openvino-1.0.0", tmp_path / "bundle"))


def run(bundle: Path, *command: str) -> int:
    return commands.main(targets.get(json.loads((bundle / "manifest.json").read_text())["target"]), bundle, command)


@pytest.fixture
def foreign(openvino: Path) -> Path:
    """Give a bundle whose own file, as it was shipped, does not load here, as an engine for another GPU."""
    (openvino / "model.xml").write_text("<net/>")
    mend(openvino, "model.xml")
    return openvino


def mend(bundle: Path, name: str) -> None:
    """Let the manifest list a file as it is now."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = sha256(bundle / name)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_what_runs_as_it_was_shipped_is_not_built_again(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, "rebuild") == 0
    assert "runs here as it was shipped; nothing was built" in capsys.readouterr().out
    assert not (bundle / "rebuilt").exists()


def test_what_does_not_load_here_is_built_again_and_runs(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(foreign, "selftest") == 2
    assert run(foreign, "rebuild") == 0
    assert "rebuilt/model." in capsys.readouterr().out
    assert not (foreign / ".rebuilt").exists()
    assert run(foreign, "check") == 0
    assert "and as rebuilt here" in capsys.readouterr().out
    assert run(foreign, "selftest", "--json") == 0
    told = capsys.readouterr()
    assert "the model runs as rebuilt here" in told.err
    found = json.loads(told.out)
    assert found["passed"]
    assert found["rebuilt"]
    note = json.loads((foreign / "rebuilt/manifest.json").read_text())
    manifest = json.loads((foreign / "manifest.json").read_text())
    assert note["from"]["sha256"] == manifest["files"]["model.onnx"]["sha256"]
    assert note["runtime"]["version"] == manifest["environment"]["version"]
    assert note["options"] == manifest["model"]["options"]


def test_the_bundle_s_own_program_rebuilds(foreign: Path) -> None:
    write_runner(foreign / "run.pyz", "openvino")  # of the files as they are now
    mend(foreign, "run.pyz")
    done = subprocess.run([sys.executable, foreign / "run.pyz", "rebuild"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert runner.Runner(foreign, targets.get("openvino")).rebuilt


def test_nobody_s_rebuilt_model_runs_in_place_of_one_that_loads(
    openvino: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever can write a folder could otherwise have any model run beside a signature that stays right."""
    manifest = runner.read_manifest(openvino)
    rebuilt.rebuild(openvino, manifest, targets.get("openvino"), runner.options_of(targets.get("openvino"), {}))
    spoil(openvino / "rebuilt")
    assert run(openvino, "selftest", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rebuilt"] is False


def test_a_rebuilt_model_that_answers_otherwise_fails(foreign: Path) -> None:
    assert run(foreign, "rebuild") == 0
    spoil(foreign / "rebuilt")
    assert run(foreign, "selftest", "--json") != 0


def spoil(folder: Path) -> None:
    """Let all weights be zero, as the manifest beside them says."""
    weights = folder / "model.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    note = json.loads((folder / "manifest.json").read_text())
    note["files"]["model.bin"] = sha256(weights)
    (folder / "manifest.json").write_text(json.dumps(note))


def damage_file(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"x")


def add_file(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")


def remove_file(folder: Path) -> None:
    (folder / "model.xml").unlink()


def damage_note(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def change_source(folder: Path) -> None:
    note = json.loads((folder / "manifest.json").read_text())
    note["from"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(note))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (damage_file, "see model.bin"),
        (add_file, "see extra.bin"),
        (remove_file, "see model.xml"),
        (damage_note, "manifest.json cannot be used"),
        (change_source, "built from another model.onnx"),
    ],
)
def test_a_damaged_rebuilt_model_is_refused_until_it_is_built_again(
    foreign: Path, harm: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(foreign, "rebuild") == 0
    harm(foreign / "rebuilt")
    for command in ("check", "selftest"):
        assert run(foreign, command) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "run `python run.pyz rebuild` again, or remove the folder" in error
    assert run(foreign, "rebuild") == 0
    assert run(foreign, "check") == 0


def compiler(**changes: Any) -> Any:
    """A target of which only what is named differs from one that works."""

    def works(model: Path, out: Path, *, precision: str, options: object) -> None:
        out.write_bytes(model.read_bytes())

    found = SimpleNamespace(unmeasured=None, runtime="none", version="1", device="none")
    given = {"CONSUMES": "onnx", "environment": lambda *, options: found, "compile": works}
    return SimpleNamespace(**(given | changes))


def fails(error: Exception) -> Any:
    def compile(model: Path, out: Path, *, precision: str, options: object) -> None:
        out.write_bytes(b"half")
        raise error

    return compile


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"CONSUMES": "exported"}, InputError, "compiles from PyTorch"),
        ({"environment": lambda *, options: SimpleNamespace(unmeasured="no GPU")}, TargetUnavailable, "no GPU"),
        ({"compile": fails(ModuleNotFoundError("no", name="onnx"))}, TargetUnavailable, "the Python package 'onnx'"),
        ({"compile": fails(RuntimeError("boom\nand more"))}, StageFailed, "the compiler refused .*model.onnx: boom$"),
        ({"compile": fails(InputError("not so"))}, InputError, "^not so$"),
    ],
)
def test_what_cannot_be_rebuilt_leaves_the_last_one(openvino: Path, changes: Any, kind: type, told: str) -> None:
    manifest = runner.read_manifest(openvino)
    before = rebuilt.rebuild(openvino, manifest, compiler(), None).read_bytes()
    with pytest.raises(kind, match=told):
        rebuilt.rebuild(openvino, manifest, compiler(**changes), None)
    found = rebuilt.find(openvino, manifest)
    assert found is not None
    assert found.read_bytes() == before
    runner.check(openvino, manifest)


def test_a_rebuild_that_was_killed_does_no_harm(foreign: Path) -> None:
    for leftover in (".rebuilt", ".rebuilt.old"):
        (foreign / leftover).mkdir()
        (foreign / leftover / "model.bin").write_bytes(b"half")
    assert run(foreign, "check") == 0
    assert run(foreign, "rebuild") == 0
    assert not (foreign / ".rebuilt").exists()
    assert not (foreign / ".rebuilt.old").exists()
