"""A passed artifact → the folder that is shipped: model, ONNX, manifest and a runner without torch."""

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bitferry import targets
from bitferry.device import rebuilt, runner, whole
from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache, progress
from bitferry.pipeline.artifacts import Bundle, Compiled, Program, Quantized, QuantizedOnnx, Unmeasured, Verified
from bitferry.pipeline.measure import golden
from bitferry.pipeline.own_source import shipped
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.report import record
from bitferry.pipeline.shipping import materials
from bitferry.pipeline.shipping.provenance import Origin, provenance, tied
from bitferry.pipeline.verdict import Built

ROOT = '"""What of bitferry runs on a device."""\n'
"""The root package of what is shipped; here it is the engineer's interface."""
EXPECTED = "golden/expected.json"
MEASURED = (record.VERDICT, record.ANSWERS, EXPECTED)
"""The files that hold what was measured; of all others the same inputs give the same bytes."""
MAIN = """\"\"\"Wire the runner to this bundle's target.\"\"\"

import sys
from pathlib import Path

from bitferry.device.commands import main
from bitferry.targets import {target}

sys.exit(main({target}, Path(__file__).resolve().parents[1]))
"""
AGENT = """\"\"\"Run the device's own program.\"\"\"

import sys

try:
    from bitferry.device.agent import main
except ImportError as error:
    print(f"error: this needs the Python package '{error.name}': pip install {error.name}", file=sys.stderr)
    sys.exit(2)
sys.exit(main())
"""


def folder_name(recipe: Recipe, target: str) -> str:
    """Name the bundle's folder: <recipe>-<target>-<version>."""
    return f"{recipe.name}-{target}-{recipe.version}"


def check_output(recipe: Recipe, names: list[str], out: Path) -> None:
    """Raise InputError when `out`, or a bundle's folder in it, is something that bitferry did not make."""
    cache.own(out)
    for name in names:
        place = out / folder_name(recipe, name)
        cache.recover(place)
        if place.is_symlink() or (place.exists() and not _is_bundle(place)):
            raise InputError(f"{place} exists and is no bundle of bitferry's; move it away or name another OUT")


def bundle(origin: Origin, program: Program, compiled: Compiled, verified: Verified | Unmeasured, out: Path) -> Bundle:
    """Write OUT/<recipe>-<target>-<version>/, replacing an older build of the same version."""
    check_output(origin.recipe, [compiled.target], out)
    final = out / folder_name(origin.recipe, compiled.target)
    temporary = out / f".{final.name}"
    with cache.locked(out / ".lock", "bundle"), progress.timed("bundle", compiled.target):
        shutil.rmtree(temporary, ignore_errors=True)
        measured = partial(_measured, verified, program.baseline.preprocessing)
        manifest = assemble(temporary, origin, program, compiled, verified.golden, measured)
        write_manifest(temporary, manifest)
        cache.publish(temporary, final)
    size = sum(path.stat().st_size for path in final.rglob("*"))
    progress.stage("bundle", f"{final} ({size / 1e6:.1f} MB)")
    return Bundle(final, verified, size)


def assemble(
    folder: Path,
    origin: Origin,
    program: Program,
    compiled: Compiled,
    files: Path,
    measured: Callable[[Path], None],
) -> dict[str, object]:
    """Make a bundle's folder of built files and measured ones, and give its manifest.

    `files` is the folder of golden files; `measured` puts in what was measured. All else is the same bytes for the
    same inputs.
    """
    shutil.copytree(compiled.path.parent, folder)
    if targets.get(compiled.target).CONSUMES == "onnx" and not (folder / rebuilt.SOURCE).exists():
        shutil.copyfile(compiled.source.path, folder / rebuilt.SOURCE)
    write_runner(folder / "run.pyz", compiled.target)
    (folder / materials.LICENSE).write_text(materials.license_text())
    shutil.copytree(files, folder / "golden")
    measured(folder)
    found = record.read_built(folder / record.VERDICT)
    manifest = _manifest(origin, program, compiled, found)
    materials.write(folder, manifest, found)
    return manifest | {"files": {name: _entry(folder, name) for name in contents(folder)}}


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write `manifest.json`."""
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def contents(folder: Path) -> list[str]:
    """List a bundle's files without its manifest, and without what was compiled again on the device."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(
        file.as_posix() for file in files if file.parts[0] not in {*whole.PARTS, whole.SIGNATURE, "manifest.json"}
    )


def _entry(folder: Path, name: str) -> dict[str, object]:
    path, kind = folder / name, "measured" if name in MEASURED else "built"
    return {"sha256": cache.file_hash(path), "size_bytes": path.stat().st_size, "kind": kind}


def _measured(verified: Verified | Unmeasured, contract: Preprocessing, folder: Path) -> None:
    record.write_figures(verified, folder, private=False)
    expected = golden.expected(verified.verdict.golden, verified.golden_scores, contract)
    (folder / EXPECTED).write_text(expected)


def write_runner(path: Path, target: str) -> None:
    """Pack the runner, the target's own module and what they import into a zipapp, the same bytes every time."""
    own = {f"bitferry/targets/{target}.py": targets.source(target).read_text()}
    _pack({"__main__.py": MAIN.format(target=target)} | own, path)


def write_agent(path: Path) -> None:
    """Pack the program of a device into a zipapp, the same bytes every time."""
    _pack({"__main__.py": AGENT}, path)


def _pack(contents: dict[str, str], path: Path) -> None:
    """Write a zipapp of these modules and all of ours that they import."""
    contents = shipped(contents.values()) | {"bitferry/__init__.py": ROOT} | contents
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(contents.items()):
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)


def _manifest(origin: Origin, program: Program, compiled: Compiled, found: Built) -> dict[str, object]:
    """Give all of a manifest but its files."""
    recipe, model = origin.recipe, program.baseline
    return {
        "format": runner.FORMAT,
        "schema": runner.SCHEMA,
        "name": recipe.name,
        "version": recipe.version,
        "target": compiled.target,
        "model": {
            "file": compiled.path.name,
            "precision": compiled.precision,
            "weight_bits": _weight_bits(program),
            "options": asdict(compiled.options),
        },
        "preprocessing": asdict(model.preprocessing),
        "preprocessing_sha256": model.preprocessing.sha256(),
        "calibration": asdict(program.calibration) if isinstance(program, Quantized | QuantizedOnnx) else None,
        "task": recipe.task,
        "classes": model.classes,
        "verdict": {"file": record.VERDICT, "outcome": found.outcome, "headline": found.headline},
        "environment": asdict(found.environment),
        "tied": tied(compiled, found, _weight_bits(program)),
        "provenance": provenance(origin, compiled),
    }


def _weight_bits(program: Program) -> int | None:
    """Give the bits of int8 weights; None where nothing was quantized."""
    return program.scheme.weight_bits if isinstance(program, Quantized | QuantizedOnnx) else None


def _is_bundle(folder: Path) -> bool:
    try:
        runner.read_manifest(folder)
    except InputError:
        return False
    return True
