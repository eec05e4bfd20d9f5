"""The program inside a bundle: check the files, load the model, answer for images. No torch."""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from device.arrays import Outputs, Predict
from device.errors import BitferryError, InputError, first_line
from device.preprocess import Preprocessing

FORMAT = "bitferry-bundle"
SCHEMA = 2
Task = Literal["classification", "multilabel"]
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


class Runtime(Protocol):
    """The part of a target that a device needs: a loader, and its options."""

    Options: Any

    def load(self, path: Path, *, precision: Any, options: Any) -> Predict: ...


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

    This finds damage, not forgery: whoever can write the files can write the manifest.
    """
    listed: dict[str, dict[str, Any]] = manifest["files"]
    if not all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in listed.values()):
        raise InputError(f"{bundle}/manifest.json lists a file without its sha256; copy the bundle again")
    if manifest["model"]["file"] not in listed:
        raise InputError(f"{bundle}/manifest.json names a model that is not among its files; copy the bundle again")
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
        self.task: Task = "multilabel" if manifest.get("task") == "multilabel" else "classification"
        self.preprocessing = Preprocessing.from_json(manifest["preprocessing"])
        path = bundle / model["file"]
        options = options_of(runtime, model["options"] | ({"threads": threads} if threads else {}))
        blank = np.zeros((1, self.preprocessing.height, self.preprocessing.width, 3), np.uint8)
        try:
            self.predict = runtime.load(path, precision=model["precision"], options=options)
            scores = self.predict(blank)
        except BitferryError:
            raise
        except Exception as error:  # the vendor's runtime may raise anything
            raise InputError(f"this runtime cannot run {path}: {first_line(error)}") from error
        if scores.shape != (1, len(self.classes)):
            raise InputError(f"{path} gives scores of shape {scores.shape} for {len(self.classes)} classes")

    def answer(self, path: Path, *, top: int = 5) -> Answer:
        """Answer for one image file; the time covers decoding, resizing and the model."""
        start = time.perf_counter()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        scores = self.predict(self.preprocessing.load(content, str(path))[None])
        likely = probabilities(scores, self.task)[0]
        milliseconds = (time.perf_counter() - start) * 1e3
        best = np.argsort(-likely, kind="stable")[:top]
        return Answer(
            image=str(path),
            classes=tuple(self.classes[i] for i in best),
            probabilities=tuple(round(float(likely[i]), 6) for i in best),
            milliseconds=round(milliseconds, 3),
        )


def golden(runner: Runner, bundle: Path) -> tuple[float, dict[str, float]]:
    """Answer for each golden file; give the limit, and each file's largest difference as a share of the largest score.

    The bytes take the same way as any image's: decoded, resized, answered.
    """
    limit, scores = _expected(bundle / "golden/expected.json")
    strange = [name for name in scores if f"golden/{name}" not in runner.manifest["files"]]
    if strange:
        raise InputError(f"{bundle}/golden/expected.json names {strange[0]!r}, which is not a file of the bundle")
    differences = {}
    for name, wanted in scores.items():
        pixels = runner.preprocessing.load((bundle / "golden" / name).read_bytes(), name)
        found = runner.predict(pixels[None])[0]
        same = found.shape == wanted.shape
        differences[name] = (
            float(np.abs(found - wanted).max()) / max(1e-6, float(np.abs(wanted).max())) if same else math.inf
        )
    return limit, differences


def finite(differences: dict[str, float]) -> dict[str, float | None]:
    """Give None, which JSON can hold, for scores that are not finite or are another number of them."""
    return {name: value if math.isfinite(value) else None for name, value in differences.items()}


def _expected(path: Path) -> tuple[float, dict[str, Outputs]]:
    try:
        expected = json.loads(path.read_bytes())
        scores = {name: np.array(file["scores"], np.float32) for name, file in expected["files"].items()}
        limit = float(expected["score_limit"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be used ({error!r}); copy the bundle again") from error
    if not scores:
        raise InputError(f"{path} names no file to answer for; copy the bundle again")
    return limit, scores


def _selftest(bundle: Path, runtime: Runtime, *, as_json: bool) -> int:
    limit, differences = golden(Runner(bundle, runtime), bundle)
    passed = all(difference <= limit for difference in differences.values())
    if as_json:
        print(json.dumps({"passed": passed, "score_limit": limit, "differences": finite(differences)}))
        return 0 if passed else 1
    for name, difference in differences.items():
        print(f"{name}\t{difference:.2g} of the largest score, {limit:.2g} allowed")
    print("every golden file is answered as it was verified" if passed else "this machine answers otherwise")
    return 0 if passed else 1


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
    selftest = commands.add_parser(
        "selftest", help="answer for the golden image files and compare with what is expected"
    )
    selftest.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            check(bundle, read_manifest(bundle))
            print("every file is as the manifest says")
            return 0
        if options.command == "selftest":
            return _selftest(bundle, runtime, as_json=options.json)
        runner = Runner(bundle, runtime, threads=options.threads)
        for image in options.images:
            answer = runner.answer(image, top=options.top)
            print(json.dumps(vars(answer)) if options.json else text(answer))
    except (BitferryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
