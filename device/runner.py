"""A bundle, opened: its manifest read, its files checked, its model loaded, answers for images. No torch."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from bitferry.device import pixels, rebuilt, strict, whole
from bitferry.device.arrays import Outputs, Predict
from bitferry.device.errors import BitferryError, InputError, StageFailed, first_line
from bitferry.device.pixels import IGNORED, Maps
from bitferry.device.preprocess import Preprocessing, decode

FORMAT = "bitferry-bundle"
SCHEMA = 3
Task = Literal["classification", "multilabel", "segmentation"]
FIELDS = {
    "target": str,
    "model": dict,
    "preprocessing": dict,
    "preprocessing_sha256": str,
    "classes": list,
    "files": dict,
}
"""What a manifest must have for the runner to use it."""
MODEL = {"file": str, "precision": str, "options": dict}


class Runtime(rebuilt.Compiler, Protocol):
    """The part of a target that a device needs: a loader, its options, and what builds again."""

    Options: Any

    def load(self, path: Path, *, precision: Any, options: Any) -> Predict: ...


@dataclass(frozen=True)
class Answer:
    """The likeliest classes for one image, best first; for segmentation those of most pixels."""

    images: tuple[str, ...]
    """One file for each view."""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    """For segmentation the share of pixels of each class."""
    milliseconds: float
    map: Maps | None = None
    """The class of every pixel of the first image, 255 where it was cropped away; segmentation only."""


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Read a bundle's manifest; raise InputError when the folder is no bundle of a schema this runner knows."""
    path = bundle / "manifest.json"
    try:
        manifest = strict.read(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise InputError(f"{bundle} is not a bundle: it has no manifest.json") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not a bitferry manifest")
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {manifest.get('schema')!r}; schema {SCHEMA} is read here: deploy it again")
    missing = [name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)]
    missing += [
        f"model.{name}" for name, kind in MODEL.items() if not isinstance((manifest.get("model") or {}).get(name), kind)
    ]
    if missing:
        raise InputError(f"{path} has no usable {', '.join(missing)}; copy the bundle again")
    return manifest


