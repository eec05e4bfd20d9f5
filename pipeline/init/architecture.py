"""Which architecture of torchvision or timm a state dict belongs to, by its names and shapes; and how it is used."""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.pipeline import progress, unwrapped
from bitferry.pipeline.measure.metrics import Task

Shapes = Mapping[str, tuple[int, ...]]
EXTRA_SHARE, EXTRA = 1.5, 16
STRANGE_SHARE, STRANGE = 0.04, 6
"""How many more parameters than the checkpoint has, and of how many strange shapes, are built before an architecture
is given up: these shares of the checkpoint's tensors, and so many."""
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
PREFIX_TOKENS = (0, 1, 2, 5)
"""Embeddings of a vision transformer that are of no place in the image: class, distillation, registers."""
HEAD = re.compile(r"(fc|heads?(\.head)?|classifier(\.\d+|\.(low|high)_classifier)?)\.weight")
"""What torchvision calls the last layer, not the last in a .safetensors file, which is in alphabetical order."""
DETECTION = ("rpn.", "roi_heads.", "head.classification_head.", "detect")


@dataclass(frozen=True)
class Usual:
    """How a library says that its own weights of an architecture are used."""

    says: str
    size: int
    resize: int | None
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Guess:
    """An architecture that has exactly the checkpoint's names and shapes."""

    source: str
    classes: int
    options: dict[str, Any] = field(default_factory=dict)
    usual: Usual | None = None
    task: Task = "classification"


@dataclass(frozen=True)
class _Candidate:
    """An architecture that might be it: how it is built, and what it would be."""

    source: str
    classes: int
    build: Callable[..., nn.Module]
    options: dict[str, Any]
    task: Task = "classification"


class _AnotherModel(Exception):
    """A parameter was made that the checkpoint does not have."""


def guesses(state: Mapping[str, Tensor]) -> list[Guess]:
    """Name every architecture of torchvision, and of timm where it is installed, that has these names and shapes.

    An architecture is given up at the first parameter that is not of the checkpoint's. Raises InputError where
    none is left.
    """
    shapes = [_shapes(form) for form in unwrapped.forms(state)]
    candidates = [(candidate, form) for form in shapes for candidate in _candidates(form)]
    found = [
        Guess(one.source, one.classes, one.options, usual(one.source, one.options), one.task)
        for one, form in progress.track(candidates, "which model is it?", total=len(candidates))
        if _is(one, form)
    ]
    unique = list({(guess.source, repr(guess.options)): guess for guess in found}.values())
    if not unique:
        raise InputError(_unknown(shapes[0]))
    return unique


def _unknown(shapes: Shapes) -> str:
    timm = "" if find_spec("timm") else " (timm is not installed; with it, its models would be tried as well)"
    if any(name.startswith(DETECTION) for name in shapes):
        return (
            "the checkpoint is of a model that finds objects, with boxes; bitferry takes classifiers (one class or "
            "several) and segmentation models"
        )
    first = next((shape for shape in shapes.values() if len(shape) == 4), None)
    if first is not None and first[1] == 1:
        return (
            "the checkpoint's first convolution takes 1 channel, and bitferry gives every model 3; put it into a "
            "module that takes the first of them, and say so with --source module:mypackage.model:make"
        )
    return (
        f"the checkpoint has {len(shapes)} tensors, like no model of torchvision or timm{timm}; say what it is with "
        "--source, such as --source module:mypackage.model:make"
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in state.items() if not key.endswith("num_batches_tracked")}


def _candidates(shapes: Shapes) -> Iterator[_Candidate]:
    yield from _torchvision(shapes)
    if find_spec("timm"):
        yield from _timm(shapes)


def _torchvision(shapes: Shapes) -> Iterator[_Candidate]:
    from torchvision import models  # noqa: PLC0415 - a second to import

    weights = [name for name, shape in shapes.items() if len(shape) in (2, 4) and not name.startswith("aux")]
    if not weights:
        return
    heads = [name for name in weights if HEAD.fullmatch(name)] or weights
    classes = shapes[heads[-1]][0]
    aux = any(name.startswith(("aux", "AuxLogits")) for name in shapes)
    image = _image_size(shapes, "encoder.pos_embedding", "conv_proj.weight")
    for name in models.list_models(module=models):
        options: dict[str, Any] = {}
        if name.startswith(("googlenet", "inception")):
            options = {"init_weights": False} | ({} if aux else {"aux_logits": False})
        if name.startswith("vit") and image not in (None, _torchvision_size(name)):
            options = {"image_size": image}
        yield _Candidate(f"torchvision:{name}", classes, models.get_model, options)
    for name in models.list_models(module=models.segmentation):
        options = {"aux_loss": True} if aux else {}
        yield _Candidate(f"torchvision:{name}", classes, models.get_model, options, "segmentation")


def _torchvision_size(name: str) -> int:
    return 518 if name == "vit_h_14" else 224


