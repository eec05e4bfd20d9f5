"""What is shipped: complete, described, checked, and run where there is no PyTorch."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from platform import machine
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitferry import targets
from bitferry.device import runner
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline.bundle import write_runner
from tests.conftest import EMBEDDED, ROOT, Project, plain_environment, subset, verdicts

TARGETS = ("openvino", "onnxruntime")


def bundle_of(project: Project, target: str) -> Path:
    return project.folder / f"dist/small-{target}-1.0.0"


def manifest_of(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return manifest


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("photo") / "photo.png"
    with np.load(EMBEDDED / "evaluation.npz") as arrays:
        Image.fromarray(arrays["images"][np.flatnonzero(arrays["labels"] == 1)[0]]).save(path)
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_the_manifest_lists_every_file_and_says_what_was_measured(deployed: Project, target: str) -> None:
    bundle = bundle_of(deployed, target)
    manifest = manifest_of(bundle)
    present = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == present
    assert {"model.onnx", "run.pyz", "verdict.json", "answers.npz", "golden/expected.json"} <= present
    for name, entry in manifest["files"].items():
        content = (bundle / name).read_bytes()
        kind = "measured" if name in ("verdict.json", "answers.npz", "golden/expected.json") else "built"
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content), "kind": kind}
    assert manifest["verdict"]["outcome"] == "pass"
    shipped, printed = json.loads((bundle / "verdict.json").read_text()), verdicts(deployed)[target]
    assert {name: shipped[name] for name in ("latency", "execution", "ladder", "golden")} == {
        name: printed[name] for name in ("latency", "execution", "ladder", "golden")
    }
    assert str(deployed.folder) not in (bundle / "verdict.json").read_text()
    assert manifest["classes"] == ["T-shirt", "Trouser", "Pullover"]
    assert Preprocessing.from_json(manifest["preprocessing"]).height == 16
    assert manifest["provenance"]["tools"]["torch"] == version("torch")
    bits = targets.int8_weight_bits()
    assert (manifest["model"]["weight_bits"], manifest["tied"]["vnni"]) == (
        bits,
        bits == 8 and machine().lower() in targets.X86,
    )


def test_every_field_of_the_manifest_is_documented(deployed: Project) -> None:
    document = (ROOT / "docs/manifest.md").read_text()
    manifest = manifest_of(bundle_of(deployed, "openvino"))
    for title, fields in (
        ("manifest.json", manifest),
        ("tied", manifest["tied"]),
        ("provenance", manifest["provenance"]),
    ):
        table = document.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)))
        assert named == list(fields), title
    assert f"`schema` is {runner.SCHEMA}" in document


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_in_a_bundle_names_this_machine_s_folders(deployed: Project, target: str) -> None:
    for path in bundle_of(deployed, target).rglob("*"):
        assert path.is_dir() or str(deployed.folder).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("target", TARGETS)
def test_the_runner_predicts_without_torch(deployed: Project, bare: Path, photo: Path, target: str) -> None:
    assert subprocess.run([bare, "-c", "import torch"], capture_output=True, check=False).returncode != 0
    run: list[str | Path] = [bare, bundle_of(deployed, target) / "run.pyz", "predict", photo, "--json", "--top", "3"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=plain_environment(), cwd="/")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["classes"][0] == "Trouser"
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-4)
    here = deployed.bitferry("predict", f"dist/small-{target}-1.0.0", str(photo), "--json")
    assert json.loads(here.stdout)["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)


def test_the_runner_tells_people_in_one_line(deployed: Project, bare: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    run: list[str | Path] = [bare, bundle_of(deployed, "openvino") / "run.pyz", "predict"]
    done = subprocess.run([*run, photo], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{photo}\tTrouser ")
    for image, message in ((tmp_path / "text.jpg", "not an image"), (tmp_path / "nowhere.png", "No such file")):
        done = subprocess.run([*run, image], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.fixture
def copy(deployed: Project, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_of(deployed, "openvino"), tmp_path / "copy"))


def checked(bundle: Path, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, bundle / "run.pyz", "check"], capture_output=True, text=True, check=False)


def test_an_altered_bundle_is_refused_and_every_file_named(copy: Path, photo: Path) -> None:
    assert checked(copy).returncode == 0
    content = bytearray((copy / "model.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.bin").write_bytes(content)
    (copy / "model.onnx").unlink()
    (copy / "extra.txt").write_text("x")
    done = checked(copy)
    assert done.returncode == 2
    for told in ("missing: model.onnx", "changed: model.bin", "extra: extra.txt"):
        assert told in done.stderr
    predicted = subprocess.run(
        [sys.executable, copy / "run.pyz", "predict", photo], capture_output=True, text=True, check=False
    )
    assert predicted.returncode == 2
    assert predicted.stdout == ""


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "other"}', "{" * 5000, '{"format": "bitferry-bundle", "schema": 99}']
)
def test_a_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    done = checked(copy)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_runner_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    write_runner(tmp_path / "a.pyz", "openvino")
    write_runner(tmp_path / "b.pyz", "openvino")
    assert (tmp_path / "a.pyz").read_bytes() == (tmp_path / "b.pyz").read_bytes()
    assert (tmp_path / "a.pyz").stat().st_size < 80_000


@pytest.mark.parametrize(("target", "carries"), [("openvino", False), ("tensorrt", True)])
def test_the_runner_carries_what_its_target_imports_and_no_more(tmp_path: Path, target: str, carries: bool) -> None:
    write_runner(tmp_path / "run.pyz", target)
    names = zipfile.ZipFile(tmp_path / "run.pyz").namelist()
    assert {"__main__.py", "bitferry/device/runner.py", f"bitferry/targets/{target}.py"} <= set(names)
    assert ("bitferry/device/engine.py" in names, "bitferry/device/retype.py" in names) == (carries, carries)
    assert sum(name.startswith("bitferry/targets/") for name in names) == 2
    assert {name.partition("/")[0] for name in names} == {"__main__.py", "bitferry"}


def test_softmax_is_stable_for_large_scores() -> None:
    probabilities = runner.softmax(np.array([[1000.0, 999.0, -1000.0]], dtype=np.float32))
    assert probabilities[0] == pytest.approx([0.731059, 0.268941, 0.0], abs=1e-5)


@pytest.mark.parametrize("name", ["files", "classes", "preprocessing"])
def test_a_manifest_that_lacks_something_is_refused(copy: Path, name: str) -> None:
    manifest = manifest_of(copy)
    del manifest[name]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = checked(copy)
    assert done.returncode == 2
    assert f"has no usable {name}" in done.stderr


def test_another_preprocessing_than_was_verified_is_refused(copy: Path) -> None:
    manifest = manifest_of(copy)
    manifest["preprocessing"]["color"] = "BGR"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "another preprocessing contract" in checked(copy).stderr


@pytest.mark.parametrize("option", [("--threads", "0"), ("--threads", "-1"), ("--top", "0")])
def test_an_impossible_option_is_refused(copy: Path, photo: Path, option: tuple[str, str]) -> None:
    command = [sys.executable, str(copy / "run.pyz"), "predict", str(photo), *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "must be 1 or more" in done.stderr


def test_a_bundle_carries_the_very_file_that_was_verified(deployed: Project, tmp_path: Path) -> None:
    """Also where the target does not compile from ONNX; nothing of the program it was made from is shipped."""
    project = Project(Path(shutil.copytree(deployed.folder, tmp_path / "project")))
    done = project.bitferry(
        "deploy", "small.toml", "--target", "torchscript", "--precision", "float32", *("--quick", "--out", "out")
    )
    assert done.returncode == 0, done.stderr
    bundle = project.folder / "out/small-torchscript-1.0.0"
    compiled = {path.read_bytes() for path in project.folder.glob("build/small/compile-*/model.ts")}
    assert (bundle / "model.ts").read_bytes() in compiled
    assert not list(bundle.glob("*.pt2"))
    run: list[str | Path] = [sys.executable, bundle / "run.pyz", "selftest"]
    shown = subprocess.run(run, capture_output=True, text=True, check=False, cwd="/")
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""


def test_an_unmeasured_bundle_is_completed_from_inside_its_own_folder(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitferry.pipeline import recheck  # noqa: PLC0415 - imports torch

    unmeasured = json.loads((copy / "verdict.json").read_text()) | {"outcome": "unmeasured"}
    kept = {name: value for name, value in unmeasured.items() if name not in ("accuracy", "latency", "execution")}
    (copy / "verdict.json").write_text(json.dumps(kept))
    manifest, content = manifest_of(copy), (copy / "verdict.json").read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    manifest["files"]["verdict.json"] = entry
    (copy / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(copy)
    for images in (100, 600):  # the last measurement is the one that counts
        np.savez(copy.parent / "evaluation.npz", **subset("evaluation", images))  # type: ignore[arg-type]
        assert recheck.verify(Path(), Path("../evaluation.npz"), effort="quick").images == images
        assert manifest_of(copy)["verdict"]["measured"]["images"] == images
    assert manifest_of(copy)["verdict"]["outcome"] == "pass"
