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

from pydantic import BaseModel, PositiveInt, ValidationError
from rich.console import Console
from rich.markup import escape

from bitferry import targets
from bitferry.device import runner
from bitferry.device.errors import InputError
from bitferry.pipeline import bundle as bundling
from bitferry.pipeline import cache, progress
from bitferry.pipeline.measure import golden
from bitferry.pipeline.recipe import Quantization, read
from bitferry.pipeline.run import Deployment, Run

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


class _Search(BaseModel):
    minutes: float


class _Chosen(BaseModel):
    precision: str
    search: _Search


class _Machine(BaseModel):
    cpus: PositiveInt


class _Varies(BaseModel):
    reason: str
    made_of: str
    made_of_sha256: str


class _Stated(BaseModel):
    """The part of a manifest's provenance that building again goes by."""

    recipe: _Chosen
    quantization: Quantization | None
    varies: dict[str, _Varies]
    source_date_epoch: int | None
    machine: _Machine


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
    stated = _stated(bundle, manifest)
    way, folder = _way(manifest, stated, recipe, build, trust), build / "bundle"
    with _cpus(stated.machine.cpus), progress.timed("reproduce", str(bundle)):
        program, compiled = way.program, way.compiled
        files = golden.make(way.run.evaluation, program.baseline.preprocessing, way.run.build)
        origin = replace(way.origin, epoch=stated.source_date_epoch)
        made = bundling.assemble(folder, origin, program, compiled, files, partial(_take, bundle))
    before, here = manifest["provenance"], _plain(made["provenance"])
    # The machine is an input of what was measured; what it changed in a built file shows there.
    made |= {"verdict": manifest.get("verdict"), "provenance": here | {"machine": before["machine"]}}
    bundling.write_manifest(folder, made)
    found = tuple(_compared(bundle, folder, manifest, stated))
    here["machine"]["cpus"] = targets.usable_cpus()
    return Reproduction(str(bundle), str(recipe), found, tuple(_differences(before, here)))


def _stated(bundle: Path, manifest: Mapping[str, Any]) -> _Stated:
    """Read how the bundle was built; raise InputError where that, or a measured file, is not there."""
    if absent := [name for name in bundling.MEASURED if not (bundle / name).is_file()]:
        raise InputError(f"{bundle} has no {', '.join(absent)}, which was measured: copy the bundle again")
    try:
        return _Stated.model_validate(manifest.get("provenance"))
    except ValidationError as error:
        first = error.errors()[0]
        told = ".".join(map(str, ("provenance", *first["loc"]))) + f": {first['msg']}"
        raise InputError(f"{bundle}/{MANIFEST} does not say how the bundle was built ({told}); deploy again") from error


def _way(manifest: Mapping[str, Any], stated: _Stated, path: Path, build: Path, trust: bool) -> Deployment:
    """Give the way that the bundle was built: the recipe's, with what a search or the command line chose."""
    model, name = manifest["model"], manifest["target"]
    recipe = read(path, precision=stated.recipe.precision, minutes=stated.recipe.search.minutes)
    if recipe.name != manifest.get("name"):
        raise InputError(f"recipe {path} is '{recipe.name}', but the bundle is of '{manifest.get('name')}'")
    target = targets.get(name)
    if model["precision"] not in target.SCHEMES:
        raise InputError(f"target '{name}' cannot run {model['precision']}; it runs {', '.join(target.SCHEMES)}")
    options = runner.options_of(target, model["options"])
    run = Run(recipe, path, cache.Cache(build / recipe.name), trust)
    bits = model.get("weight_bits")  # which older bundles do not say
    if bits not in (None, 7, 8):
        raise InputError(f"{MANIFEST} says that int8 weights have {bits!r} bits; expected 7 or 8")
    return Deployment(
        run, name, model["precision"], options=options, quantization=stated.quantization, weight_bits=bits
    )


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
        shutil.copyfile(bundle / name, folder / name)


def _compared(bundle: Path, folder: Path, manifest: Mapping[str, Any], stated: _Stated) -> Iterator[File]:
    there, here = ({*bundling.contents(one), MANIFEST} for one in (bundle, folder))
    for name in sorted(there | here):
        if name not in there or name not in here:
            yield File(name, "built", "extra" if name in there else "missing")
            continue
        digests = [cache.file_hash(one / name) for one in (bundle, folder)]
        whole = name == MANIFEST or digests[0] == _listed(manifest, name)
        if name in bundling.MEASURED:
            yield File(name, "measured", "same" if whole else "different", TAKEN if whole else DAMAGED)
        elif digests[0] == digests[1]:
            yield File(name, "built", "same")
        else:
            why = _keys(bundle, folder) if name == MANIFEST else _varies(stated.varies.get(name), folder)
            yield File(name, "built", "different", why if whole else DAMAGED)


def _listed(manifest: Mapping[str, Any], name: str) -> str | None:
    entry = manifest["files"].get(name)
    return entry.get("sha256") if isinstance(entry, dict) else None


def _keys(bundle: Path, folder: Path) -> str:
    """Name the parts of two manifests that differ."""
    there, here = (json.loads((one / MANIFEST).read_bytes()) for one in (bundle, folder))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return f"in {', '.join(keys)}" if keys else "written in another way"


def _varies(note: _Varies | None, folder: Path) -> str | None:
    """Say why a compiler may give other bytes for the same input, and whether the input is the same here."""
    if note is None:
        return None
    source = folder / note.made_of
    same = source.is_file() and cache.file_hash(source) == note.made_of_sha256
    return f"{note.reason}; {note.made_of}, of which it is made, is {'the same' if same else 'another'} here"


def _plain(value: object) -> Any:
    """Turn a value into what JSON gives back for it."""
    return json.loads(json.dumps(value))


def _differences(before: object, here: object, where: str = "") -> Iterator[str]:
    """Name each value that is another here, by its path in the provenance."""
    if isinstance(before, dict) and isinstance(here, dict):
        for key in {**before, **here}:
            yield from _differences(before.get(key), here.get(key), f"{where}.{key}".removeprefix("."))
    elif before != here:
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
