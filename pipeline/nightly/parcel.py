"""A recipe with every file that it names, packed for nodes that share no disk with the driver."""

import hashlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitferry.device.errors import InputError
from bitferry.pipeline import cache, dataset
from bitferry.pipeline.imports import beside
from bitferry.pipeline.nightly.store import Store
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.training.settings import LIBRARY

PATHS = ("path", "images", "labels", "root")
"""Keys of a table of [data] that name a file or a folder."""


def pack(recipe: Recipe, path: Path, store: Store) -> tuple[str, str]:
    """Put the recipe and its files into the store as they lie to each other; give the parcel's and the recipe's name.

    Raises InputError for a recipe that names a file by an absolute path, which would be another one on a node.
    """
    _refuse_absolute(path)
    files = sorted({_absolute(path), *(_absolute(file) for file in _files(recipe, path))})
    home = Path(os.path.commonpath([file.parent for file in files]))
    names = [file.relative_to(home).as_posix() for file in files]
    told = "\n".join(f"{name} {cache.file_hash(file)}" for name, file in zip(names, files, strict=True))
    parcel = f"parcel-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if not store.has(parcel):
        with tempfile.TemporaryDirectory() as folder:
            for name, file in zip(names, files, strict=True):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, Path(folder) / name)
            store.put_folder(parcel, Path(folder))
    return parcel, _absolute(path).relative_to(home).as_posix()


def unpack(parcel: str, recipe: str, store: str | None, build: Path) -> Path:
    """Fetch a parcel into the node's build folder, once; give the recipe's file in it."""
    if store is None:
        raise InputError(f"the parcel {parcel} is in no store")
    kept = cache.Cache(build / "parcels", Store(store))

    def missing(folder: Path) -> None:
        raise InputError(f"the store {store} has no {folder.name}")

    return kept.folder("parcel", parcel.removeprefix("parcel-"), missing, of=recipe) / recipe


def _absolute(file: Path) -> Path:
    """Give where a file is, with symbolic links as they are: on a node nothing else leads to it."""
    return Path(os.path.abspath(file))  # noqa: PTH100 - resolve() follows links


def _files(recipe: Recipe, path: Path) -> Iterator[Path]:
    """List every file that building needs, besides the recipe's own."""
    folder, (kind, _, name) = path.parent, recipe.model.source.partition(":")
    if recipe.model.whole:
        yield folder / name
    if kind == "module":
        yield from beside(folder)
    if recipe.model.weights:
        yield recipe.model.weights
    if recipe.training.start and not LIBRARY.fullmatch(recipe.training.start):
        yield _existing(Path(recipe.training.start))
    for split, source in recipe.data.splits().items():
        for file in dataset.files(source):
            yield file
            if file == source:
                _refuse_absolute_lines(file)
        found = dataset.read(split, source, recipe.classes, recipe.preprocessing, recipe.task)
        yield from (one.path for sample in found for one in sample.pictures if one.path is not None)
    named = _named(path).get("classes")
    if named:
        yield folder / named


def _existing(start: Path) -> Path:
    if not start.is_file():
        raise InputError(f"training.start: the file {start} does not exist; put it there, or name another")
    return start


def _refuse_absolute(path: Path) -> None:
    absolute = [f"{key} = {name!r}" for key, name in _named(path).items() if Path(name).expanduser().is_absolute()]
    if absolute:
        told = f"recipe {path} names an absolute path, {absolute[0]}"
        raise InputError(f"{told}; for nodes that share no disk name it relative to the recipe")


def _refuse_absolute_lines(source: Path) -> None:
    if source.suffix in (".npz", ".npy", ".tar", ".parquet"):
        return
    for number, line in enumerate(source.read_text(encoding="utf-8-sig").splitlines(), 1):
        if Path(line.partition("\t")[0]).is_absolute():
            told = f"{source}:{number} names an absolute path, {line.partition(chr(9))[0]!r}"
            raise InputError(f"{told}; for nodes that share no disk name it relative to the list")


def _named(path: Path) -> dict[str, str]:
    """Give what the recipe's file calls its files, by key."""
    given = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    kind, _, program = given["model"]["source"].partition(":")
    named = {"classes": given["classes"], "weights": given["model"].get("weights"), **_flat(given["data"])}
    named |= {"source": program} if kind in ("pt2", "onnx") else {}
    named["training.start"] = given.get("training", {}).get("start")
    return {key: name for key, name in named.items() if isinstance(name, str)}


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """Give what names files under [data], with what its tables hold."""
    tables = {name: value for name, value in data.items() if isinstance(value, dict)}
    inner = {f"{name}.{key}": one for name, value in tables.items() for key, one in value.items() if key in PATHS}
    return {name: value for name, value in data.items() if name not in tables} | inner
