"""The program inside a bundle: check the files, load the model, answer for images. No torch."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from device import golden, pixels, rebuilt
from device.arrays import Outputs, Predict
from device.errors import BitferryError, InputError, first_line
from device.pixels import IGNORED, Maps
from device.preprocess import Preprocessing, decode

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
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{bundle} is not a bundle: it has no manifest.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not a bitferry manifest")
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {manifest.get('schema')!r}; this runner reads schema {SCHEMA}")
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
    files = (path.relative_to(bundle) for path in bundle.rglob("*") if not path.is_dir())
    present = {file.as_posix() for file in files if file.parts[0] not in rebuilt.PARTS} - {"manifest.json"}
    both = present & set(listed)
    changed = {n for n in both if hashlib.sha256((bundle / n).read_bytes()).hexdigest() != listed[n]["sha256"]}
    faults = {
        "missing": set(listed) - present,
        "changed": changed,
        "not in the manifest": present - set(listed),
    }
    found = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in faults.items() if names)
    if found:
        raise InputError(
            f"{bundle} is not as it was built ({found}); take out what does not belong, or copy the bundle again"
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


class Runner:
    """A checked bundle with its model loaded."""

    def __init__(self, bundle: Path, runtime: Runtime, *, threads: int | None = None) -> None:
        manifest = read_manifest(bundle)
        check(bundle, manifest)
        model = manifest["model"]
        self.manifest = manifest
        self.classes: list[str] = manifest["classes"]
        self.task: Task = manifest["task"] if manifest.get("task") in get_args(Task) else "classification"
        self.preprocessing = Preprocessing.from_json(manifest["preprocessing"])
        found = rebuilt.find(bundle, manifest)
        path, self.rebuilt = found or bundle / model["file"], found is not None
        options = options_of(runtime, model["options"] | ({"threads": threads} if threads else {}))
        blank = np.zeros((1, *self.preprocessing.shape), np.uint8)
        try:
            self.predict = runtime.load(path, precision=model["precision"], options=options)
            scores = self.predict(blank)
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def main(runtime: Runtime, bundle: Path, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of a bundle's `run.pyz`; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "check":
            return _check(bundle)
        if options.command == "rebuild":
            return _rebuild(bundle, runtime)
        if options.command == "selftest":
            runner = Runner(bundle, runtime)
            if runner.rebuilt:
                print("the model runs as rebuilt here", file=sys.stderr)
            found = golden.compare(bundle, runner.manifest, runner.preprocessing, runner.predict)
            return golden.show(*found, as_json=options.json)
        runner = Runner(bundle, runtime, threads=options.threads)
        for answer in runner.answers(options.images, top=options.top, out=options.out):
            print(json.dumps(fields(answer)) if options.json else text(answer))
    except (BitferryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(bundle: Path) -> int:
    manifest = read_manifest(bundle)
    check(bundle, manifest)
    found = rebuilt.find(bundle, manifest)
    print(f"every file is as the manifest says{', and as rebuilt here' if found else ''}")
    return 0


def _rebuild(bundle: Path, runtime: Runtime) -> int:
    manifest = read_manifest(bundle)
    check(bundle, manifest)
    made = rebuilt.rebuild(bundle, manifest, runtime, options_of(runtime, manifest["model"]["options"]))
    print(f"{made} was built here and is what runs from now on; try it with `python run.pyz selftest`")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.pyz",
        description="Run the model in this bundle.",
        epilog="example: python run.pyz predict photo.png",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="answer for image files")
    several = "a model of several views takes so many files for each answer, in order"
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=several)
    predict.add_argument("--top", type=_positive, default=3, help="how many classes to print (default: 3)")
    predict.add_argument("--out", type=Path, metavar="FOLDER", help="segmentation: write a mask for each answer here")
    predict.add_argument("--threads", type=_positive, help="CPU threads (default: as verified)")
    predict.add_argument("--json", action="store_true", help="print one JSON object per image")
    commands.add_parser("check", help="compare every file with the manifest")
    selftest = commands.add_parser(
        "selftest", help="answer for the golden image files and compare with what is expected"
    )
    selftest.add_argument("--json", action="store_true", help="print one JSON object")
    commands.add_parser("rebuild", help="compile the model again, for the hardware and the runtime of this machine")
    return parser
