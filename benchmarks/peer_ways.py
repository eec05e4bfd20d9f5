"""Every way to the same model in int8, bitferry's and its peers': its file and runtime, or why there is none."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from common import batch_of_one, every_static, static

from bitferry import targets
from bitferry.device.arrays import Images
from bitferry.device.errors import BitferryError, first_line
from bitferry.pipeline.artifacts import Calibration, FloatModel, Quantized
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.capture import export_program
from bitferry.pipeline.division import drawn
from bitferry.pipeline.export import export, simplify
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.search import choose
from bitferry.targets import Precision

HERE = Path(__file__).parent
OPENVINO, ONNXRUNTIME = "openvino", "onnxruntime"
CHOSEN_STATIC = (
    "QDQ tensor Int8",  # its defaults
    "QDQ channel UInt8",
    "QDQ channel UInt8 normalization float",
    "QOperator tensor UInt8 normalization float",
)
"""Of `quantize_static`: its defaults, the nearest to float, and the fastest; `onnxruntime_placement.py` has all."""


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    peer: str
    name: str
    runtime: str
    path: Path | None = None
    precision: Precision = "int8"
    why: str = ""
    """There is no file."""
    options: Any = None
    """Of the runtime, where they are not the recipe's."""


@dataclass(frozen=True)
class Peers:
    """What is compared with bitferry: names, and the interpreters of those that have an environment of their own."""

    names: Sequence[str]
    interpreters: Mapping[str, str]


def every_way(run: Run, auto: Run | None, peers: Peers, folder: Path) -> tuple[list[Way], dict[str, str]]:
    """Build them all; give them with the versions of the peers that have an environment of their own."""
    ways = [*_ours(run, auto), *_floats(run)]
    versions: dict[str, str] = {}
    builders: Mapping[str, Callable[[], Iterator[Way]]] = {
        "nncf": lambda: _foreign(run, "nncf", "NNCF", OPENVINO, peers, folder, versions),
        "pt2e": lambda: _plain_pt2e(run, folder),
        "onnxruntime": lambda: _static(run, folder),
        "olive": lambda: _foreign(run, "olive", "Olive", ONNXRUNTIME, peers, folder, versions),
    }
    for name in peers.names:
        (folder / name).mkdir()
        ways += builders[name]()
    order = [OPENVINO, ONNXRUNTIME]
    return sorted(ways, key=lambda way: order.index(way.runtime)), versions


def _made(peer: str, name: str, runtime: str, make: Callable[[], Path], precision: Precision = "int8") -> Way:
    """Make one file; what fails is a row that says so."""
    try:
        return Way(peer, name, runtime, make(), precision)
    except Exception as error:  # noqa: BLE001 - a peer may raise anything, and the others go on
        return Way(peer, name, runtime, why=f"{type(error).__name__}: {first_line(error)}")


def _ours(run: Run, auto: Run | None) -> Iterator[Way]:
    """Give int8 for either runtime, and on OpenVINO what a search for the fastest inside the budget chose."""
    for runtime in (OPENVINO, ONNXRUNTIME):
        yield _made("bitferry", "bitferry, int8", runtime, partial(_deployed, run, runtime, "int8"))
    if auto:
        name = 'bitferry, `precision = "auto"`'
        try:
            chosen = choose(auto, OPENVINO)
            yield Way(
                "auto",
                f"{name}: {chosen.title}",
                OPENVINO,
                chosen.compiled.path,
                chosen.precision,
                "",
                chosen.compiled.options,
            )
        except BitferryError as error:
            yield Way("auto", name, OPENVINO, why=str(error))


def _deployed(run: Run, runtime: str, precision: Precision) -> Path:
    return Deployment(run, runtime, precision).compiled.path


def _floats(run: Run) -> Iterator[Way]:
    """Give what the runtimes make of the float model."""
    for runtime in (OPENVINO, ONNXRUNTIME):
        target = targets.get(runtime)
        fast = target.environment(options=run.recipe.options(runtime)).fast
        for precision in ("float32", "bfloat16"):
            if precision in target.SCHEMES and precision in fast:
                yield _made("float", precision, runtime, partial(_deployed, run, runtime, precision), precision)


