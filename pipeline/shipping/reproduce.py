"""A bundle and its recipe → the same bundle built again from nothing, compared file by file."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

import targets
from device import runner
from device.errors import InputError, first_line
from pipeline import bundle as bundling
from pipeline import cache, progress
from pipeline.measure import golden
from pipeline.recipe import Quantization, read
from pipeline.run import Deployment, Run

State = Literal["same", "different", "missing", "extra"]
MANIFEST = "manifest.json"
TAKEN = "taken from the bundle"
DAMAGED = "not as the manifest says"


@dataclass(frozen=True)
class File:
    """One file of the bundle beside the one that was built again."""

    name: str
    kind: Literal["built", "measured"]
    state: State
    """`missing` is built again and not in the bundle, `extra` is in the bundle and not built again."""
    why: str | None = None
    """What is known of it; None where nothing."""


@dataclass(frozen=True)
class Reproduction:
    """What building again from the recipe gave."""

    bundle: str
    recipe: str
    files: tuple[File, ...]
    changed: tuple[str, ...]
    """What the bundle was built from that is otherwise here, which is why files differ where they do."""

    @property
    def same(self) -> bool:
        """Say whether every file came out the same."""
        return all(file.state == "same" for file in self.files)


def reproduce(bundle: Path, recipe: Path, build: Path | None = None, *, trust: bool = False) -> Reproduction:
    """Build a bundle again from its recipe in an empty folder, and compare every file.

    What was measured is taken from the bundle, for no measurement comes out twice. Raises InputError when the folder
    is not empty, the recipe is of another bundle, or the manifest does not say how the bundle was built.
    """
    manifest = runner.read_manifest(bundle)
    if build is None:
        with tempfile.TemporaryDirectory() as folder:
            return _again(bundle, manifest, recipe, Path(folder), trust)
    if build.exists() and not (build.is_dir() and not any(build.iterdir())):
        raise InputError(f"{build} is not empty; what was built before must not be taken for what is built now")
    return _again(bundle, manifest, recipe, build, trust)


def _again(bundle: Path, manifest: dict[str, Any], recipe: Path, build: Path, trust: bool) -> Reproduction:
    try:
        way, epoch = _way(manifest, recipe, build, trust), manifest["provenance"]["source_date_epoch"]
        before, cpus = manifest["provenance"], int(manifest["provenance"]["machine"]["cpus"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ValidationError):
            error = ValueError(error.errors()[0]["msg"])
        told = f"{bundle}/{MANIFEST} does not say how it was built ({first_line(error)})"
        raise InputError(f"{told}; only bundles of this bitferry's can be built again") from error
    folder = build / "bundle"
    with _cpus(cpus), progress.timed("reproduce", str(bundle)):
        program, compiled = way.program, way.compiled
        files = golden.make(way.run.evaluation, program.baseline.preprocessing, way.run.build)
        origin = replace(way.origin, epoch=epoch)
        made = bundling.assemble(folder, origin, program, compiled, files, partial(_take, bundle))
    here: Any = made["provenance"]
    # The machine is an input of what was measured; what it changed in a built file shows there.
    made |= {"verdict": manifest["verdict"], "provenance": here | {"machine": before["machine"]}}
    bundling.write_manifest(folder, made)
    found = tuple(_compared(bundle, folder, manifest, made))
    machine = here["machine"] | {"cpus": targets.usable_cpus()}
    changed = tuple(_differences(before, here | {"machine": machine}))
    return Reproduction(str(bundle), str(recipe), found, changed)


def _way(manifest: Mapping[str, Any], path: Path, build: Path, trust: bool) -> Deployment:
    """Give the way that the bundle was built: the recipe's, with what a search or the command line chose."""
    origin, model, name = manifest["provenance"], manifest["model"], manifest["target"]
    given = origin["recipe"]
    recipe = read(path, precision=given["precision"], minutes=given["search"]["minutes"])
    if recipe.name != manifest["name"]:
        raise InputError(f"recipe {path} is '{recipe.name}', but the bundle was built from '{manifest['name']}'")
    target = targets.get(name)
    if model["precision"] not in target.SCHEMES:
        raise InputError(f"target '{name}' cannot run {model['precision']}; it runs {', '.join(target.SCHEMES)}")
    options = runner.options_of(target, model["options"])
    settings = Quantization.model_validate(origin["quantization"]) if origin["quantization"] else None
    run = Run(recipe, path, cache.Cache(build / recipe.name), trust)
    return Deployment(run, name, model["precision"], options=options, quantization=settings)


