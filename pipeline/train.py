"""Train the recipe's architecture on its training images: seeded, so that the same recipe gives the same weights."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from bitferry.pipeline import augment, augmentation, cache, load, loader
from bitferry.pipeline.artifacts import Weights
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.load import PACKAGES
from bitferry.pipeline.measure import accuracy, metrics, segmentation
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.training import batch, course, machine, processes, start, state
from bitferry.pipeline.training.course import Job

CODE = [
    *sorted(Path(__file__).with_name("training").glob("*.py")),
    *(Path(str(module.__file__)) for module in (load, loader, augment, augmentation, accuracy, metrics, segmentation)),
    *load.READERS,
]


def train(
    recipe: Recipe,
    data: Split,
    build: cache.Cache,
    *,
    folder: Path = Path(),
    processes: int = 1,
    download: bool = False,
) -> Weights:
    """Train from scratch or from weights that know something already; one that was killed goes on where it was.

    With several `processes` each computes its share of every batch. `download` lets a library fetch its weights.
    """
    machine.check_processes(processes)
    job, key = prepare(recipe, data, build, folder=folder, download=download)
    done = build.folder("train", key, partial(_train, job, processes))
    state.remove(job.checkpoint)
    return Weights(done / course.WEIGHTS, key)


def prepare(
    recipe: Recipe, data: Split, build: cache.Cache, *, folder: Path = Path(), download: bool = False
) -> tuple[Job, str]:
    """Find out all that a training depends on, and give it with the key that is made from that."""
    begin, precision = start.find(recipe, download=download), machine.precision(recipe.training)
    size = batch.choose(recipe, data, build, precision, folder)
    key = cache.key(
        "train",
        code=__file__,
        packages=(*PACKAGES[recipe.model.source.partition(":")[0]], "torchvision", "accelerate"),
        modules={path.name: cache.file_hash(path) for path in CODE},
        own_code=load.own_code(recipe, folder),
        own_imports=load.own_imports(recipe, folder),
        model=recipe.model.model_dump(mode="json"),
        contract=recipe.preprocessing,
        classes=recipe.classes,
        task=recipe.task,
        metric=(recipe.metric, recipe.budget.metric_options),
        training=recipe.training.model_dump(exclude={"start", "batch_size", "precision"}),
        augmentation=recipe.augmentation.model_dump(mode="json"),
        start=cache.file_hash(begin) if begin else None,
        batch=size,
        precision=precision,
        data=data.key,
    )
    kept, curves = build.root / f".train-{key}.pt", build.root / "curves" / key
    return Job(recipe, folder, data, begin, size, precision, kept, curves, Path(), course.SECONDS), key


def _train(job: Job, count: int, out: Path) -> None:
    processes.teach(replace(job, out=out), count)
