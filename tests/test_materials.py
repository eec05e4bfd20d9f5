"""The bill of materials: valid by CycloneDX's own schema, whole, and silent about what was not measured."""

import hashlib
import json
import re
import shutil
import socket
from importlib import metadata
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from bitferry.device.errors import InputError
from bitferry.pipeline.report import record
from bitferry.pipeline.shipping import materials, provenance
from tests.conftest import ROOT, Project

TARGETS = ("openvino", "onnxruntime")


def bundle_of(project: Project, target: str) -> Path:
    return project.folder / f"dist/small-{target}-1.0.0"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def faults(text: str) -> object:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


def model_of(bill: dict[str, Any]) -> dict[str, Any]:
    (model,) = [part for part in bill["components"] if part["type"] == "machine-learning-model"]
    return dict(model)


@pytest.fixture
def copy(deployed: Project, tmp_path: Path) -> Path:
    """A bundle's folder without its bill and manifest, as the bill is written into."""
    made = Path(shutil.copytree(bundle_of(deployed, "openvino"), tmp_path / "copy"))
    (made / materials.FILE).unlink()
    (made / "manifest.json").unlink()
    return made


@pytest.fixture
def manifest(deployed: Project) -> dict[str, Any]:
    return read(bundle_of(deployed, "openvino") / "manifest.json")


