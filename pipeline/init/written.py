"""The text of a first recipe: every line with why it says what it says."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline.init.trial import Trial
from bitferry.pipeline.measure.metrics import Task

SHOWN = 8


@dataclass(frozen=True)
class Content:
    """What a recipe is to say."""

    name: str
    task: Task
    classes: tuple[str, ...] | int | str
    """The names, how many, or the file that has them."""
    source: str
    why: str
    weights: Path | None
    options: dict[str, Any]
    contract: Preprocessing
    why_size: str
    notes: Sequence[str]
    """What was noticed, for comments."""
    data: dict[str, str]
    """Split → file."""
    trial: Trial


def recipe(content: Content) -> str:
    """Write the whole recipe."""
    parts = [_head(content), _model(content), _preprocessing(content), _data(content), TAIL]
    return "\n".join(parts)


def quoted(text: str) -> str:
    """Write a TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def named(stem: str) -> str:
    """Make a recipe name of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"


def _head(content: Content) -> str:
    classes = content.classes
    shown = f"[{', '.join(map(quoted, classes))}]" if isinstance(classes, tuple) else _value(classes)
    task = "" if content.task == "classification" else f"task = {quoted(content.task)}\n"
    return (
        "# A recipe for bitferry: what is built, and how it is judged. Build it with\n#\n"
        f"#     bitferry deploy {content.name}.toml --target openvino\n\n"
        f'name = {quoted(content.name)}\nversion = "0.1.0"\n{task}'
        'precision = "auto"                 # the fastest inside the budget; or int8, float32, bfloat16\n'
        f"classes = {shown}\n"
    )


def _model(content: Content) -> str:
    lines = ["[model]", f"source = {quoted(content.source)}    # {content.why}"]
    lines += [f"weights = {quoted(str(content.weights))}"] if content.weights else []
    pairs = ", ".join(f"{name} = {_value(value)}" for name, value in content.options.items())
    return "\n".join([*lines, *([f"options = {{{pairs}}}"] if pairs else [])]) + "\n"


def _preprocessing(content: Content) -> str:
    contract = content.contract
    lines = [
        "[preprocessing]                    # A GUESS: must be what the model was trained with, or accuracy is lost"
    ]
    lines += [f"# {line}" for line in _evidence(content.trial)] + [f"# {note}" for note in content.notes]
    lines += [f"height = {contract.height}    # {content.why_size}", f"width = {contract.width}"]
    if contract.resize:
        lines += [f"resize = {contract.resize}                       # the shorter side, before the centre crop"]
    else:
        lines += [
            "# resize = …                     # the shorter side, before a centre crop; without it images are stretched"
        ]
    lines += [f"interpolation = {quoted(contract.interpolation)}"]
    lines += [f"color = {quoted(contract.color)}"] if contract.color != "RGB" else []
    lines += (
        [f"scale = {contract.scale:g}                        # the model does the rest"] if contract.scale == 1 else []
    )
    of = "of pixels as they are" if contract.scale == 1 else f"of pixels scaled to 0…1, in {contract.color} order"
    lines += [f"mean = {_numbers(contract.mean)}       # {of}", f"std = {_numbers(contract.std)}"]
    return "\n".join(lines) + "\n"


def _evidence(trial: Trial) -> list[str]:
    """Say what was tried and what came of it."""
    best, what = trial.best, "right answers" if trial.task == "classification" else f"right, {trial.task}"
    images = len(best.right)
    lines = [f"Tried with the float model on {images} of the evaluation images ({what}); evidence, not proof:"]
    several = len({one.source for one in trial.tried}) > 1
    for one in trial.tried[:SHOWN]:
        of = f" of {one.source}" if several else ""
        lines += [f"  {one.percent:5.1f} %  {one.name}, {_size(one.contract)}{of}"]
    lines += [f"  {trial.chance_percent:5.1f} %  whoever always answers the most frequent class"]
    if not trial.better_than_chance:
        return [*lines, *NOT_BETTER]
    return (
        lines
        if trial.clear
        else [
            *lines,
            f"Below is the usual one of those that are not surely apart, {best.name}: which was trained with?",
        ]
    )


NOT_BETTER = (
    "NONE IS BETTER THAN CHANCE. The labels, the order of the classes, the weights or the preprocessing are not those",
    "the model was trained with; what is written below is what is usual. Set this right before anything else.",
)


def _size(contract: Preprocessing) -> str:
    crop = f"of {contract.resize}" if contract.resize else "stretched"
    return f"{contract.height}×{contract.width} {crop}"


def _data(content: Content) -> str:
    lines = ["[data]                             # lists of file<TAB>label; image folders and .npz files work as well"]
    order = ("train", "calibration", "evaluation")
    return (
        "\n".join([*lines, *(f"{name} = {quoted(content.data[name])}" for name in order if name in content.data)])
        + "\n"
    )


def _value(value: object) -> str:
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{round(value, 4):g}" for value in values) + "]"


TAIL = """\
[budget]
accuracy_drop_pp = 1.0             # of the metric · 100, below the float model
confidence = 0.95                  # one-sided
# min_speedup = 2.0                # over eager float32 PyTorch

[targets.openvino]
# threads = 2                      # default: every CPU this process may use
[targets.onnxruntime]
"""
