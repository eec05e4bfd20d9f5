"""Program → ONNX → simplified ONNX, each compared with what it was made from on real calibration images."""

import ast
import contextlib
import copy
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import torch

from bitferry.device.arrays import Images, Outputs
from bitferry.device.errors import StageFailed, first_line
from bitferry.pipeline import cache, conditioning, unsupported
from bitferry.pipeline.artifacts import FloatOnnx, Onnx, Program, Simplified, TorchProgram
from bitferry.pipeline.capture import captured
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.division import drawn
from bitferry.pipeline.first_difference import first_difference
from bitferry.pipeline.onnx_in import session
from bitferry.pipeline.statistics import sqnr_db

aten = torch.ops.aten
OPSET = 18
TOLERANCE = 1e-4
"""Of a float graph: the largest difference allowed, as a share of the largest score (at least 1)."""
MOST_LOST_DB = 3.0
"""Of an int8 graph: how much further from the float model it may be than the one it was made from."""
MOST_DB = 60.0
"""Beyond this, two int8 graphs are as good as each other."""
CHECKED_IMAGES = 32
SOURCES = ("capture", "functional", "rewrites", "division", "conditioning")
"""Whose code decides as well what is exported."""
NAMED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def export(program: TorchProgram, calibration: Split, build: cache.Cache) -> Onnx:
    """Export to ONNX opset 18, batch dynamic, uint8 N×H×W×3 in; raise StageFailed when its answers differ."""
    key = cache.key(
        "export",
        code=__file__,
        sources=[cache.file_hash(Path(__file__).with_name(f"{name}.py")) for name in SOURCES],
        packages=("torch", "onnx", "onnxscript"),
        program=program.key,
        data=calibration.key,
    )
    done = build.folder("export", key, partial(_export, program, calibration))
    return Onnx(done / "model.onnx", program, key)


def simplify(model: Onnx, calibration: Split, build: cache.Cache) -> Simplified:
    """Fold constants and drop what does nothing (onnxsim); raise StageFailed when the answers change."""
    key = cache.key("simplify", code=__file__, packages=("onnx", "onnxsim"), model=model.key, data=calibration.key)
    done = build.folder("simplify", key, partial(_simplify, model, calibration))
    return Simplified(done / "model.onnx", model.program.precision, key)


def answer(model: Path, images: Images) -> Outputs:
    """Run an ONNX file operator by operator, without the rewrites that ONNX Runtime would make for speed."""
    return session.predict(model)(images)


def _answer(model: Path, images: Images, what: str) -> Outputs:
    try:
        return answer(model, images)
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise StageFailed(f"{what} cannot be run to compare its answers: {first_line(error)}") from error


def _export(program: TorchProgram, calibration: Split, out: Path) -> None:
    images = drawn(calibration.images, CHECKED_IMAGES)
    with torch.no_grad(), _quiet():
        whole = captured(program)
        try:
            exported = torch.onnx.export(
                with_clamps(whole),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["scores"],
            )
        except Exception as error:
            why = unsupported.in_export(error, lambda: whole)
            raise StageFailed(f"torch.onnx.export failed: {why}") from error
        cast("torch.onnx.ONNXProgram", exported).save(out / "model.onnx", external_data=False)
        pixels, found = torch.from_numpy(images.copy()), _answer(out / "model.onnx", images, "the exported ONNX")
        own = (module(pixels).numpy() for module in conditioning.modules(whole.module()))
        blame = partial(first_difference, whole.module(), out / "model.onnx", images[:2], TOLERANCE)
        _compare(program.module()(pixels).numpy(), found, own, program, images, "the exported ONNX", blame)