def written(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write a bill anew, check it by the schema, and read it."""
    (folder / materials.FILE).unlink(missing_ok=True)
    materials.write(folder, manifest, record.read_built(folder / record.VERDICT))
    assert faults((folder / materials.FILE).read_text()) is None
    return read(folder / materials.FILE)


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_valid_and_lists_every_file_with_its_hash(deployed: Project, target: str) -> None:
    bundle = bundle_of(deployed, target)
    text = (bundle / materials.FILE).read_text()
    assert faults(text) is None
    bill = json.loads(text)
    files = {part["name"]: part["hashes"][0]["content"] for part in bill["components"] if part["type"] == "file"}
    present = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    assert set(files) == set(present) - {materials.FILE, "manifest.json"}
    for name, digest in files.items():
        assert digest == hashlib.sha256(present[name].read_bytes()).hexdigest(), name
    del bill["components"][0]["name"]
    assert faults(json.dumps(bill)) is not None  # the schema does look


@pytest.mark.parametrize("target", TARGETS)
def test_the_model_s_card_has_the_verdict_s_figures_with_their_bounds(deployed: Project, target: str) -> None:
    bundle = bundle_of(deployed, target)
    found, card = record.read_verdict(bundle / record.VERDICT), model_of(read(bundle / materials.FILE))["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    (drop,) = [one for one in metrics if one["type"] == "drop of top-1, percentage points"]
    judged = found.accuracy.judged
    bounds = (drop["confidenceInterval"]["lowerBound"], drop["confidenceInterval"]["upperBound"])
    assert [float(one) for one in (drop["value"], *bounds)] == pytest.approx(
        [judged.drop_pp, judged.drop_lower_pp, judged.drop_upper_pp]
    )
    right = [float(one["value"]) for one in metrics if one["type"] == "top-1, percent"]
    assert right == pytest.approx([judged.float_percent, judged.percent])
    (median,) = [one for one in metrics if one["type"] == "latency, 50th percentile, ms"]
    assert float(median["value"]) == pytest.approx(found.latency.artifact.timing.percentiles[0].ms)
    assert float(median["confidenceInterval"]["upperBound"]) >= float(median["value"])
    assert not [one for one in metrics if one["type"].startswith("throughput")]  # --quick measures none
    parameters = card["modelParameters"]
    assert parameters["inputs"] == [{"format": "uint8 N×16×16×3, RGB pixels"}]
    assert parameters["modelArchitecture"] == "module:smallmodel:make"
    assert [one["name"] for one in parameters["datasets"]] == ["calibration.npz", "evaluation.npz", "train.npz"]


def test_what_was_not_measured_is_absent(copy: Path, manifest: dict[str, Any]) -> None:
    fields = read(copy / record.VERDICT) | {"outcome": "unmeasured"}
    kept = {name: value for name, value in fields.items() if name not in ("accuracy", "latency", "execution")}
    (copy / record.VERDICT).write_text(json.dumps(kept))
    manifest["provenance"]["model"]["trained"] = False
    card = model_of(written(copy, manifest))["modelCard"]
    assert set(card) == {"modelParameters"}
    assert "approach" not in card["modelParameters"]  # nobody knows how given weights were trained


@pytest.mark.parametrize("target", TARGETS)
def test_it_names_no_machine_no_folder_and_no_time(deployed: Project, target: str) -> None:
    text = (bundle_of(deployed, target) / materials.FILE).read_text()
    assert str(deployed.folder) not in text
    assert f'"{socket.gethostname()}"' not in text
    assert not re.search(r"20\d\d-\d\d-\d\dT", text)


def test_a_time_is_named_only_when_one_is_given(
    copy: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(provenance.EPOCH, "1000000000")
    manifest["provenance"]["source_date_epoch"] = provenance.epoch()
    assert written(copy, manifest)["metadata"]["timestamp"] == "2001-09-09T01:46:40Z"
    monkeypatch.setenv(provenance.EPOCH, "yesterday")
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH is 'yesterday'; expected whole seconds since 1970"):
        provenance.epoch()


def test_its_number_comes_from_what_it_says(deployed: Project, copy: Path, manifest: dict[str, Any]) -> None:
    first = written(copy, manifest)
    assert first == read(bundle_of(deployed, "openvino") / materials.FILE)
    (copy / "model.bin").write_bytes(b"other weights")
    assert written(copy, manifest)["serialNumber"] != first["serialNumber"]


def test_what_runs_is_told_from_what_only_built(deployed: Project) -> None:
    bill = read(bundle_of(deployed, "openvino") / materials.FILE)
    packages = {part["name"]: part for part in bill["components"] if part["type"] == "library"}
    assert {name for name, part in packages.items() if part["scope"] == "required"} == {"openvino", "numpy", "pillow"}
    assert packages["openvino"]["purl"] == f"pkg:pypi/openvino@{version('openvino')}"
    assert packages["openvino"]["licenses"] == [{"expression": "Apache-2.0"}]
    assert packages["torchmetrics"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]  # says so as a class only
    assert packages["torch"]["scope"] == "excluded"
    needed = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}["file:run.pyz"]
    assert needed == ["package:numpy", "package:openvino", "package:pillow"]


def test_a_local_version_is_written_as_a_package_url_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materials, "version", lambda _: "2.14.1+cpu")
    assert materials._package("torch", required=True)["purl"] == "pkg:pypi/torch@2.14.1%2Bcpu"


def test_the_model_s_licence_is_the_recipe_s(copy: Path, manifest: dict[str, Any]) -> None:
    assert "licenses" not in model_of(written(copy, manifest))
    manifest["provenance"]["recipe"]["license"] = "Apache-2.0 OR MIT"
    assert model_of(written(copy, manifest))["licenses"] == [{"expression": "Apache-2.0 OR MIT"}]


def test_a_licence_that_is_no_expression_is_refused(project: Project) -> None:
    project.edit(('version = "1.0.0"', 'version = "1.0.0"\nlicense = "see file://LICENSE"'))
    assert "license: " in project.refused("compile", "small.toml")


def test_bitferry_s_own_licence_travels_along(
    deployed: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (ROOT / "LICENSE").read_text()
    assert (bundle_of(deployed, "openvino") / materials.LICENSE).read_text() == own
    monkeypatch.setattr(materials, "SOURCES", tmp_path)  # installed, there is no checkout
    assert materials.license_text() == own
    monkeypatch.setattr(materials, "SOURCES", ROOT)
    monkeypatch.setattr(metadata.PathDistribution, "read_text", lambda *_: None)  # or it is not with what is installed
    assert materials.license_text() == own
