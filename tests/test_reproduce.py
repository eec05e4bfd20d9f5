"""A bundle built again from its recipe: the same bytes, and where not, which files and why."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitferry import targets
from bitferry.device.errors import InputError
from bitferry.pipeline import own_source
from bitferry.pipeline.cache import file_hash
from bitferry.pipeline.report import record
from bitferry.pipeline.shipping import provenance, reproduce
from bitferry.pipeline.shipping.reproduce import File, Reproduction
from tests.conftest import ROOT, Project, plain_environment

FRESH = """
import sys
from pathlib import Path
from bitferry.pipeline.shipping.reproduce import reproduce, show
sys.exit(show(reproduce(Path(sys.argv[1]), Path(sys.argv[2])), as_json=True))
"""


def bundle_of(project: Project, target: str) -> Path:
    return project.folder / f"dist/small-{target}-1.0.0"


def manifest_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return found


def rewrite(bundle: Path, manifest: dict[str, Any]) -> None:
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.fixture
def again(deployed: Project, tmp_path: Path) -> Project:
    """A copy of the deployed project without anything that was built on the way."""
    made = shutil.copytree(deployed.folder, tmp_path / "project", ignore=shutil.ignore_patterns("build", "__pycache__"))
    return Project(Path(made))


def test_a_fresh_process_makes_every_file_again(again: Project) -> None:
    """With another seed of Python's hashes, and after the verdict was measured once more."""
    bundle = bundle_of(again, "openvino")
    manifest = manifest_of(bundle)
    rewrite(bundle, manifest | {"verdict": manifest["verdict"] | {"measured": {"images": 600}}})
    done = subprocess.run(
        [sys.executable, "-c", FRESH, bundle, again.recipe],
        capture_output=True, text=True, check=False, cwd=ROOT, env=plain_environment(PYTHONHASHSEED="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    assert not found["changed"]
    assert {file["state"] for file in found["files"]} == {"same"}
    present = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {file["name"] for file in found["files"]} == present
    measured = {file["name"] for file in found["files"] if file["kind"] == "measured"}
    assert measured == {"verdict.json", "answers.npz", "golden/expected.json"}


def test_a_processor_of_another_kind_gives_weights_as_many_bits_as_the_bundle_has(
    again: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself one without VNNI takes 7 bits, and one with it 8."""
    other = 15 - targets.int8_weight_bits()
    monkeypatch.setattr(targets, "int8_weight_bits", lambda: other)
    bundle = bundle_of(again, "onnxruntime")
    assert manifest_of(bundle)["model"]["weight_bits"] == 15 - other
    assert reproduce.reproduce(bundle, again.recipe).same


def test_each_difference_is_told_with_its_reason(again: Project, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = bundle_of(again, "onnxruntime")
    manifest = manifest_of(bundle)
    with (bundle / "answers.npz").open("ab") as stream:
        stream.write(b"x")
    (bundle / "golden/golden-1.jpg").unlink()
    (bundle / "extra.txt").write_text("x")
    (bundle / "model.onnx").write_bytes(b"another model")
    manifest["files"]["model.onnx"]["sha256"] = file_hash(bundle / "model.onnx")  # listed as it is
    manifest["provenance"]["tools"]["onnxsim"] = "0.1"
    manifest["provenance"]["data"]["calibration"]["sha256"] = "0"
    rewrite(bundle, manifest)
    again.recipe.write_text(again.recipe.read_text() + "# edited\n")
    found = reproduce.reproduce(bundle, again.recipe, again.folder / "empty")
    files = {file.name: file for file in found.files}
    assert not found.same
    assert files["answers.npz"] == File("answers.npz", "measured", "different", "not as the manifest says")
    assert files["golden/golden-1.jpg"].state == "missing"
    assert files["extra.txt"].state == "extra"
    assert files["model.onnx"] == File("model.onnx", "built", "different")
    assert files["run.pyz"].state == "same"
    assert files["manifest.json"].why == "in provenance, files"
    told = [line.partition(" was ")[0] for line in found.changed]
    assert told == ["recipe_file.sha256", "tools.onnxsim", "data.calibration.sha256"]
    assert reproduce.show(found, as_json=False) == 1
    printed = capsys.readouterr().out
    assert "different model.onnx" in printed
    assert 'tools.onnxsim was "0.1" and is ' in printed


def test_what_was_built_before_is_not_taken_for_built_now(again: Project) -> None:
    (again.folder / "used").mkdir()
    (again.folder / "used/file").touch()
    with pytest.raises(InputError, match="used is not empty"):
        reproduce.reproduce(bundle_of(again, "openvino"), again.recipe, again.folder / "used")


def test_another_model_s_recipe_is_refused(again: Project) -> None:
    again.edit(('name = "small"', 'name = "large"'))
    with pytest.raises(InputError, match="is 'large', but the bundle is of 'small'"):
        reproduce.reproduce(bundle_of(again, "openvino"), again.recipe)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"provenance": None}, "provenance: "),
        ({"provenance": {"recipe": {}}}, r"provenance\.recipe\.precision: "),
    ],
)
def test_a_manifest_that_does_not_say_how_is_refused(again: Project, change: dict[str, Any], told: str) -> None:
    bundle = bundle_of(again, "openvino")
    rewrite(bundle, manifest_of(bundle) | change)
    with pytest.raises(InputError, match=rf"does not say how the bundle was built \({told}.*deploy again"):
        reproduce.reproduce(bundle, again.recipe)


def test_without_what_was_measured_nothing_is_built(again: Project) -> None:
    bundle = bundle_of(again, "openvino")
    (bundle / "verdict.json").unlink()
    with pytest.raises(InputError, match=r"has no verdict\.json, which was measured"):
        reproduce.reproduce(bundle, again.recipe)


def test_it_is_built_with_what_a_search_chose(again: Project, tmp_path: Path) -> None:
    bundle = bundle_of(again, "openvino")
    manifest = manifest_of(bundle)
    manifest["provenance"]["quantization"] |= {"keep": ["first.0"], "rounding": "layers"}
    manifest["model"]["options"] |= {"rests": "bfloat16", "threads": 3}
    stated = reproduce._stated(bundle, manifest)
    way = reproduce._way(manifest, stated, again.recipe, tmp_path, trust=False)
    assert (way.precision, way.settings.keep, way.settings.rounding) == ("int8", ("first.0",), "layers")
    assert way.options == targets.get("openvino").Options(rests="bfloat16", threads=3)
    assert way.run.build.root == tmp_path / "small"


def test_a_compiler_that_varies_is_named_with_what_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"input")
    digest = file_hash(tmp_path / "model.onnx")
    note = reproduce._Varies(reason="it times kernels", made_of="model.onnx", made_of_sha256=digest)
    assert reproduce._varies(note, tmp_path) == "it times kernels; model.onnx, of which it is made, is the same here"
    (tmp_path / "model.onnx").write_bytes(b"other")
    assert str(reproduce._varies(note, tmp_path)).endswith("is another here")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux lets a process choose its CPUs")
def test_no_more_cpus_are_used_than_there() -> None:
    before = targets.usable_cpus()
    with reproduce._cpus(1):
        assert targets.usable_cpus() == 1
    assert targets.usable_cpus() == before


def test_all_is_well_only_when_all_is_the_same() -> None:
    same, other = File("a", "built", "same"), File("b", "built", "extra")
    assert Reproduction("b", "r", (same,), ()).same
    assert not Reproduction("b", "r", (same, other), ()).same


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True)


def test_a_commit_is_told_with_whether_the_files_are_its_own(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text("1")
    assert own_source.commit(tmp_path, [recipe]) == {"commit": None, "modified": None}
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "a.toml")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "other").touch()
    found = own_source.commit(tmp_path, [recipe])
    assert len(str(found["commit"])) == 40
    assert found["modified"] is False
    recipe.write_text("2")
    assert own_source.commit(tmp_path, [recipe]) == {"commit": found["commit"], "modified": True}


def test_an_artifact_is_tied_to_the_instructions_it_ran_with(deployed: Project) -> None:
    bundle = bundle_of(deployed, "openvino")
    found, tied = record.read_verdict(bundle / "verdict.json"), manifest_of(bundle)["tied"]
    assert f"{tied['os']} {tied['machine']}" == targets.system()
    assert tied["gpu"] is None
    assert set(tied["packages"]) == {"openvino", "numpy", "pillow"}
    there = replace(found.environment, isa=("avx2", "avx512_vnni", "amx_fp16"))
    assert provenance._instructions(replace(found, environment=there)) == ["avx2", "avx512_vnni"]
