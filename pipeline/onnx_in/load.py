"""A recipe's `onnx:FILE` → the float baseline: looked over, 32-bit, of a usual opset, the contract in front of it."""

import contextlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from bitferry.device.arrays import Images, Outputs, Predict
from bitferry.device.errors import InputError, first_line
from bitferry.device.onnx_file import OPSETS
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache, progress
from bitferry.pipeline.artifacts import FloatOnnx
from bitferry.pipeline.onnx_in import front, given
from bitferry.pipeline.onnx_in.asked import PREFIX, refuse_besides
from bitferry.pipeline.onnx_in.session import Session, opened, predict
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.scores import check_scores
from bitferry.pipeline.statistics import sqnr_db

TOLERANCE = 1e-4
"""Of what is made of a file: the largest difference from it allowed, as a share of its largest score (at least 1)."""
LEAST_DB = 30.0
"""What a model of 16-bit floats may be from the same in 32 bits: its own rounding."""
TRIED = 3
"""Images that both are tried on."""
SOURCES = [Path(__file__).with_name(f"{name}.py") for name in ("front", "given", "session")]


def load(recipe: Recipe, folder: Path, build: cache.Cache) -> FloatOnnx:
    """Read the recipe's file, in `folder` unless its path is absolute, and make the graph that is shipped of it.

    Raises InputError for a file that is no float ONNX model, or does not give one score per class of such images.
    """
    path = folder / recipe.model.source.removeprefix(PREFIX)
    refuse_besides(recipe)
    if not path.is_file():
        raise InputError(f"the model {path} does not exist")
    key = cache.key(
        "load",
        code=__file__,
        codes=[cache.file_hash(one) for one in SOURCES],
        packages=("onnx", "onnxruntime"),
        model=cache.file_hash(path),
        classes=recipe.classes,
        task=recipe.task,
        contract=recipe.preprocessing,
    )
    done = build.folder("load", key, partial(_load, path, recipe))
    batch = json.loads((done / "facts.json").read_text())["batch"]
    return FloatOnnx(done / "model.onnx", path, recipe.preprocessing, recipe.classes, key, batch)


def as_given(path: Path, contract: Preprocessing) -> Predict:
    """Answer with the file itself, operator by operator, and the contract's arithmetic done by NumPy."""
    return _answering(given.read(path), contract, path)


@dataclass(frozen=True)
class _Reference:
    """The file as given, and its answers for a few pictures: what every change of its graph is held against."""

    path: Path
    contract: Preprocessing
    pictures: Images
    scores: Outputs
    least_db: float | None
    """How near answers must be where the floats were of another width; None where they must be the same."""

    def fault(self, model: ModelProto, *, at_once: bool = False) -> str | None:
        """Say how a changed graph's answers differ, or why it gives none; `at_once` sends all in one call."""
        try:
            wanted = front.inputs(model, self.contract, self.path)
            if at_once:
                session = opened(model.SerializeToString())
                return self.differs(session.run(None, front.fed(self.pictures, wanted, self.contract))[0])
            return self.differs(_answering(model, self.contract, self.path)(self.pictures))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions have no base of their own
            return first_line(error)

    def differs(self, found: Outputs) -> str | None:
        """Say how answers differ; None where they are the same."""
        if self.scores.shape != found.shape:
            return f"{list(found.shape)} come for {len(self.pictures)} images in place of {list(self.scores.shape)}"
        if self.least_db is not None:
            decibels = sqnr_db(self.scores, found)
            near = decibels >= self.least_db
            return None if near else f"the answers are {decibels:.1f} dB apart, {self.least_db:g} needed"
        difference = float(np.abs(self.scores - found).max() / max(1.0, float(np.abs(self.scores).max())))
        if difference <= TOLERANCE:
            return None
        return f"the largest difference is {difference:.2g} of the largest score, {TOLERANCE:g} allowed"