def check(bundle: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with the manifest's sha256; raise InputError naming each missing, changed or extra one.

    This finds damage, not forgery: whoever can write the files can write the manifest. What was rebuilt here has a
    manifest of its own.
    """
    listed: dict[str, dict[str, Any]] = manifest["files"]
    if not all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in listed.values()):
        raise InputError(f"{bundle}/manifest.json lists a file without its sha256; copy the bundle again")
    if manifest["model"]["file"] not in listed:
        raise InputError(f"{bundle}/manifest.json names a model that is not among its files; copy the bundle again")
    strict.names(listed, f"{bundle}/manifest.json")
    apart = frozenset({"manifest.json", whole.SIGNATURE, *whole.PARTS})
    whole.compare(
        whole.digests(bundle, without=apart),
        {name: entry["sha256"] for name, entry in listed.items()},
        f"{bundle} is not as it was built",
        "take out what does not belong, or copy the bundle again",
    )
    if Preprocessing.from_json(manifest["preprocessing"]).sha256() != manifest["preprocessing_sha256"]:
        raise InputError(f"{bundle}/manifest.json has another preprocessing contract than the model was verified with")


def probabilities(scores: Outputs, task: Task) -> Outputs:
    """Turn scores N×K into probabilities N×K: of one class against the others, or each class for itself."""
    if task == "multilabel":
        return np.asarray(0.5 + 0.5 * np.tanh(scores / 2), np.float32)
    return softmax(scores)


def softmax(scores: Outputs) -> Outputs:
    """Turn scores N×K into probabilities N×K."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: Outputs = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def options_of(runtime: Runtime, given: dict[str, Any]) -> Any:
    """Turn options as JSON has them into the target's own; raise InputError when it does not know them."""
    try:
        return runtime.Options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    except (TypeError, ValueError) as error:
        raise InputError(f"the options {given} are not this target's: {first_line(error)}") from error


def task_of(manifest: dict[str, Any]) -> Task:
    """Give what kind of answer a bundle's model gives."""
    return manifest["task"] if manifest.get("task") in get_args(Task) else "classification"


class Runner:
    """A checked bundle with its model loaded."""

    def __init__(self, bundle: Path, runtime: Runtime, *, threads: int | None = None, as_shipped: bool = False) -> None:
        """Load the model as it was shipped; what was compiled here only where that cannot be, unless `as_shipped`."""
        manifest = read_manifest(bundle)
        check(bundle, manifest)
        model = manifest["model"]
        self.manifest = manifest
        self.classes: list[str] = manifest["classes"]
        self.task = task_of(manifest)
        self.preprocessing = Preprocessing.from_json(manifest["preprocessing"])
        self.options = options_of(runtime, model["options"] | ({"threads": threads} if threads else {}))
        self.rebuilt = False
        try:
            self._load(bundle / model["file"], runtime)
        except (InputError, StageFailed):
            built = None if as_shipped else rebuilt.find(bundle, manifest)
            if built is None:
                raise
            self._load(built, runtime)
            self.rebuilt = True

    def _load(self, path: Path, runtime: Runtime) -> None:
        """Load a file and have it answer once."""
        blank = np.zeros((1, *self.preprocessing.shape), np.uint8)
        try:
            start = time.perf_counter()
            self.predict = runtime.load(path, precision=self.manifest["model"]["precision"], options=self.options)
            loaded = time.perf_counter()
            scores = self.predict(blank)
            self.load_ms, self.first_ms = (loaded - start) * 1e3, (time.perf_counter() - loaded) * 1e3
        except BitferryError:
            raise
        except Exception as error:  # the vendor's runtime may raise anything
            raise InputError(f"this runtime cannot run {path}: {first_line(error)}") from error
        size = blank.shape[-3:-1] if self.task == "segmentation" else ()
        if scores.shape != (1, len(self.classes), *size):
            raise InputError(f"{path} gives scores of shape {scores.shape} for {len(self.classes)} classes")

    def answers(self, files: Sequence[Path], *, top: int = 5, out: Path | None = None) -> Iterator[Answer]:
        """Answer for image files, as many at a time as the model takes views.

        With `out`, each answer's map is written there as NAME.png, indexed and as large as the image NAME.
        """
        groups = self.preprocessing.groups(files)
        places = self._places(groups, out) if out else [None] * len(groups)
        for group, place in zip(groups, places, strict=True):
            answer = self.answer(*group, top=top)
            if place and answer.map is not None:
                pixels.write(answer.map, place)
            yield answer

    def answer(self, *files: Path, top: int = 5) -> Answer:
        """Answer for one image file, or one for each view; the time covers decoding, resizing and the model."""
        start = time.perf_counter()
        try:
            images = [decode(path.read_bytes(), str(path)) for path in files]
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
        contract = self.preprocessing
        scores = self.predict(contract.join([contract.finish(image) for image in images])[None])
        found = pixels.maps(scores)[0] if self.task == "segmentation" else None
        likely = probabilities(scores, self.task)[0] if found is None else pixels.shares(found, len(self.classes))
        milliseconds = (time.perf_counter() - start) * 1e3
        best = np.argsort(-likely, kind="stable")[:top]
        return Answer(
            images=tuple(map(str, files)),
            classes=tuple(self.classes[i] for i in best),
            probabilities=tuple(round(float(likely[i]), 6) for i in best),
            milliseconds=round(milliseconds, 3),
            map=None if found is None else contract.undo(found, images[0].size, outside=IGNORED),
        )

    def _places(self, groups: Sequence[Sequence[Path]], out: Path) -> list[Path]:
        """Name the file of each map; raise InputError when two are one, or one would replace an image."""
        if self.task != "segmentation":
            raise InputError(f"--out is for maps; this model's task is {self.task}")
        places = [out / f"{group[0].stem}.png" for group in groups]
        files = {file.resolve() for group in groups for file in group}
        taken = [place for i, place in enumerate(places) if place in places[:i] or place.resolve() in files]
        if taken:
            raise InputError(f"{taken[0]} would be written over; rename the image, or name another folder")
        out.mkdir(parents=True, exist_ok=True)
        return places


def fields(answer: Answer) -> dict[str, object]:
    """Give an answer as what JSON can hold."""
    named = {"image": answer.images[0]} if len(answer.images) == 1 else {"images": answer.images}
    likely = {"probabilities" if answer.map is None else "shares": answer.probabilities}
    return {**named, "classes": answer.classes, **likely, "milliseconds": answer.milliseconds}


def text(answer: Answer) -> str:
    """One line for a person: the file, then each class with its probability."""
    ranked = zip(answer.classes, answer.probabilities, strict=True)
    return f"{' '.join(answer.images)}\t" + "  ".join(f"{name} {p:.1%}" for name, p in ranked)