@contextmanager
def _cpus(count: int) -> Iterator[None]:
    """Use no more CPUs than the bundle was built with: the sums of training come out by their number (on Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(usable)[: max(1, count)])
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def _take(bundle: Path, folder: Path) -> None:
    """Copy what was measured."""
    for name in bundling.MEASURED:
        if not (bundle / name).is_file():
            raise InputError(f"{bundle} has no {name}, which cannot be measured again; copy the bundle again")
        shutil.copyfile(bundle / name, folder / name)


def _compared(bundle: Path, folder: Path, manifest: Mapping[str, Any], made: Mapping[str, object]) -> Iterator[File]:
    there, here = ({*bundling.contents(one), MANIFEST} for one in (bundle, folder))
    for name in sorted(there | here):
        listed = manifest["files"].get(name, {})
        if name not in there or name not in here:
            yield File(name, "built", "extra" if name in there else "missing")
        elif name in bundling.MEASURED:
            whole = cache.file_hash(bundle / name) == listed.get("sha256")
            yield File(name, "measured", "same" if whole else "different", TAKEN if whole else DAMAGED)
        elif cache.file_hash(bundle / name) == cache.file_hash(folder / name):
            yield File(name, "built", "same")
        elif name == MANIFEST:
            keys = [key for key in {**manifest, **made} if manifest.get(key) != _plain(made.get(key))]
            yield File(name, "built", "different", f"in {', '.join(keys)}" if keys else None)
        else:
            whole = cache.file_hash(bundle / name) == listed.get("sha256")
            yield File(name, "built", "different", _varies(name, manifest, folder) if whole else DAMAGED)


def _varies(name: str, manifest: Mapping[str, Any], folder: Path) -> str | None:
    """Say why a compiler may give other bytes for the same input, and whether the input is the same here."""
    note = manifest["provenance"]["varies"].get(name)
    if note is None:
        return None
    source = folder / note["made_of"]
    same = source.is_file() and cache.file_hash(source) == note["made_of_sha256"]
    return f"{note['reason']}; {note['made_of']}, of which it is made, is {'the same' if same else 'another'} here"


def _plain(value: object) -> object:
    """Turn a value into what JSON gives back for it."""
    return json.loads(json.dumps(value))


def _differences(before: object, here: object, where: str = "") -> Iterator[str]:
    """Name each value that is another here, by its path in the provenance."""
    if isinstance(before, dict) and isinstance(here, dict):
        for key in {**before, **here}:
            yield from _differences(before.get(key), here.get(key), f"{where}.{key}".removeprefix("."))
    elif before != _plain(here):
        yield f"{where} was {json.dumps(before)} and is {json.dumps(here)} here"


def show(found: Reproduction, *, as_json: bool) -> int:
    """Print what came out; give the exit code."""
    if as_json:
        print(json.dumps(asdict(found) | {"same": found.same}, indent=2))
        return 0 if found.same else 1
    console = Console()
    for file in found.files:
        why, colour = f" ({file.why})" if file.why else "", "green" if file.state == "same" else "red"
        console.print(f"[{colour}]{file.state:9}[/] {escape(file.name + why)}", soft_wrap=True)
    other = sum(file.state != "same" for file in found.files)
    console.print(f"{other} of {len(found.files)} files differ" if other else "every file came out the same")
    for line in found.changed:
        console.print(f"     {escape(line)}", soft_wrap=True)
    return 0 if found.same else 1
