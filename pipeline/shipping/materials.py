"""A bundle's bill of materials: `bom.cdx.json`, CycloneDX 1.6 with the model's card, made of contents alone."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache
from bitferry.pipeline.figures import Change, Latency
from bitferry.pipeline.own_source import SOURCES, version
from bitferry.pipeline.verdict import Built, Verdict

FILE, LICENSE = "bom.cdx.json", "LICENSE-bitferry.txt"
SPEC = "1.6"
NAMESPACE = uuid5(NAMESPACE_URL, "bitferry:bill-of-materials")
RUNNER = "run.pyz"
TASKS = {
    "classification": "image classification",
    "multilabel": "multi-label image classification",
    "segmentation": "semantic segmentation",
}
OUTPUTS = {"segmentation": "float32 N×{0}×{1}×{2}, a score for each class of each pixel"}
OSI = {
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "ISC License (ISCL)": "ISC",
}
"""Names of licences as packages classify themselves, where exactly one SPDX identifier is meant."""
MOST_NAME = 80
"""Characters of a licence's name; what is longer is the licence's text."""

Part = dict[str, Any]
"""An object of the bill, as JSON has it."""


def license_text() -> str:
    """Give bitferry's own licence, which covers run.pyz: as it is installed, or else from the checkout."""
    return metadata.distribution("bitferry").read_text("licenses/LICENSE") or (SOURCES / "LICENSE").read_text()


