"""What a cell is made from, by content: what makes a result reusable, and what a finding may blame."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from bitferry import targets
from bitferry.device import machine
from bitferry.pipeline import dataset
from bitferry.pipeline.cache import file_hash
from bitferry.pipeline.data.source import Source
from bitferry.pipeline.imports import beside, imported, normal, providing
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.nightly.night import Cell, Inputs
from bitferry.pipeline.own_source import own_commit, source_hash
from bitferry.pipeline.recipe import Recipe

BESIDES = (
    "pipeline/nightly/", "pipeline/report/", "pipeline/shipping/", "pipeline/cli", "pipeline/doctor", "pipeline/init",
)  # fmt: skip
"""Source files that no answer and no time depends on."""
RAYS_OWN = "thirdparty_files"
"""The folder of packages that Ray carries, and puts on its workers' path."""
IMPORTS = "model.imports"
"""What a model's own code imports, besides what it is."""
ELSEWHERE = {"name", "version", "license", "precision", "nightly", "data", "targets"}
"""Keys of a recipe that change no result, or are told otherwise."""


def inputs(recipe: Recipe, path: Path, cell: Cell, machine_facts: Mapping[str, str]) -> Inputs:
    """Read everything that a cell's result depends on; raise InputError for data that cannot be read."""
    return Inputs(
        recipe=_settings(recipe, cell.target) | _own_code(recipe, path.parent),
        data=_data(recipe, path),
        weights=_weights(recipe, path.parent),
        code=code(),
        commit=commit(),
        packages=installed(),
        machine=machine_facts,
    )


def key(cell: Cell, found: Inputs, kind: str, *, effort: Effort = "default", minutes: float | None = None) -> str:
    """Hash what the answers, the times and the verdict depend on.

    `kind` is that of the node that is to measure it, `effort` how long that takes, `minutes` how long a search.
    """
    how = [kind, platform.python_version(), effort, minutes if cell.precision == "auto" else None]
    parts = [cell.name, found.recipe, found.data, found.weights, found.code, how]
    packages = {name: found.packages[name] for name in sorted(used(cell, found) & found.packages.keys())}
    return hashlib.sha256(json.dumps([*parts, packages], sort_keys=True, default=dict).encode()).hexdigest()


def used(cell: Cell, found: Inputs) -> set[str]:
    """Name the distributions that bitferry, the target and the model's source need, directly or not."""
    modules = [_top(json.loads(found.recipe["model.source"])), *json.loads(found.recipe.get(IMPORTS, "[]"))]
    return _needed(cell.target) | _closure([normal(one) for module in modules for one in providing().get(module, ())])


def here() -> dict[str, str]:
    """Describe this machine as a finding would tell it."""
    found = machine.here()
    facts = {"cpu": found.cpu, "cpus": str(found.cpus), "isa": " ".join(targets.cpu_isa()), "system": found.system}
    return facts | {"python": platform.python_version(), "hostname": found.hostname}


@cache
def installed() -> dict[str, str]:
    """Give every installed distribution's version, by its normalized name."""
    every = (one for one in metadata.distributions() if RAYS_OWN not in str(one.locate_file("")))
    found = ((normal(one.name), one.version) for one in every)
    return dict(sorted(dict(reversed([*found])).items()))  # of two of one name the first on the path is imported


def _settings(recipe: Recipe, target: str) -> dict[str, str]:
    fields = recipe.model_dump(mode="json", exclude=ELSEWHERE)
    kind, _, name = recipe.model.source.partition(":")
    fields["model"]["weights"] = None
    fields["model"]["source"] = f"{kind}:{Path(name).name}" if recipe.model.whole else recipe.model.source
    if recipe.training.start and Path(recipe.training.start).is_file():
        fields["training"]["start"] = file_hash(Path(recipe.training.start))
    fields["classes"] = hashlib.sha256("\n".join(recipe.classes).encode()).hexdigest()[:16]
    flat = dict(_flat("", fields))
    return flat | dict(_flat(f"targets.{target}", recipe.targets.get(target, {})))


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    elif not isinstance(value, dict):
        yield prefix, json.dumps(value)


def _own_code(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Hash the Python files beside the recipe that a `module:` source may be made of."""
    kind, _, name = recipe.model.source.partition(":")
    if kind != "module":
        return {}
    top = name.partition(":")[0].partition(".")[0]
    own = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
    files = beside(folder) if own else []
    parts = [f"{file.relative_to(folder).as_posix()} {file_hash(file)}" for file in files]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return {"model.own_code": digest, IMPORTS: json.dumps(imported(files))} if parts else {}


_known: dict[tuple[object, ...], dict[str, str]] = {}


def _data(recipe: Recipe, path: Path) -> dict[str, str]:
    """Hash each split's files and labels; once for the cells of one recipe."""
    wanted = recipe.data.splits()
    memo = (path.resolve(), path.stat().st_mtime_ns, *map(str, wanted.values()))
    if memo not in _known:
        _known[memo] = {name: _split(recipe, name, source) for name, source in wanted.items()}
    return _known[memo]


def _split(recipe: Recipe, name: str, source: Source) -> str:
    found = dataset.read(name, source, recipe.classes, recipe.preprocessing, recipe.task)
    return hashlib.sha256(json.dumps(dataset.content(found)).encode()).hexdigest()


def _weights(recipe: Recipe, folder: Path) -> str | None:
    name = recipe.model.source.partition(":")[2]
    file = folder / name if recipe.model.whole else recipe.model.weights
    return file_hash(file) if file and file.is_file() else None


@cache
def code() -> str:
    """Hash that part of bitferry's own source which results depend on."""
    return source_hash(leave_out=BESIDES)


@cache
def commit() -> str | None:
    """Give the commit of bitferry's source, and whether it was changed since; None where git does not know."""
    found = own_commit()
    if found["commit"] is None:
        return None
    return f"{found['commit']}{' with changes' if found['modified'] else ''}"


def needed() -> dict[str, str]:
    """Give the versions of what bitferry itself needs, on whatever target."""
    return {name: installed()[name] for name in _needed("")}


@cache
def _needed(target: str) -> set[str]:
    """Name the distributions that bitferry and a target's extra need, and what those need in turn."""
    return _closure([*_requirements("bitferry", target)])


def _closure(names: list[str]) -> set[str]:
    found: set[str] = set()
    while names:
        name = names.pop()
        if name not in found and name in installed():
            found.add(name)
            names += _requirements(name)
    return found


def _requirements(name: str, extra: str = "") -> Iterator[str]:
    """Give the distributions that one requires on this system by itself, and with an extra of its own."""
    for line in metadata.requires(name) or ():
        wanted = Requirement(line)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": one}) for one in {"", extra}):
            yield normal(wanted.name)


def _top(source: str) -> str:
    """Name the module that a model comes from."""
    kind, _, name = source.partition(":")
    return name.partition(":")[0].partition(".")[0] if kind == "module" else kind