def _float_onnx(run: Run) -> Path:
    """Give the float ONNX that bitferry compiles from: uint8 N×H×W×3 in, normalized inside."""
    return Deployment(run, OPENVINO, "float32").simplified.path


def _calibration(run: Run) -> Images:
    return drawn(run.calibration.images, run.recipe.quantization.first_images)


def _plain_pt2e(run: Run, folder: Path) -> Iterator[Way]:
    """Quantize with torchao's X86InductorQuantizer as its tutorial does, and go bitferry's way from there."""

    def make() -> Path:
        return _onnx_to_ir(run, _pt2e(run, folder / "pt2e"), folder / "pt2e")

    yield _made("pt2e", "plain PT2E, X86InductorQuantizer", OPENVINO, make)


def _pt2e(run: Run, folder: Path) -> Quantized:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: PLC0415 - takes seconds
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: PLC0415

    images = torch.from_numpy(_calibration(run))
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(export_program(run.model.module(), images[:2]).module(), quantizer)
        for image in images:
            prepared(image[None])
        torch.export.save(export_program(convert_pt2e(prepared), images[:2]), folder / "program.pt2")
    return Quantized(
        folder / "program.pt2",
        cast(FloatModel, run.model),
        targets.Scheme(),
        Calibration(len(images), len(images), {}),
        key="plain-pt2e",
    )


def _onnx_to_ir(run: Run, program: Quantized, folder: Path) -> Path:
    build = Cache(folder / "build")
    made = simplify(export(program, run.calibration, build), run.calibration, build)
    out = folder / "model.xml"
    targets.get(OPENVINO).compile(made.path, out, precision="int8", options=run.recipe.options(OPENVINO))
    return out


def _static(run: Run, folder: Path) -> Iterator[Way]:
    """Quantize with ONNX Runtime's own `quantize_static`, from the same float ONNX prepared as its guide asks."""
    given, images = batch_of_one(_float_onnx(run), folder / "float.onnx"), _calibration(run)
    for way in every_static():
        if way.label in CHOSEN_STATIC:
            make = partial(static, way, given, images, folder / "onnxruntime")
            yield _made("onnxruntime", f"quantize_static, {way.label}", ONNXRUNTIME, make)


def _foreign(
    run: Run, peer: str, name: str, runtime: str, peers: Peers, folder: Path, versions: dict[str, str]
) -> Iterator[Way]:
    """Let a peer quantize in its own environment."""
    given, images = _float_onnx(run), folder / "calibration.npz"
    np.savez(images, images=_calibration(run))
    if peer == "olive":
        given = batch_of_one(given, folder / "olive.onnx")
    attends = any(node.op_type == "Softmax" for node in onnx.load(given).graph.node)
    try:
        told = ask(peers, peer, "quantize", given, images, folder / peer, *(["--transformer"] if attends else []))
    except RuntimeError as error:
        yield Way(peer, name, runtime, why=str(error))
        return
    versions.update(told["versions"])
    for label, found in told["ways"].items():
        path = Path(found["path"]) if "path" in found else None
        yield Way(peer, f"{name}, {label}", runtime, path, why=found.get("why", ""))


def command(peers: Peers, peer: str, *arguments: object) -> list[str]:
    """Give the command line of a peer's script; raise RuntimeError where its interpreter was not named."""
    if peer not in peers.interpreters:
        raise RuntimeError(f"no interpreter was named (--{peer} PYTHON)")
    return [peers.interpreters[peer], str(HERE / f"peer_{peer}.py"), *map(str, arguments)]


def ask(peers: Peers, peer: str, *arguments: object) -> dict[str, Any]:
    """Run a peer's script and give what it prints in its last line; raise RuntimeError where it fails."""
    done = quiet(command(peers, peer, *arguments))
    return cast("dict[str, Any]", json.loads(done.stdout.strip().splitlines()[-1]))


def quiet(words: Sequence[str], *, accepted: Sequence[int] = (0,)) -> "subprocess.CompletedProcess[str]":
    """Run a command, with the telemetry of the peers off; raise RuntimeError with its last line when it fails."""
    environment = os.environ | {"CI": "true", "OLIVE_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{words[0]} cannot be run: {error.strerror}") from error
    if done.returncode not in accepted:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(told[-1])
    return done
