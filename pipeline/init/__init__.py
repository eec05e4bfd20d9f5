"""A model's file and labelled images → a commented recipe, its guesses tried, and a list of images for each split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import checkpoint, dataset, load, progress
from bitferry.pipeline.init import answers, architecture, contracts, names, pictures, trial, whole, written
from bitferry.pipeline.init.pictures import Pictures
from bitferry.pipeline.measure.metrics import Task
from bitferry.pipeline.recipe import Recipe

TRIED = 4
"""How many architectures with the same names and shapes are tried at most."""


@dataclass(frozen=True)
class Model:
    """What the model might be: one of these, the likelier first."""

    opened: tuple[trial.Opened, ...]
    options: dict[str, dict[str, Any]]
    """By source: of its constructor."""
    why: str
    why_size: str
    notes: tuple[str, ...]
    weights: Path | None


@dataclass(frozen=True)
class Asked:
    """What `bitferry init` was given."""

    model: Path
    images: Path
    output: Path
    source: str | None = None
    size: contracts.Sides | None = None
    """Height and width."""
    classes: Path | None = None
    trust: bool = False


def sides(text: str) -> contracts.Sides:
    """Read height and width, `224`, `224x160`, `224×160` or `224,160`; raise InputError for anything else."""
    parts = re.split(r"\s*[x×X*,]\s*", text.strip())
    if len(parts) > 2 or not all(re.fullmatch(r"[1-9]\d{0,4}", part) for part in parts):
        raise InputError(f"--size {text}: expected one number, or HEIGHTxWIDTH, as 224 or 224x160")
    return int(parts[0]), int(parts[-1])


def init(asked: Asked) -> list[Path]:
    """Write the recipe, and beside it a list for each split; return what was written.

    Raises InputError rather than overwrite a file, and when the model cannot be told from its file.
    """
    stem = asked.output.with_suffix("")
    _refuse_existing([asked.output, *(stem.with_name(f"{stem.name}-{part}") for part in PARTS)])
    found = pictures.find(asked.images)
    progress.stage("init", f"{asked.images}: {found.told}")
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    lists: dict[str, Path] = {}
    try:
        model, classes, task, found = _told(asked, found, stem)
        lists = found.write(stem)
        samples = dataset.read("evaluation", lists["evaluation"], names.of(classes), _any(model), task)
        for opened in model.opened:
            answers.check(opened, task, len(names.of(classes)))
        tried = trial.run(model.opened, samples, task, len(names.of(classes)), partial(contracts.variants, found=found))
    except BaseException:
        for path in (*lists.values(), stem.with_name(f"{stem.name}-classes.txt")):
            path.unlink(missing_ok=True)
        raise
    _tell(tried)
    content = _content(asked, model, classes, task, tried, lists)
    asked.output.write_text(written.recipe(content), encoding="utf-8")
    more = [stem.with_name(f"{stem.name}-classes.txt")]
    return [asked.output, *lists.values(), *(path for path in more if path.exists())]


PARTS = (*(f"{name}.{end}" for name in ("train", "calibration", "evaluation") for end in ("tsv", "npz")), "classes.txt")


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists; move it away or name another with --output")


def _told(asked: Asked, found: Pictures, stem: Path) -> tuple[Model, names.Classes, Task, Pictures]:
    """Tell the model and its classes, each by help of the other."""
    ending = asked.model.suffix.lower()
    if asked.source and asked.source.startswith(("pt2:", "onnx:")):
        raise InputError(
            f"leave out --source and give the file itself: bitferry init {asked.source.partition(':')[2]} …"
        )
    if ending in (".onnx", ".pt2"):
        opened = whole.onnx(asked.model) if ending == ".onnx" else whole.program(asked.model, asked.trust)
        _refuse_other_task(opened.segments, found, asked)
        classes, found = names.settle(found, opened.classes, asked.classes, stem)
        return _of_whole(asked, opened, found), classes, found.task, found
    state = checkpoint.read(asked.model)
    if asked.source:
        head = answers.head(asked.source, state, asked.output.parent, asked.model, found.task, asked.size)
        classes, found = names.settle(found, head, asked.classes, stem)
        return _of_source(asked, state, found, classes), classes, found.task, found
    guesses = architecture.guesses(state)
    _refuse_other_task(guesses[0].task == "segmentation", found, asked)
    progress.stage("init", f"the checkpoint is {architecture.named(guesses)}, of {guesses[0].classes} classes")
    classes, found = names.settle(found, guesses[0].classes, asked.classes, stem)
    return _of_guesses(asked, state, guesses, found), classes, found.task, found


def _refuse_other_task(segments: bool, found: Pictures, asked: Asked) -> None:
    if segments != (found.task == "segmentation"):
        gives, wants = ("every pixel", "images with masks") if segments else ("every image", "images with classes")
        held = f"{asked.images} holds {found.told}"
        raise InputError(f"{asked.model} gives a class for {gives}, and {held}; give {wants}: {pictures.LAYOUTS}")


def _of_guesses(
    asked: Asked, state: dict[str, Tensor], guesses: Sequence[architecture.Guess], found: Pictures
) -> Model:
    """Open each guess; those that answer alike are one."""
    seen: list[Tensor] = []
    opened, options = [], {}
    grey = contracts.notice(found)
    for guess in guesses[:TRIED]:
        model = architecture.build(guess)
        checkpoint.fill(model, state, asked.model)
        usual = guess.usual
        height, width = asked.size or ((usual.size,) * 2 if usual else (64, 64))
        answer = trial.scores(
            model.eval(), torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        )
        if any(torch.equal(answer, other) for other in seen):
            continue
        seen.append(answer)
        ways = contracts.candidates(found, usual, asked.size)
        opened.append(trial.Opened(guess.source, model, ways))
        options[guess.source] = guess.options
    alike = f" (as of {architecture.named(guesses[1:])})" if len(guesses) > 1 else ""
    why = f"its names and shapes are those of the checkpoint{alike}"
    usual = guesses[0].usual
    size = f"that of {usual.says}" if usual else contracts.WHY_SIZE
    return Model(tuple(opened), options, why, size, grey, asked.model)


def _of_source(asked: Asked, state: dict[str, Tensor], found: Pictures, classes: names.Classes) -> Model:
    """Open the model that was named."""
    source = str(asked.source)
    ways = contracts.candidates(found, architecture.usual(source, {}), asked.size)
    recipe = Recipe.model_validate(
        {
            "name": "init", "classes": names.of(classes), "task": found.task, "model": {"source": source},
            "preprocessing": ways[0][1], "data": {"calibration": "-", "evaluation": "-"},
        }
    )  # fmt: skip
    model: nn.Module = load.architecture(recipe, asked.output.parent)
    checkpoint.fill(model, state, asked.model)
    usual = architecture.usual(source, {})
    size = f"that of {usual.says}" if usual else contracts.WHY_SIZE
    opened = trial.Opened(source, model.eval(), ways)
    return Model((opened,), {source: {}}, "as told", size, contracts.notice(found), asked.model)


def _of_whole(asked: Asked, opened: whole.Whole, found: Pictures) -> Model:
    kind = asked.model.suffix[1:].lower()
    source = f"{kind}:{asked.model.resolve()}"
    ways = contracts.candidates(found, None, asked.size, fixed=(opened.height, opened.width), inside=opened.pixels)
    notes = contracts.notice(found)
    if opened.layout == "NHWC":
        notes = ("The file takes N×H×W×3.", *notes)
    size = "that of the file" if opened.height else contracts.WHY_SIZE
    return Model(
        (trial.Opened(source, opened.answer, ways),), {source: {}}, "the graph and its weights", size, notes, None
    )


def _any(model: Model) -> Preprocessing:
    return model.opened[0].contracts[0][1]


def _tell(tried: trial.Trial) -> None:
    best = tried.best
    told = (
        f"{best.name}: {best.percent:.1f} % right of {len(best.right)} images, by chance {tried.chance_percent:.1f} %"
    )
    progress.stage("init", told)
    if not tried.better_than_chance:
        progress.stage("init", "none is better than chance: the labels or the order of the classes may be wrong")


def _content(
    asked: Asked, model: Model, classes: names.Classes, task: Task, tried: trial.Trial, lists: dict[str, Path]
) -> written.Content:
    chosen = tried.best if tried.better_than_chance else None
    source = chosen.source if chosen else model.opened[0].source
    contract = chosen.contract if chosen else _any(model)
    usual = contract.height == _any(model).height
    why = (
        f"{asked.size[0]}x{asked.size[1]} was asked for"
        if asked.size
        else model.why_size
        if usual
        else "chosen among those tried above"
    )
    return written.Content(
        name=written.named(asked.output.stem),
        task=task,
        classes=Path(classes).name if isinstance(classes, str) else classes,
        source=source,
        why=model.why,
        weights=model.weights.resolve() if model.weights else None,
        options=model.options[source],
        contract=replace(contract),
        why_size=why,
        notes=model.notes,
        data={name: path.name for name, path in lists.items()},
        trial=tried,
    )
