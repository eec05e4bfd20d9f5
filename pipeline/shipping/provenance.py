"""Where a bundle comes from: recipe, source, tools and data, by content; and what its artifact is tied to."""

import hashlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from bitferry import targets
from bitferry.device import rebuilt
from bitferry.device.errors import InputError
from bitferry.pipeline import cache, load, made_from
from bitferry.pipeline.artifacts import Compiled
from bitferry.pipeline.data.source import base_name
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.own_source import commit, own_commit, source_hash, version
from bitferry.pipeline.recipe import Quantization, Recipe
from bitferry.pipeline.verdict import Built, Verdict
from bitferry.targets import ISA, X86, Needs

RUNNER = ("numpy", "pillow")
"""What run.pyz imports besides the target's own packages."""
EPOCH = "SOURCE_DATE_EPOCH"
"""Environment variable: the only time that a built file may hold, in seconds since 1970."""


@dataclass(frozen=True)
class Origin:
    """What one target's artifact was made from, besides the program that it was compiled of."""

    recipe: Recipe
    path: Path
    """The recipe's file."""
    settings: Quantization | None
    """As they were used, with every layer that stays float; None where nothing was quantized."""
    splits: tuple[Split, ...]
    weights: Path | None
    """A state dict, an exported program, or an ONNX file."""
    trained: bool
    """Whether the weights were trained from the recipe."""
    epoch: int | None = None
    """The time that the bill of materials names."""


def epoch() -> int | None:
    """Read SOURCE_DATE_EPOCH; None where it is not set. Raises InputError when it is no time."""
    text = os.environ.get(EPOCH, "")
    if text and not (text.isascii() and text.isdigit() and len(text) <= 11):
        raise InputError(f"{EPOCH} is {text!r}; expected whole seconds since 1970")
    return int(text) if text else None


def provenance(origin: Origin, compiled: Compiled) -> dict[str, object]:
    """Say what a bundle was made from, by content: whoever has all of it can make the same files again."""
    recipe, path = origin.recipe, origin.path
    weights = cache.file_hash(origin.weights) if origin.weights else None
    return {
        "recipe": _fields(recipe),
        "recipe_file": {"name": path.name, "sha256": cache.file_hash(path), **commit(path.parent, [path])},
        "bitferry": {"version": metadata.version("bitferry"), "source_sha256": source_hash(), **own_commit()},
        "model": {
            "trained": origin.trained,
            "weights_sha256": weights,
            "own_code": load.own_code(recipe, path.parent),
        },
        "quantization": origin.settings.model_dump(mode="json") if origin.settings else None,
        "tools": _tools(recipe, compiled) | load.own_imports(recipe, path.parent),
        "data": {split.name: _data(split, recipe) for split in origin.splits},
        "varies": _varies(compiled),
        "source_date_epoch": origin.epoch,
        "machine": {"system": targets.system(), "isa": list(targets.cpu_isa()), "cpus": targets.usable_cpus()},
    }


def tied(compiled: Compiled, found: Built, weight_bits: int | None) -> dict[str, object]:
    """Say what a device must have to run the artifact: as it was verified, and as its target states."""
    needs, environment = _needs(compiled), found.environment
    system, _, machine = environment.system.partition(" ")
    return {
        "os": needs.system or system,
        "machine": None if needs.system else machine,
        "isa": [] if needs.gpus else _instructions(found),
        "vnni": weight_bits == 8 and compiled.options.needs_vnni and machine.lower() in X86,
        "gpu": list(needs.gpus) or None,
        "python": _own("Requires-Python"),
        "packages": dict(needs.packages) | _runner_packages(),
    }


def _needs(compiled: Compiled) -> Needs:
    return targets.needs(compiled.target, compiled.path, options=compiled.options)


def _instructions(found: Built) -> list[str]:
    """List the instruction sets, of those that verification had, that serve a precision which the artifact ran in."""
    ran = {layer.precision for layer in found.execution.layers} if isinstance(found, Verdict) else set()
    used = {found.precision, "float32", *ran}
    return [name for name in found.environment.isa if used & {*ISA.get(name, ())}]


def _runner_packages() -> dict[str, str]:
    """Give the ranges of what the runner itself imports, as bitferry's own metadata has them."""
    wanted = [line.partition(";")[0].strip() for line in metadata.requires("bitferry") or ()]
    return {name: line.removeprefix(name) for name in RUNNER for line in wanted if line.startswith(name)}


def _own(field: str) -> str:
    return str(metadata.metadata("bitferry")[field])


def _fields(recipe: Recipe) -> dict[str, object]:
    """Give the recipe without the paths of this machine; the data is pinned by content elsewhere."""
    fields = recipe.model_dump(mode="json", exclude={"classes"})
    fields["data"] = {name: base_name(source) for name, source in recipe.data.splits().items()}
    kind, _, name = fields["model"]["source"].partition(":")
    fields["model"]["source"] = f"{kind}:{Path(name).name}" if recipe.model.whole else fields["model"]["source"]
    if fields["model"]["weights"]:
        fields["model"]["weights"] = Path(fields["model"]["weights"]).name
    return dict(fields)


def _tools(recipe: Recipe, compiled: Compiled) -> dict[str, str]:
    """Give the version of each package that a built file can depend on, and Python's."""
    source = recipe.model.source.partition(":")[0]
    names = sorted({*made_from.PACKAGES, *load.PACKAGES[source], *_needs(compiled).packages} - {"bitferry"})
    found = {name: known for name in names if (known := version(name))}
    return {"python": platform.python_version(), **found}


def _data(split: Split, recipe: Recipe) -> dict[str, object]:
    """Give a split's name, and the hash of its pixels as the model gets them and of its labels, in their order."""
    labels = np.ascontiguousarray(split.labels)
    digest = hashlib.sha256(b"".join(split.digests))
    digest.update(f"{labels.dtype.name} {labels.shape}".encode())
    digest.update(labels.data)
    name = base_name(getattr(recipe.data, split.name))
    return {"name": name, "images": len(split), "sha256": digest.hexdigest()}


def _varies(compiled: Compiled) -> dict[str, object]:
    """Name the files whose compiler does not give the same bytes each time, why, and what it made them of."""
    source = compiled.path.with_suffix(".onnx")
    made_of = source if source.exists() else compiled.source.path
    note = {"made_of": rebuilt.SOURCE, "made_of_sha256": cache.file_hash(made_of)}
    return {name: {"reason": reason, **note} for name, reason in _needs(compiled).varies.items()}
