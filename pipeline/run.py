"""All stages in order: the table of contents of bitferry."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import targets
from device.errors import InputError
from pipeline import dataset, progress
from pipeline.artifacts import (
    Bundle,
    Compiled,
    FloatModel,
    Onnx,
    Program,
    Simplified,
    Split,
    Traced,
    Verdict,
    Weights,
)
from pipeline.bundle import bundle, check_output
from pipeline.cache import Cache
from pipeline.compile import compile
from pipeline.export import export, simplify
from pipeline.load import load
from pipeline.quantize import quantize
from pipeline.recipe import Recipe
from pipeline.trace import trace
from pipeline.train import train
from pipeline.verify import verify


def deploy(run: "Run", names: Sequence[str], out: Path) -> list[Bundle | Verdict]:
    """Take the recipe's model to every target named; outside the budget, a target gives its verdict and no bundle."""
    check_output(run.recipe, list(names), out)
    return [Deployment(run, name).ship(out) for name in names]


@dataclass(frozen=True)
class Run:
    """What all targets share: the recipe's data and its float model."""

    recipe: Recipe
    folder: Path
    """Where the recipe's `module:` source is looked for."""
    build: Cache
    trust: bool = False

    @cached_property
    def calibration(self) -> Split:
        return self._split("calibration", self.recipe.data.calibration)

    @cached_property
    def evaluation(self) -> Split:
        return self._split("evaluation", self.recipe.data.evaluation)

    @cached_property
    def training(self) -> Split:
        if self.recipe.data.train is None:
            raise InputError(f"recipe '{self.recipe.name}' has neither model.weights nor data.train")
        return self._split("train", self.recipe.data.train)

    @cached_property
    def weights(self) -> Weights:
        if self.recipe.model.source.startswith("pt2:"):
            raise InputError(f"recipe '{self.recipe.name}' has an exported program, which is not trained")
        self.check_data()
        return train(self.recipe, self.training, self.build, folder=self.folder)

    @cached_property
    def model(self) -> FloatModel:
        self.check_data()
        given = self.recipe.model.weights
        trains = given is None and not self.recipe.model.source.startswith("pt2:")
        return load(self.recipe, self.weights.path if trains else given, folder=self.folder, trust=self.trust)

    def check_data(self) -> None:
        """Read every split the recipe names and refuse images that are in two of them."""
        splits = [self.calibration, self.evaluation]
        dataset.refuse_leaks(*splits, *([self.training] if self.recipe.data.train else []))

    def _split(self, name: str, source: Path) -> Split:
        return dataset.split(name, source, self.recipe.classes, self.recipe.preprocessing, self.build)


@dataclass(frozen=True)
class Deployment:
    """One target's way: each property is a stage, made from the one before it or reused."""

    run: Run
    name: str

    @cached_property
    def program(self) -> Program:
        run, recipe = self.run, self.run.recipe
        scheme = targets.get(self.name).SCHEMES[recipe.precision]
        if scheme is None:
            return replace(run.model, precision=recipe.precision)
        return quantize(run.model, run.calibration, scheme, recipe.quantization, run.build)

    @cached_property
    def traced(self) -> Traced:
        return trace(self.program, self.run.calibration, self.run.build)

    @cached_property
    def exported(self) -> Onnx:
        return export(self.program, self.run.calibration, self.run.build)

    @cached_property
    def simplified(self) -> Simplified:
        return simplify(self.exported, self.run.calibration, self.run.build)

    @cached_property
    def compiled(self) -> Compiled:
        sources: dict[str, Simplified | Traced] = {"torchscript": self.traced, "onnx": self.simplified}
        source = sources[targets.get(self.name).CONSUMES]
        return compile(source, self.name, self.run.build, threads=self.run.recipe.threads(self.name))

    @cached_property
    def verdict(self) -> Verdict:
        return verify(self.run.model, self.compiled, self.run.evaluation, self.run.recipe.budget, self.run.build)

    def ship(self, out: Path) -> Bundle | Verdict:
        if not self.verdict.passed:
            progress.stage("bundle", f"none for {self.name}: {self.verdict.outcome}")
            return self.verdict
        return bundle(self.run.recipe, self.run.model, self.compiled, self.verdict, out)
