"""The program inside a bundle: check the files, load the model, answer for images. No torch."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from device.arrays import Outputs, Predict
from device.errors import BitferryError, InputError
from device.preprocess import Preprocessing

FORMAT = "bitferry-bundle"
SCHEMA = 1
FIELDS = {
    "target": str,
    "model": dict,
    "preprocessing": dict,
    "preprocessing_sha256": str,
    "classes": list,
    "files": dict,
}
"""What a manifest must have for the runner to use it."""


class Runtime(Protocol):
    """The part of a target that a device needs: a loader."""

    def load(self, path: Path, *, precision: Any, threads: int | None = None) -> Predict: ...


@dataclass(frozen=True)
class Answer:
    """The likeliest classes for one image, best first."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    milliseconds: float


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Read a bundle's manifest; raise InputError when the folder is no bundle of a schema this runner knows."""
    path = bundle / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{bundle} is not a bundle: it has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not a bitferry manifest")
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {manifest.get('schema')!r}; this runner reads schema {SCHEMA}")
    missing = [name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if missing:
        raise InputError(f"{path} has no usable {', '.join(missing)}; copy the bundle again")
    return manifest


def check(bundle: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with the manifest's sha256; raise InputError naming each missing, changed or extra one.

    This finds damage, not forgery: whoever can write the files can write the manifest.
    """
    listed: dict[str, dict[str, Any]] = manifest["files"]
    present = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if not p.is_dir()} - {"manifest.json"}
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


def softmax(scores: Outputs) -> Outputs:
    """Turn scores N×K into probabilities N×K."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: Outputs = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


class Runner:
    """A checked bundle with its model loaded."""

    def __init__(self, bundle: Path, runtime: Runtime, *, threads: int | None = None) -> None:
        manifest = read_manifest(bundle)
        check(bundle, manifest)
        model = manifest["model"]
        self.classes: list[str] = manifest["classes"]
        self.preprocessing = Preprocessing.from_json(manifest["preprocessing"])
        self.predict = runtime.load(
            bundle / model["file"], precision=model["precision"], threads=threads or model["threads"]
        )

    def answer(self, path: Path, *, top: int = 5) -> Answer:
        """Answer for one image file; the time covers decoding, resizing and the model."""
        start = time.perf_counter()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        probabilities = softmax(self.predict(self.preprocessing.load(content, str(path))[None]))[0]
        milliseconds = (time.perf_counter() - start) * 1e3
        best = np.argsort(-probabilities, kind="stable")[:top]
        return Answer(
            image=str(path),
            classes=tuple(self.classes[i] for i in best),
            probabilities=tuple(round(float(probabilities[i]), 6) for i in best),
            milliseconds=round(milliseconds, 3),
        )


def text(answer: Answer) -> str:
    """One line for a person: the file, then each class with its probability."""
    ranked = zip(answer.classes, answer.probabilities, strict=True)
    return f"{answer.image}\t" + "  ".join(f"{name} {p:.1%}" for name, p in ranked)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def main(runtime: Runtime, bundle: Path, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of a bundle's `run.pyz`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="run.pyz",
        description="Run the model in this bundle.",
        epilog="example: python run.pyz predict photo.png",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="classify image files")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    predict.add_argument("--top", type=_positive, default=3, help="how many classes to print (default: 3)")
    predict.add_argument("--threads", type=_positive, help="CPU threads (default: as verified)")
    predict.add_argument("--json", action="store_true", help="print one JSON object per image")
    commands.add_parser("check", help="compare every file with the manifest")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            check(bundle, read_manifest(bundle))
            print("every file is as the manifest says")
            return 0
        runner = Runner(bundle, runtime, threads=options.threads)
        for image in options.images:
            answer = runner.answer(image, top=options.top)
            print(json.dumps(vars(answer)) if options.json else text(answer))
    except BitferryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
