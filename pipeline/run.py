"""All stages in order: the table of contents of bitferry."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from bitferry import targets
from bitferry.device.errors import InputError
from bitferry.pipeline import dataset, failing, progress, rungs
from bitferry.pipeline.artifacts import (
    Baseline,
    Bundle,
    Captured,
    Compiled,
    FloatOnnx,
    Onnx,
    Program,
    Quantized,
    QuantizedOnnx,
    Simplified,
    Source,
    TorchProgram,
    Traced,
    Unmeasured,
    Verified,
    Weights,
)
from bitferry.pipeline.bundle import bundle
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.capture import capture
from bitferry.pipeline.compile import compile
from bitferry.pipeline.data import leaks, near, senseless
from bitferry.pipeline.data import source as sources
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.export import export, simplify
from bitferry.pipeline.load import architecture, load
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.onnx_in import asked as onnx_in
from bitferry.pipeline.onnx_in import way as onnx_way
from bitferry.pipeline.onnx_in.load import load as load_onnx
from bitferry.pipeline.quantize import Lessons, quantize
from bitferry.pipeline.recipe import Quantization, Recipe
from bitferry.pipeline.report import record
from bitferry.pipeline.shipping.provenance import Origin, epoch
from bitferry.pipeline.trace import trace
from bitferry.pipeline.train import train
from bitferry.pipeline.verdict import Search, searched
from bitferry.pipeline.verify import Way, evaluate, unmeasured, verify
from bitferry.targets import Precision


@dataclass(frozen=True)
class Run:
    """What all targets share: the recipe's data and its float model."""

    recipe: Recipe
    path: Path
    """The recipe's file; its `module:` source is looked for beside it."""
    build: Cache
    trust: bool = False
    effort: Effort = "default"
    processes: int = 1
    """That train, each with its share of every batch."""
    download: bool = False
    """Whether a library may fetch data, or weights that training starts from, that are not there."""

    @cached_property
    def calibration(self) -> Split:
        return self._split("calibration", self.recipe.data.calibration)

    @cached_property
    def evaluation(self) -> Split:
        return self._split("evaluation", self.recipe.data.evaluation)

    @cached_property
    def training(self) -> Split:
        if self.recipe.data.train is None:
            wants = "no data.train, which quantization.method 'qat' trains on; its labels are not used"
            lacks = "neither model.weights nor data.train" if self.recipe.model.weights is None else wants
            raise InputError(f"recipe '{self.recipe.name}' has {lacks}")
        return self._split("train", self.recipe.data.train)

    @cached_property
    def weights(self) -> Weights:
        if self.recipe.model.whole:
            raise InputError(f"recipe '{self.recipe.name}' has {self.recipe.model.whole}, which is not trained")
        if not self.trains:
            raise InputError(
                f"recipe '{self.recipe.name}' has model.weights, so there is nothing to train; "
                "to train on from them, name the file as training.start instead"
            )
        recipe, folder = self.recipe, self.path.parent
        architecture(recipe, folder)  # its faults are told before the data is decoded
        self.check_data()
        return train(recipe, self.training, self.build, folder=folder, processes=self.processes, download=self.download)

    @cached_property
    def model(self) -> Baseline:
        found = self._model()  # its faults are told before the data is decoded
        self.check_data()
        return found

    def _model(self) -> Baseline:
        if onnx_in.is_onnx(self.recipe):
            return load_onnx(self.recipe, self.path.parent, self.build)
        given = self.weights.path if self.trains else self.recipe.model.weights
        with failing.stage("load"):
            return load(self.recipe, given, folder=self.path.parent, trust=self.trust)

    @property
    def trains(self) -> bool:
        """Say whether the model's weights are trained here."""
        return self.recipe.model.weights is None and not self.recipe.model.whole

    @property
    def weights_file(self) -> Path | None:
        """Give the file that the model's weights are in: trained here, given, or the whole model."""
        if self.recipe.model.whole:
            return self.path.parent / self.recipe.model.source.partition(":")[2]
        return self.weights.path if self.trains else self.recipe.model.weights

    def check_data(self) -> None:
        """Read every split the recipe names and refuse images that are in two of them."""
        splits = [self.calibration, self.evaluation, *([self.training] if self.recipe.data.train else [])]
        leaks.refuse(*splits)
        near.refuse(splits, self.build, allow=self.recipe.data.near_duplicates == "allow")
        senseless.refuse(self.calibration, self.evaluation)

    def _split(self, name: str, source: sources.Source) -> Split:
        recipe = self.recipe
        room = recipe.augmentation.room if name == "train" else 1.0
        how = dataset.Handling(recipe.data.broken_share, room, self.download)
        return dataset.split(name, source, recipe.classes, recipe.preprocessing, self.build, task=recipe.task, how=how)


