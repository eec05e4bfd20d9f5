"""A checkpoint and an image folder → a commented recipe with two disjoint image lists."""

import random
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from device.errors import InputError
from pipeline import cache, checkpoint, progress
from pipeline.data.formats.folder import image_files

CALIBRATION_SHARE = 0.25
MOST_CALIBRATION = 512
UNGUESSED = ("googlenet", "inception", "regnet")
"""Training heads make the first two's state dict depend on options; regnet cannot be built without its numbers."""


def init(checkpoint_path: Path, images: Path, output: Path, *, source: str | None, size: int) -> list[Path]:
    """Write the recipe, and beside it `calibration.tsv` and `evaluation.tsv`; return what was written.

    Raises InputError rather than overwrite a file, and when the model cannot be told from the checkpoint.
    """
    folder = output.parent
    lists = {name: folder / f"{output.stem}-{name}.tsv" for name in ("calibration", "evaluation")}
    for path in (output, *lists.values()):
        if path.exists():
            raise InputError(f"{path} exists; move it away or name another with --output")
    classes = _classes(images)
    if source and source.startswith(("pt2:", "onnx:")):
        kind = source.partition(":")[0]
        raise InputError(f'that file holds its weights; write `source = "{kind}:FILE"` into a recipe by hand')
    state = checkpoint.read(checkpoint_path)
    guessed = source or guess(state, len(classes))
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in _split(images, classes).items():
        lists[name].write_text("file\tlabel\n" + "".join(f"{path.resolve()}\t{label}\n" for path, label in lines))
    output.write_text(
        TEMPLATE.format(
            name=_named(output.stem),
            classes=", ".join(_quoted(name) for name in classes),
            source=_quoted(guessed),
            told="as told" if source else "its names and shapes are those of the checkpoint",
            weights=_quoted(str(checkpoint_path.resolve())),
            size=size,
            calibration=_quoted(lists["calibration"].name),
            evaluation=_quoted(lists["evaluation"].name),
        )
    )
    return [output, *lists.values()]


def guess(state: Mapping[str, Tensor], classes: int) -> str:
    """Name the torchvision classifier whose state dict has exactly these names and shapes."""
    from torchvision import models  # noqa: PLC0415 - a second to import, only when nothing was told

    wanted = {key: tuple(t.shape) for key, t in state.items() if not key.endswith("num_batches_tracked")}
    known = models.list_models(module=models)
    for name in progress.track(known, "which model is it?", total=len(known)):
        if name.startswith(UNGUESSED):
            continue
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = models.get_model(name, weights=None, num_classes=classes).state_dict()
        if {k: tuple(t.shape) for k, t in own.items() if not k.endswith("num_batches_tracked")} == wanted:
            return f"torchvision:{name}"
    raise InputError(
        f"the checkpoint has {len(wanted)} tensors, like no torchvision classifier of {classes} classes (one for each "
        "folder of images); say what it is with --source, such as --source module:mypackage.model:make"
    )


def _classes(images: Path) -> list[str]:
    if not images.is_dir():
        raise InputError(f"the image folder {images} does not exist")
    classes = sorted(path.name for path in images.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(classes) < 2:
        raise InputError(f"{images} has {len(classes)} class folders; expected at least two, each with images")
    return classes


def _split(images: Path, classes: list[str]) -> dict[str, list[tuple[Path, int]]]:
    """Take a quarter of each class, seeded, for calibration and the rest for evaluation."""
    parts: dict[str, list[tuple[Path, int]]] = {"calibration": [], "evaluation": []}
    for label, name in enumerate(classes):
        by_content = {cache.file_hash(path): path for path in reversed(image_files(images / name))}
        files = sorted(by_content.values())  # a copy in the other list would be a leak
        if len(files) < 2:
            raise InputError(f"{images / name} has {len(files)} images; expected two or more, for two lists")
        random.Random(label).shuffle(files)  # noqa: S311 - a split, not a secret
        count = max(1, min(int(len(files) * CALIBRATION_SHARE), -(-MOST_CALIBRATION // len(classes))))
        parts["calibration"] += [(path, label) for path in files[:count]]
        parts["evaluation"] += [(path, label) for path in files[count:]]
    return parts


def _named(stem: str) -> str:
    """Make a recipe name of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"


def _quoted(text: str) -> str:
    """Write a TOML basic string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


TEMPLATE = """\
# A recipe for bitferry: what is built, and how it is judged. Build it with
#
#     bitferry deploy {name}.toml --target openvino

name = "{name}"
version = "0.1.0"
precision = "auto"                 # the fastest inside the budget; or int8, float32, bfloat16
classes = [{classes}]

[model]
source = {source}    # {told}
weights = {weights}

[preprocessing]                    # A GUESS: must be what the model was trained with, or accuracy is lost
height = {size}
width = {size}
resize = {size}                       # the shorter side, before the centre crop; leave out to stretch
mean = [0.485, 0.456, 0.406]       # of pixels scaled to 0…1, in RGB order
std = [0.229, 0.224, 0.225]

[data]                             # lists of file<TAB>label; image folders and .npz files work as well
calibration = {calibration}
evaluation = {evaluation}

[budget]
accuracy_drop_pp = 1.0             # top-1, percentage points below the float model
confidence = 0.95                  # one-sided
# min_speedup = 2.0                # over eager float32 PyTorch

[targets.openvino]
# threads = 2                      # default: every CPU this process may use
[targets.onnxruntime]
"""