def write(folder: Path, manifest: Mapping[str, Any], found: Built) -> None:
    """Write the bill of all files that are in a bundle's folder; `manifest` is all of it but its files."""
    runs = manifest["tied"]["packages"]
    tools = {name: known for name, known in manifest["provenance"]["tools"].items() if name != "python"}
    packages = [_package(name, required=name in runs) for name in sorted({*tools, *runs})]
    needed = [part["bom-ref"] for part in packages if part["scope"] == "required"]
    files = [_file(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    bundle = {"type": "application", "bom-ref": "bundle", "name": f"{manifest['name']}-{manifest['target']}"}
    bill: Part = {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "version": 1,
        "metadata": {
            **_time(manifest["provenance"]["source_date_epoch"]),
            "tools": {"components": [_own()]},
            "component": {**bundle, "version": manifest["version"]},
        },
        "components": [_model(folder, manifest, found), *files, *packages],
        "dependencies": [
            {"ref": "bundle", "dependsOn": ["model", f"file:{RUNNER}"]},
            {"ref": f"file:{RUNNER}", "dependsOn": needed},
        ],
        "compositions": [{"aggregate": "incomplete", "dependencies": needed}],  # what they need in turn is left out
    }
    serial = uuid5(NAMESPACE, json.dumps(bill, sort_keys=True))
    (folder / FILE).write_text(json.dumps({"serialNumber": f"urn:uuid:{serial}", **bill}, indent=2) + "\n")


def _time(epoch: int | None) -> Part:
    if epoch is None:
        return {}
    return {"timestamp": datetime.fromtimestamp(epoch, UTC).isoformat().replace("+00:00", "Z")}


def _own() -> Part:
    return {"type": "application", "name": "bitferry", "version": metadata.version("bitferry"),
            "licenses": _licences("bitferry")}  # fmt: skip


def _file(path: Path, folder: Path) -> Part:
    name = path.relative_to(folder).as_posix()
    own = {"licenses": _licences("bitferry")} if name in (RUNNER, LICENSE) else {}
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": _hashes(path), **own}


def _hashes(path: Path) -> list[Part]:
    return [{"alg": "SHA-256", "content": cache.file_hash(path)}]


def _package(name: str, *, required: bool) -> Part:
    """Describe a Python package: one that runs the artifact, or one that only made it."""
    known, plain = version(name), re.sub(r"[-_.]+", "-", name).lower()
    purl = f"pkg:pypi/{plain}" + (f"@{quote(known, safe='')}" if known else "")
    part: Part = {"type": "library", "bom-ref": f"package:{plain}", "name": plain}
    part |= {"version": known} if known else {}
    part |= {"scope": "required" if required else "excluded", "purl": purl}
    licences = _licences(name)
    return part | ({"licenses": licences} if licences else {})


def _licences(package: str) -> list[Part]:
    """Give a package's licence as it states it itself; nothing where it states none in a line."""
    try:
        about: Mapping[str, Any] = metadata.metadata(package).json
    except metadata.PackageNotFoundError:
        return []
    if expression := about.get("license_expression"):
        return [{"expression": expression}]
    classes = [line.rpartition(" :: ")[2] for line in about.get("classifier", ()) if line.startswith("License ::")]
    if len(classes) == 1 and classes[0] in OSI:
        return [{"license": {"id": OSI[classes[0]]}}]
    text = str(about.get("license", "")).strip()
    return [{"license": {"name": text}}] if text and "\n" not in text and len(text) <= MOST_NAME else []


def _model(folder: Path, manifest: Mapping[str, Any], found: Built) -> Part:
    path, recipe = folder / manifest["model"]["file"], manifest["provenance"]["recipe"]
    licence = recipe.get("license")
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest["name"],
        "version": manifest["version"],
        "description": found.headline,
        **({"licenses": [{"expression": licence}]} if licence else {}),
        **({"hashes": _hashes(path)} if path.is_file() else {}),
        "modelCard": _card(manifest, found),
        "properties": [
            {"name": f"bitferry:{name}", "value": value}
            for name, value in (
                ("target", manifest["target"]),
                ("precision", manifest["model"]["precision"]),
                ("file", manifest["model"]["file"]),
                ("outcome", found.outcome),
            )
        ],
    }


def _card(manifest: Mapping[str, Any], found: Built) -> Part:
    origin, contract = manifest["provenance"], Preprocessing.from_json(manifest["preprocessing"])
    metrics = [*_metrics(found)] if isinstance(found, Verdict) else []
    form = OUTPUTS.get(manifest["task"], "float32 N×{0}, a score for each class")
    shape = "×".join(map(str, contract.shape))
    trained: Part = {"approach": {"type": "supervised"}} if origin["model"]["trained"] else {}
    card: Part = {
        "modelParameters": {
            **trained,
            "task": TASKS[manifest["task"]],
            "modelArchitecture": origin["recipe"]["model"]["source"],
            "datasets": [_dataset(role, one) for role, one in origin["data"].items()],
            "inputs": [{"format": f"uint8 N×{shape}, {contract.color} pixels"}],
            "outputs": [{"format": form.format(len(manifest["classes"]), contract.height, contract.width)}],
        }
    }
    return card | ({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {})


def _dataset(role: str, data: Mapping[str, Any]) -> Part:
    values = {"role": role, "images": str(data["images"]), "sha256 of pixels and labels": data["sha256"]}
    properties = [{"name": f"bitferry:{name}", "value": value} for name, value in values.items()]
    return {"type": "dataset", "name": data["name"], "contents": {"properties": properties}}


def _metrics(found: Verdict) -> Iterator[Part]:
    """Give the figures of a verdict with their bounds; what was not measured is not among them."""
    images = found.accuracy.images
    for change in (found.accuracy.judged, *found.accuracy.others):
        yield from _accuracy(change, f"{found.precision} on {found.target}", f"{images} evaluation images")
    yield from _latency(found.latency, found.environment.device)


def _accuracy(change: Change, artifact: str, images: str) -> Iterator[Part]:
    yield _metric(f"{change.metric}, percent", change.float_percent, f"float model, {images}")
    yield _metric(f"{change.metric}, percent", change.percent, f"{artifact}, {images}")
    bounds = change.drop_lower_pp, change.drop_upper_pp
    told = f"{artifact} against float model, {images}, paired; each bound one-sided at {change.confidence:g}"
    yield _metric(f"drop of {change.metric}, percentage points", change.drop_pp, told, *bounds)


def _latency(found: Latency, device: str) -> Iterator[Part]:
    where = f"{device}, threads {found.threads}, batch {found.batch}"
    artifact = found.artifact
    for one in artifact.timing.percentiles:
        told = f"{artifact.name} on {where}; upper bound at 0.99"
        yield _metric(f"latency, {one.percent}th percentile, ms", one.ms, told, None, one.at_most_ms)
    ratio, told = found.speedup, f"{artifact.name} on {where}; two-sided bounds at 0.95"
    yield _metric(f"speed-up over {found.eager.name}", ratio.value, told, ratio.lower, ratio.upper)
    if artifact.throughput:
        one_set = (
            f"{artifact.name} on {device}, streams {artifact.throughput.streams}, batch {artifact.throughput.batch}"
        )
        yield _metric("throughput, images per second", artifact.throughput.images_per_second, one_set)
    if artifact.footprint:
        yield _metric("peak memory, bytes", artifact.footprint.peak_memory_bytes, f"{artifact.name} on {device}")


def _metric(kind: str, value: float, told: str, lower: float | None = None, upper: float | None = None) -> Part:
    bounds = {"lowerBound": lower, "upperBound": upper}
    given = {name: f"{bound:.10g}" for name, bound in bounds.items() if bound is not None}
    metric: Part = {"type": kind, "value": f"{value:.10g}", "slice": told}
    return metric | ({"confidenceInterval": given} if given else {})
