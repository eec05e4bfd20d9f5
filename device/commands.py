"""The command line of a bundle's `run.pyz`: predict, check, selftest, measure, rebuild."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bitferry.device import fit, golden, measure, rebuilt, whole
from bitferry.device.errors import BitferryError, InputError, StageFailed, TargetUnavailable
from bitferry.device.runner import Runner, Runtime, check, fields, options_of, read_manifest, text


def main(runtime: Runtime, bundle: Path, arguments: Sequence[str] | None = None) -> int:
    """Run one command on a bundle; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "check":
            return _check(bundle, options.key)
        if options.command == "rebuild":
            return _rebuild(bundle, runtime)
        if options.command == "selftest":
            return _selftest(bundle, runtime, as_json=options.json)
        if options.command == "measure":
            return _measure(bundle, runtime, options)
        runner = Runner(bundle, runtime, threads=options.threads)
        for answer in runner.answers(options.images, top=options.top, out=options.out):
            print(json.dumps(fields(answer)) if options.json else text(answer))
    except (BitferryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(bundle: Path, key: Path | None) -> int:
    manifest = read_manifest(bundle)
    check(bundle, manifest)
    if key:
        _check_signature(bundle, key)
    fit.check(manifest, str(bundle))
    found = rebuilt.find(bundle, manifest)
    signed = "signed" if key else "as the manifest says"
    print(f"every file is {signed}{', and as rebuilt here' if found else ''}; it fits this machine")
    return 0


def _check_signature(bundle: Path, key: Path) -> None:
    """Raise InputError unless this key signed every file."""
    try:
        from bitferry.device import signature  # noqa: PLC0415 - cryptography, which predicting does without
    except ImportError as error:
        raise TargetUnavailable("a signature is checked with the Python package 'cryptography'") from error
    signature.check(bundle, [signature.public_key(key.read_bytes(), str(key))])
    if (bundle / whole.REBUILT).exists():
        raise InputError(f"{bundle}/{whole.REBUILT} was compiled on a device, and nobody signed it; remove it")


def _rebuild(bundle: Path, runtime: Runtime) -> int:
    manifest = read_manifest(bundle)
    if _runs_as_shipped(bundle, runtime):
        print(f"{bundle / manifest['model']['file']} runs here as it was shipped; nothing was built")
        return 0
    made = rebuilt.rebuild(bundle, manifest, runtime, options_of(runtime, manifest["model"]["options"]))
    print(f"{made} was built here and runs in place of what was shipped; try it with `python run.pyz selftest`")
    return 0


def _runs_as_shipped(bundle: Path, runtime: Runtime) -> bool:
    """Say whether the bundle's own file, which may be signed, loads and answers; raise InputError for a damaged one."""
    check(bundle, read_manifest(bundle))
    try:
        Runner(bundle, runtime, as_shipped=True)
    except (InputError, StageFailed):
        return False
    return True


def _selftest(bundle: Path, runtime: Runtime, *, as_json: bool) -> int:
    runner = _loaded(bundle, runtime)
    limit, differences = golden.compare(bundle, runner.manifest, runner.preprocessing, runner.predict)
    return golden.show(limit, differences, measure.quick(runner), rebuilt=runner.rebuilt, as_json=as_json)


def _measure(bundle: Path, runtime: Runtime, options: argparse.Namespace) -> int:
    runner = _loaded(bundle, runtime)
    found = measure.measure(runner, runtime, seconds=options.seconds)
    if options.images:
        measure.answer(runner, options.images)
    measure.show(found, as_json=options.json)
    return 0


def _loaded(bundle: Path, runtime: Runtime) -> Runner:
    runner = Runner(bundle, runtime)
    if runner.rebuilt:
        print("the model runs as rebuilt here", file=sys.stderr)
    return runner


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError("must be above 0 and at most 3600")
    return number


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
    check_ = commands.add_parser(
        "check", help="compare every file with the manifest, and the manifest with this machine"
    )
    check_.add_argument("--key", type=Path, metavar="KEY.pub", help="ask for its signature, too (needs cryptography)")
    selftest = commands.add_parser(
        "selftest", help="answer for the golden image files and compare with what is expected"
    )
    selftest.add_argument("--json", action="store_true", help="print one JSON object")
    _add_measure(commands.add_parser("measure", help="time the model here, and answer for images that are arrays"))
    commands.add_parser("rebuild", help="compile the model again, for the hardware and the runtime of this machine")
    return parser


def _add_measure(parser: argparse.ArgumentParser) -> None:
    default = f"spent on timed calls (default: {measure.SECONDS:g})"
    parser.add_argument("--seconds", type=_seconds, default=measure.SECONDS, metavar="S", help=default)
    given = "uint8 N×H×W×3, preprocessed: `images` of an .npz, or an .npy; the answers are written beside it"
    parser.add_argument("--images", type=Path, metavar="FILE", help=given)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every timed call")