def _timm(shapes: Shapes) -> Iterator[_Candidate]:
    """Give timm's models whose first convolution and classifier are named as some of these are."""
    import timm  # noqa: PLC0415 - an optional package
    from timm.models import get_pretrained_cfg  # noqa: PLC0415

    image = _image_size(shapes, "pos_embed", "patch_embed.proj.weight")
    for name in sorted(timm.list_models(), key=len):
        known = get_pretrained_cfg(name, allow_unregistered=True)
        if known is None:
            continue
        firsts, heads = _names(known.first_conv), _names(known.classifier)
        if firsts and heads and all(f"{one}.weight" in shapes for one in (*firsts, *heads)):
            given = {"img_size": image} if image and image != known.input_size[1] else {}
            yield _Candidate(f"timm:{name}", shapes[f"{heads[0]}.weight"][0], timm.create_model, given)


def _names(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, tuple | list) else ()


def _image_size(shapes: Shapes, positions: str, patches: str) -> int | None:
    """Give the side of the square image that so many position embeddings of such patches are for."""
    if positions not in shapes or patches not in shapes or len(shapes[positions]) != 3:
        return None
    count, patch = shapes[positions][1], shapes[patches][-1]
    sides = [math.isqrt(count - extra) for extra in PREFIX_TOKENS if math.isqrt(count - extra) ** 2 == count - extra]
    return sides[0] * patch if sides else None


def build(candidate: Guess | _Candidate) -> nn.Module:
    """Build the untrained model."""
    library, _, name = candidate.source.partition(":")
    options = {"num_classes": candidate.classes, **candidate.options}
    if library == "timm":
        import timm  # noqa: PLC0415 - an optional package

        made: nn.Module = timm.create_model(name, pretrained=False, **options)
        return made
    from torchvision import models  # noqa: PLC0415

    if candidate.task == "segmentation":
        options["weights_backbone"] = None  # its default would be downloaded
    made = models.get_model(name, weights=None, **options)
    return made  # noqa: RET504 - torchvision has no types


def _is(candidate: _Candidate, wanted: Shapes) -> bool:
    for device in ("meta", "cpu"):  # a few compute with tensors while they are built, which meta cannot
        try:
            with _only(wanted, candidate.task), torch.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _shapes(build(candidate).state_dict()) == wanted
        except _AnotherModel:
            return False
        except Exception:  # noqa: BLE001, S112 - an architecture that cannot be built so is not it
            continue
    return False


@contextmanager
def _only(wanted: Shapes, task: str) -> Iterator[None]:
    """Raise _AnotherModel when too many parameters are registered, or of shapes that are not wanted.

    A few are made and replaced at once in some models. Segmentation models' backbones are classifiers first.
    """
    shapes, made, strange = set(wanted.values()), 0, 0
    if task == "segmentation":
        yield
        return

    def look(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made, strange
        if parameter is not None:
            made += 1
            strange += tuple(parameter.shape) not in shapes
        if strange > STRANGE_SHARE * len(wanted) + STRANGE or made > EXTRA_SHARE * len(wanted) + EXTRA:
            raise _AnotherModel

    handle = register_module_parameter_registration_hook(look)
    try:
        yield
    finally:
        handle.remove()


def usual(source: str, options: Mapping[str, Any]) -> Usual | None:
    """Give how the library uses its own weights of an architecture; None where it does not say."""
    library, _, name = source.partition(":")
    size = options.get("image_size") or options.get("img_size")
    if library not in ("torchvision", "timm"):
        return None
    if library == "timm":
        if not find_spec("timm"):
            raise TargetUnavailable("model source 'timm' needs the package timm: pip install 'bitferry[timm]'")
        from timm.models import get_pretrained_cfg  # noqa: PLC0415 - an optional package

        known = get_pretrained_cfg(name, allow_unregistered=True)
        return _from_timm(known, size) if known else None
    from torchvision import models  # noqa: PLC0415

    try:
        weights = next(iter(models.get_model_weights(name)), None)
    except ValueError:  # no such model, which is told when it is built
        return None
    return None if weights is None else _from_torchvision(weights.transforms(), str(weights), size)


def _from_timm(known: Any, size: int | None) -> Usual:
    side = size or known.input_size[1]
    resize = max(side, math.floor(side / known.crop_pct)) if known.crop_mode != "squash" else None
    return Usual("timm's default_cfg", side, resize, _known_way(known.interpolation), known.mean, known.std)


def _from_torchvision(transforms: Any, name: str, size: int | None) -> Usual:
    crop, resize = getattr(transforms, "crop_size", None), transforms.resize_size[0]
    side = size or (crop[0] if crop else resize)
    if size and crop:
        resize = round(size * resize / crop[0])
    way = _known_way(str(transforms.interpolation.value))
    return Usual(name, side, resize if crop else None, way, tuple(transforms.mean), tuple(transforms.std))


def _known_way(interpolation: str) -> Interpolation:
    return cast("Interpolation", interpolation) if interpolation in get_args(Interpolation) else "bicubic"


def named(sources: Sequence[Guess]) -> str:
    """Name some architectures in a sentence."""
    names = [re.sub(r"\s+", " ", guess.source) for guess in sources]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
