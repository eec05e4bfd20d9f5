"""What a verdict says of where the artifact comes from: recipe, data, model, versions, command."""

from datetime import UTC, datetime
from importlib.metadata import version
from typing import TypedDict

from bitferry import targets
from bitferry.pipeline.artifacts import Compiled, Program
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.verdict import SCHEMA

PACKAGES = (
    "bitferry", "torch", "torchvision", "torchao", "onnx", "onnxscript", "onnxsim", "onnxruntime", "torchmetrics",
    "numpy", "pillow",
)  # fmt: skip


class Made(TypedDict):
    """The fields of a verdict that do not come from measuring."""

    schema: int
    recipe: str
    version: str
    target: str
    precision: targets.Precision
    budget_metric: str
    budget_confidence: float
    budget_drop_pp: float
    environment: targets.Environment
    versions: dict[str, str]
    command: str
    compiled_key: str
    model_key: str
    data_key: str
    measured_at: str


def made_from(recipe: Recipe, program: Program, compiled: Compiled, evaluation: Split, command: str) -> Made:
    """Give what a verdict says of where the artifact comes from."""
    environment = compiled.environment
    return Made(
        schema=SCHEMA,
        recipe=recipe.name,
        version=recipe.version,
        target=compiled.target,
        precision=compiled.precision,
        budget_metric=recipe.metric,
        budget_confidence=recipe.budget.confidence,
        budget_drop_pp=recipe.budget.accuracy_drop_pp,
        environment=environment,
        versions={name: version(name) for name in PACKAGES} | {environment.runtime: environment.version},
        command=command,
        compiled_key=compiled.key,
        model_key=program.baseline.key,
        data_key=evaluation.key,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