@dataclass(frozen=True)
class Deployment:
    """One target's way: each property is a stage, made from the one before it or reused."""

    run: Run
    name: str
    precision: Precision
    keep: tuple[str, ...] = ()
    """Layers that stay float, besides the recipe's."""
    options: targets.Options | None = None
    """In place of the recipe's for this target."""
    quantization: Quantization | None = None
    """In place of the recipe's, and `note` says how it differs."""
    note: str = ""
    look: int = 0
    """Which look at the evaluation data this is (`Recipe.at_look`)."""
    search: Search | None = None
    """What was weighed before this way was chosen."""
    weight_bits: int | None = None
    """Of int8 weights, where that is not for this machine's processor to decide."""

    @property
    def title(self) -> str:
        """Say what sets it apart from the target's other ways."""
        kept = f", {len(self.keep)} layer{'s'[: len(self.keep) != 1]} in float" if self.keep else ""
        note = f", {self.note}" if self.note else ""
        return self.precision + note + kept + "".join(f", {one}" for one in self._changes())

    def _changes(self) -> Iterator[str]:
        """Say which settings of the target differ from the recipe's."""
        given = asdict(self.run.recipe.options(self.name))
        for name, value in asdict(self.options).items() if self.options else ():
            if value != given[name]:
                yield f"{value} thread{'s'[: value != 1]}" if name == "threads" else f"{name} {value}"

    @property
    def settings(self) -> Quantization:
        return self.quantization or self.run.recipe.quantization

    @property
    def chosen_options(self) -> targets.Options:
        return self.options or self.run.recipe.options(self.name)

    @cached_property
    def program(self) -> Program:
        run = self.run
        scheme = targets.scheme(targets.get(self.name), self.precision, self.chosen_options)
        if scheme is None:
            return replace(run.model, precision=self.precision)
        scheme = replace(scheme, weight_bits=self.weight_bits or scheme.weight_bits)
        settings = self._settings()
        if isinstance(run.model, FloatOnnx):
            int8 = onnx_way.quantized(run.model, run.calibration, scheme, settings, run.build)
            return replace(int8, precision=self.precision)
        lessons = Lessons(run.training, run.recipe.lessons) if settings.method == "qat" else None
        made = quantize(run.model, run.calibration, scheme, settings, run.build, lessons)
        return replace(made, precision=self.precision)

    def _settings(self) -> Quantization:
        """Give how int8 is made, with every layer that stays float."""
        return self.settings.model_copy(update={"keep": (*self.settings.keep, *self.keep)})

    @cached_property
    def torch_program(self) -> TorchProgram:
        """Give the program where it is PyTorch's; raise InputError where the recipe gives ONNX."""
        onnx_in.refuse_stage(self.run.recipe)
        return cast(TorchProgram, self.program)

    @property
    def quantized(self) -> Quantized | QuantizedOnnx:
        """Give the program of a precision that the target quantizes for."""
        return cast(Quantized | QuantizedOnnx, self.program)

    @cached_property
    def traced(self) -> Traced:
        return trace(self.torch_program, self.run.calibration, self.run.build)

    @cached_property
    def exported(self) -> Onnx:
        if isinstance(self.program, FloatOnnx | QuantizedOnnx):
            return Onnx(self.program.path, self.program, self.program.key)
        return export(self.torch_program, self.run.calibration, self.run.build)

    @cached_property
    def simplified(self) -> Simplified:
        if isinstance(self.program, QuantizedOnnx):  # of what was simplified
            return Simplified(self.program.path, self.precision, self.program.key)
        return simplify(self.exported, self.run.calibration, self.run.build)

    @cached_property
    def captured(self) -> Captured:
        return capture(self.torch_program, self.run.calibration, self.run.build)

    @cached_property
    def source(self) -> Source:
        ways: Mapping[targets.Form, Callable[[], Source]] = {
            "onnx": lambda: self.simplified,
            "torchscript": lambda: self.traced,
            "exported": lambda: self.captured,
        }
        return ways[targets.get(self.name).CONSUMES]()

    @cached_property
    def compiled(self) -> Compiled:
        options = self.chosen_options
        onnx_in.refuse_target(self.run.recipe, self.name)
        onnx_in.refuse_batch(self.run.model, self.name, options)
        return compile(self.source, self.name, self.program, self.run.calibration, self.run.build, options=options)

    @cached_property
    def runtime_float(self) -> Compiled | None:
        """Give the same target's float32, to be timed beside the artifact; None where it has none, or is it."""
        if self.precision == "float32" or "float32" not in targets.get(self.name).SCHEMES:
            return None
        return Deployment(self.run, self.name, "float32", options=self.options).compiled

    @property
    def way(self) -> Way:
        """Give how the artifact came about; without its own answers where this machine cannot run it."""
        runs = not self.compiled.environment.unmeasured
        return Way(self.program, self.compiled, self.runtime_float if runs else None, rungs.of(self, measured=runs))

    def evaluate(self) -> None:
        """Do what verification does that does not depend on the moment, for it to be reused."""
        evaluate(self.way, self.run.evaluation, self.run.build)

    @cached_property
    def verified(self) -> Verified | Unmeasured:
        run, recipe, way = self.run, self.run.recipe.at_look(self.look), self.way
        found: Verified | Unmeasured
        with failing.stage("verify", self.name):
            if self.compiled.environment.unmeasured:
                found = unmeasured(recipe, way, run.evaluation, run.build, command=self._command())
            else:
                measured = verify(recipe, way, run.evaluation, run.build, command=self._command(), effort=run.effort)
                found = replace(measured, verdict=searched(measured.verdict, self.search))
        progress.stage("report", str(record.write(found, run.build)))
        return found

    def ship(self, out: Path) -> Bundle | Verified | Unmeasured:
        verdict = self.verified.verdict
        if verdict.outcome not in ("pass", "unmeasured"):
            progress.stage("bundle", f"none for {self.name}: {verdict.outcome}")
            return self.verified
        with failing.stage("bundle", self.name):
            return bundle(self.origin, self.program, self.compiled, self.verified, out)

    @property
    def origin(self) -> Origin:
        """Say what the artifact was made from, besides its program."""
        run = self.run
        splits = (run.calibration, run.evaluation, *([run.training] if run.recipe.data.train else []))
        settings = self._settings() if self.program.quantized else None
        settings = onnx_in.usable(settings) if settings and onnx_in.is_onnx(run.recipe) else settings
        return Origin(run.recipe, run.path, settings, splits, run.weights_file, run.trains, epoch())

    def _command(self) -> str:
        """Give the command line that repeats the verification."""
        run = self.run
        words = ["bitferry", "verify", str(run.path), "--target", self.name]
        words += ["--precision", "auto" if self.search else self.precision]
        words += ["--build", str(run.build.root.parent)] if run.build.root.parent != Path("build") else []
        words += [f"--{run.effort}"] if run.effort != "default" else []
        return shlex.join([*words, *(["--trust"] if run.trust else [])])