def with_clamps(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Copy a program with ReLU6 and hardtanh as clamps, which the exporter finds out symbolically, and slowly."""
    copied = copy.deepcopy(program)
    for node in copied.graph.nodes:
        if node.target is aten.relu6.default:
            node.target, node.args = aten.clamp.default, (node.args[0], 0.0, 6.0)
        if node.target is aten.hardtanh.default:
            node.target, node.args = aten.clamp.default, (*node.args, *(-1.0, 1.0)[len(node.args) - 1 :])
        if node.target is aten.clamp.default and node.meta["val"].is_floating_point():
            bounds = (float(bound) if isinstance(bound, int) else bound for bound in node.args[1:])
            node.args = (node.args[0], *bounds)  # of a whole one the exporter makes a tensor, of the other it does not
    copied.graph_module.recompile()
    return copied


def _simplify(model: Onnx, calibration: Split, out: Path) -> None:
    import onnxsim  # noqa: PLC0415 - a second to import, which a run that finds this stage in the cache is spared

    try:
        named = onnx.load(model.path)
        if not isinstance(model.program, FloatOnnx):  # whose nodes go by the names that their file gives them
            _name_by_module(named)
        simplified, _ = onnxsim.simplify(named)
        _strip(simplified)
        onnx.checker.check_model(simplified, full_check=True)
    except Exception as error:
        raise StageFailed(f"onnxsim failed on {model.path}: {first_line(error)}") from error
    onnx.save(simplified, out / "model.onnx")
    images = drawn(calibration.images, CHECKED_IMAGES)
    before, after = answer(model.path, images), _answer(out / "model.onnx", images, "the simplified ONNX")
    own = (predict(images) for predict in conditioning.onnx_files(model.path))
    _compare(before, after, own, model.program, images, "the simplified ONNX")


def _name_by_module(model: onnx.ModelProto) -> None:
    """Name each convolution and matrix product after the PyTorch module it came from, for the reader of a report.

    Every other node gets the module's name before its own, so that a compiler's complaint names the layer. A float
    weight still has its module's name; a quantized one does not, and there the exporter's note tells, which in turn
    names the batch norm where a float convolution has swallowed one.
    """
    modules = {node.name: _module(node) for node in model.graph.node}
    shared = Counter(modules[node.name] for node in model.graph.node if node.op_type in NAMED)
    for node in model.graph.node:
        module = modules[node.name]
        if module:
            node.name = module if node.op_type in NAMED and shared[module] == 1 else f"{module}/{node.name}"


def _module(node: onnx.NodeProto) -> str:
    weights = [name for name in node.input[1:2] if name.endswith(".weight")]
    notes = {note.key: note.value for note in node.metadata_props}
    scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    path = weights[0].removesuffix(".weight") if weights else (scopes[-2] if len(scopes) > 1 else "")
    return str(path).removeprefix("model.")


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes, which hold the paths of the machine that exported."""
    del model.metadata_props[:]
    model.doc_string = ""
    for thing in (
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        thing.doc_string = ""
        del thing.metadata_props[:]
    for constant in model.graph.initializer:
        del constant.metadata_props[:]


def _compare(
    before: Outputs,
    after: Outputs,
    own: Iterable[Outputs],
    program: Program,
    images: Images,
    what: str,
    blame: Callable[[], str | None] = lambda: None,
) -> None:
    """Raise StageFailed when a float graph answers differently, or an int8 graph is further from the float model.

    A float graph may differ as far as what it was made from does from its `own` answers of weights changed a little.

    Two right int8 graphs need not agree closely: where sums differ in the last bit, a rounding tie falls the other
    way, and each such step makes more of them in the layers after it. What must not grow is the distance to float.
    """
    if program.quantized:
        with torch.no_grad():
            reference = program.baseline.module()(torch.from_numpy(images.copy())).numpy()
        had, has = sqnr_db(reference, before), sqnr_db(reference, after)
        wrong = not has >= min(had, MOST_DB) - MOST_LOST_DB
        told = f"SQNR against the float model fell from {had:.1f} to {has:.1f} dB, at most {MOST_LOST_DB:g} dB allowed"
    else:
        difference, allowed = _difference(before, after), TOLERANCE
        if not difference <= allowed:
            allowed = max(allowed, *(conditioning.MARGIN * _difference(before, answers) for answers in own))
        wrong = not difference <= allowed
        told = f"the largest difference is {difference:.2g} of the largest score, {allowed:.2g} allowed"
    if wrong:
        blamed = None if program.quantized else blame()
        where = f"; what goes wrong first is {blamed}" if blamed else ""
        raise StageFailed(f"{what} answers {len(images)} calibration images differently: {told}{where}")


def _difference(before: Outputs, after: Outputs) -> float:
    """Return the largest difference as a share of the largest score, or of 1."""
    return float(np.abs(before - after).max() / max(1.0, float(np.abs(before).max())))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's chatter; failures come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        silent = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