def _load(path: Path, recipe: Recipe, out: Path) -> None:
    contract, model = recipe.preprocessing, given.read(path)
    fixed = front.inputs(model, contract, path)[0].batch  # its faults are told before anything runs
    count = TRIED + (fixed == TRIED)  # as many as the file fixes would say nothing of other numbers
    pictures = np.random.default_rng(0).integers(0, 256, (count, *contract.shape), np.uint8)
    model, scores = _first_answers(model, contract, path, pictures)
    reference = _Reference(path, contract, pictures, scores, LEAST_DB if given.widths(model) else None)
    model = _of_any_batch(_usual(_widened(model, reference), reference), reference)
    wanted = front.inputs(model, contract, path)
    made = front.with_contract(model, wanted, contract)
    if fault := reference.differs(predict(made.SerializeToString())(pictures)):
        raise InputError(f"{path} answers otherwise with the recipe's preprocessing inside its graph: {fault}")
    onnx.save(made, out / "model.onnx")
    (out / "facts.json").write_text(json.dumps({"batch": wanted[0].batch}))
    check_scores(Session(out / "model.onnx"), recipe)


def _first_answers(
    model: ModelProto, contract: Preprocessing, path: Path, pictures: Images
) -> tuple[ModelProto, Outputs]:
    """Give the file's answers, made 32-bit where ONNX Runtime has no operators of its width; and what gave them."""
    try:
        return model, _answering(model, contract, path)(pictures)
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        if widths := " and ".join(map(str, sorted(given.widths(model)))):
            with contextlib.suppress(Exception):
                made = given.widened(model)
                scores = _answering(made, contract, path)(pictures)
                progress.stage("load", f"{path.name} has floats of {widths} bits; made 32-bit, it is the float model")
                return made, scores
        raise InputError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error


def _answering(model: ModelProto, contract: Preprocessing, path: Path) -> Predict:
    wanted = front.inputs(model, contract, path)
    session, batch = opened(model.SerializeToString()), wanted[0].batch or 1

    def answer(images: Images) -> Outputs:
        rows = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            full = np.concatenate([part, np.repeat(part[:1], batch - len(part), 0)])
            rows.append(session.run(None, front.fed(full, wanted, contract))[0][: len(part)])
        return np.concatenate(rows).astype(np.float32)

    return answer


def _widened(model: ModelProto, reference: _Reference) -> ModelProto:
    """Make floats of 16 or 64 bits 32 bits wide."""
    found = given.widths(model)
    if not found:
        return model
    widths, made = " and ".join(map(str, sorted(found))), given.widened(model)
    if fault := reference.fault(made):
        told = f"{reference.path} has floats of {widths} bits, and cannot be made 32-bit: {fault}"
        raise InputError(f"{told}; give it as float32")
    progress.stage("load", f"{reference.path.name} has floats of {widths} bits; made 32-bit, it is the float model")
    return made


def _usual(model: ModelProto, reference: _Reference) -> ModelProto:
    """Convert an older opset to the usual one; where that fails, what the targets read is left as it is."""
    found, oldest, made = given.opset(model), OPSETS.start, model
    if found >= given.USUAL:
        return model
    try:
        made = given.converted(model)
        onnx.checker.check_model(made)
        fault = reference.fault(made)
    except Exception as error:  # noqa: BLE001 - the converter is C++ and raises anything
        fault = first_line(error)
    if not fault:
        progress.stage("load", f"{reference.path.name} is of opset {found}, converted to {given.USUAL}")
        return made
    if found < oldest:
        raise InputError(
            f"{reference.path} is of opset {found}; {oldest} or later is needed, and onnx's converter does not get "
            f"there: {fault}; export the model anew with opset_version={given.USUAL}"
        )
    return model


def _of_any_batch(model: ModelProto, reference: _Reference) -> ModelProto:
    """Open a fixed batch where the answers stay the same; else say that it stays."""
    path, wanted = reference.path, front.inputs(model, reference.contract, reference.path)
    if wanted[0].batch is None:
        return model
    made = front.any_batch(model, wanted)
    fault = reference.fault(made, at_once=True)
    end = "it is dynamic now" if fault is None else f"which stays so: {fault}"
    progress.stage("load", f"{path.name} fixes its batch at {wanted[0].batch}; {end}")
    return model if fault else made
