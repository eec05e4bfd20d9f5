"""A bundle's model built again on the device: used when it is whole, refused when it is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import targets
from device import commands, rebuilt, runner
from device.errors import InputError, StageFailed, TargetUnavailable
from device.whole import sha256
from pipeline.bundle import write_runner
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


def test_what_is_rebuilt_is_what_runs(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, "selftest", "--json") == 0
    assert "rebuilt" not in capsys.readouterr().err
    assert run(bundle, "rebuild") == 0
    assert "rebuilt/model." in capsys.readouterr().out
    assert not (bundle / ".rebuilt").exists()
    assert run(bundle, "check") == 0
    assert "and as rebuilt here" in capsys.readouterr().out
    assert run(bundle, "selftest", "--json") == 0
    told = capsys.readouterr()
    assert "the model runs as rebuilt here" in told.err
    assert json.loads(told.out)["passed"]
    note = json.loads((bundle / "rebuilt/manifest.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert note["from"]["sha256"] == manifest["files"]["model.onnx"]["sha256"]
    assert note["runtime"]["version"] == manifest["environment"]["version"]
    assert note["options"] == manifest["model"]["options"]


def test_the_bundle_s_own_program_rebuilds(openvino: Path) -> None:
    write_runner(openvino / "run.pyz", "openvino")  # of the files as they are now
    manifest = json.loads((openvino / "manifest.json").read_text())
    manifest["files"]["run.pyz"]["sha256"] = sha256(openvino / "run.pyz")
    (openvino / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run(
        [sys.executable, openvino / "run.pyz", "rebuild"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert runner.Runner(openvino, targets.get("openvino")).rebuilt


def test_a_rebuilt_model_is_the_one_that_is_loaded(openvino: Path) -> None:
    """Its weights are spoilt and its manifest mended: a runner that used the shipped file would not notice."""
    assert run(openvino, "rebuild") == 0
    weights = openvino / "rebuilt/model.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    note = json.loads((openvino / "rebuilt/manifest.json").read_text())
    note["files"]["model.bin"] = sha256(weights)
    (openvino / "rebuilt/manifest.json").write_text(json.dumps(note))
    assert run(openvino, "selftest", "--json") != 0
    shutil.rmtree(openvino / "rebuilt")
    assert run(openvino, "selftest", "--json") == 0


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
    openvino: Path, harm: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(openvino, "rebuild") == 0
    harm(openvino / "rebuilt")
    for command in ("check", "selftest"):
        assert run(openvino, command) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "run `python run.pyz rebuild` again, or remove the folder" in error
    assert run(openvino, "rebuild") == 0
    assert run(openvino, "check") == 0


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


def test_a_rebuild_that_was_killed_does_no_harm(openvino: Path) -> None:
    for leftover in (".rebuilt", ".rebuilt.old"):
        (openvino / leftover).mkdir()
        (openvino / leftover / "model.bin").write_bytes(b"half")
    assert run(openvino, "check") == 0
    assert run(openvino, "rebuild") == 0
    assert not (openvino / ".rebuilt").exists()
    assert not (openvino / ".rebuilt.old").exists()
