"""A recipe's model source and weights → the float model, with the contract's arithmetic inside."""

import importlib
import logging
import sys
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitferry.device.errors import BitferryError, InputError, TargetUnavailable, first_line
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache, checkpoint, imports, progress, stored, unwrapped
from bitferry.pipeline.artifacts import FloatModel
from bitferry.pipeline.measure.metrics import Task
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.scores import check_scores
from bitferry.pipeline.training import record

PACKAGES = {
    "torchvision": ("torch", "torchvision"),
    "timm": ("torch", "timm"),
    "module": ("torch", "torchvision"),
    "pt2": ("torch",),
    "onnx": ("onnx", "onnxruntime"),
}
"""Whose versions decide what a source gives."""
READERS = [Path(str(module.__file__)) for module in (checkpoint, stored, unwrapped)]
"""Whose code decides which tensors of a file are the weights."""
OURS = ("bitferry", "__main__")


class Deployable(nn.Module):
    """The graph that is shipped: uint8 N×H×W×3 in, (pixel · scale − mean) / std as N×3×H×W into the model.

    Of several views, N×V×H×W×3, the model gets each as an argument of its own.
    """

    multiplier: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module, contract: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.views = contract.views
        self.one_by_one = False
        """Whether the model takes one image at a time."""
        mean, std = torch.tensor(contract.mean), torch.tensor(contract.std)
        self.register_buffer("multiplier", (contract.scale / std).view(1, 3, 1, 1))
        self.register_buffer("offset", (-mean / std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.one_by_one and len(images) > 1:
            return torch.cat([self(image) for image in torch.split(images, 1)])
        if self.views == 1:
            views = [images.permute(0, 3, 1, 2).to(torch.float32)]
        else:  # a cast first: TensorRT does nothing else with uint8
            pixels = images.to(torch.float32)
            views = [pixels[:, view].permute(0, 3, 1, 2) for view in range(self.views)]
        scores = self.model(*(view * self.multiplier + self.offset for view in views))
        if isinstance(scores, dict):  # torchvision's segmentation
            scores = scores.get("out", scores)
        found: Tensor = getattr(scores, "logits", scores)  # what its Inceptions give while they learn
        return found


def load(recipe: Recipe, weights: Path | None, *, folder: Path = Path(), trust: bool = False) -> FloatModel:
    """Build the recipe's architecture and put `weights` in; `folder` is where a `module:` source is looked for.

    Raises InputError when the source is unknown, the weights do not fit it, or it does not give one score per class.
    """
    kind, _, name = recipe.model.source.partition(":")
    if kind == "pt2":
        model = _exported(folder / name, trust, recipe)
        digest = cache.file_hash(folder / name)
    else:
        model = architecture(recipe, folder)
        if weights is not None:
            checkpoint.fill(model, checkpoint.read(weights), weights)
        digest = cache.file_hash(weights) if weights is not None else ""
    deployable = Deployable(model, recipe.preprocessing)
    if kind != "pt2":  # an exported program refuses: it stays what it was exported as
        deployable.eval()
    deployable.one_by_one = check_scores(deployable, recipe) == 1
    given = recipe.model.weights
    return FloatModel(
        eager=deployable,
        preprocessing=recipe.preprocessing,
        classes=recipe.classes,
        record=record.check(given, recipe) if given else None,
        key=cache.key(
            "load",
            code=__file__,
            readers={path.name: cache.file_hash(path) for path in READERS},
            packages=PACKAGES[kind],
            model=recipe.model.model_dump(mode="json", exclude={"weights"}),
            classes=recipe.classes,
            contract=recipe.preprocessing,
            weights=digest,
            own_code=own_code(recipe, folder),
            own_imports=own_imports(recipe, folder),
        ),
    )


def architecture(recipe: Recipe, folder: Path = Path()) -> nn.Module:
    """Build the recipe's untrained architecture; nothing is downloaded."""
    kind, _, name = recipe.model.source.partition(":")
    options = dict(recipe.model.options)
    try:
        if kind == "torchvision":
            return _torchvision(name, {"num_classes": len(recipe.classes)} | options, recipe.task)
        if kind == "timm":
            return _timm(name, {"num_classes": len(recipe.classes)} | options)
        return _float32(_factory(name, options, folder), recipe.model.source)
    except BitferryError:
        raise
    except (Exception, SystemExit) as error:  # the constructor is somebody else's code and may raise anything
        raise InputError(f"the model '{recipe.model.source}' cannot be built with {options}: {_told(error)}") from error


def _torchvision(name: str, options: dict[str, Any], task: Task) -> nn.Module:
    from torchvision import models  # noqa: PLC0415 - a second to import, for this source only

    if task == "segmentation":
        _check_known("torchvision", name, models.list_models(module=models.segmentation), "segmentation model")
        options = {"weights_backbone": None} | options  # its default would be downloaded
    else:
        _check_known("torchvision", name, models.list_models(module=models))
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm  # noqa: PLC0415 - an optional package
    except ModuleNotFoundError as error:
        raise TargetUnavailable("model source 'timm' needs the package timm: pip install 'bitferry[timm]'") from error
    _check_known("timm", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _check_known(library: str, name: str, known: list[str], kind: str = "image classifier") -> None:
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f", did you mean '{library}:{close[0]}'?" if close else ""
        raise InputError(f"{library} has no {kind} called '{name}'{hint}")


def _factory(name: str, options: dict[str, Any], folder: Path) -> nn.Module:
    """Call the user's own `package.file:function`; this runs their code because the recipe names it."""
    module_name, _, function = name.partition(":")
    if not function:
        raise InputError(f"model source 'module:{name}' names no function; expected module:package.file:function")
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module(module_name)
        factory = getattr(module, function)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise InputError(
            f"model source 'module:{name}' cannot be imported (looked in {folder} first): {_told(error)}"
        ) from error
    _refuse_namesake(module_name, Path(module.__file__ or ""), folder)
    model = factory(**options)
    if not isinstance(model, nn.Module):
        raise InputError(f"module:{name} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _float32(model: nn.Module, source: str) -> nn.Module:
    """Give a model with all its floats 32 bits wide, and say so where they were not: it is the baseline then."""
    floats = {tensor.dtype for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()}
    others = sorted(str(dtype).removeprefix("torch.") for dtype in floats - {torch.float32})
    if not others:
        return model
    progress.stage("load", f"'{source}' has weights in {', '.join(others)}; made float32, it is the float model")
    return model.float()


def _refuse_namesake(name: str, loaded: Path, folder: Path) -> None:
    """Raise InputError where the recipe's folder has such a module, and another was imported under its name before."""
    place = folder.joinpath(*name.split("."))
    own = next((path for path in (place / "__init__.py", Path(f"{place}.py")) if path.is_file()), None)
    if own and loaded.is_file() and cache.file_hash(own) != cache.file_hash(loaded):
        raise InputError(
            f"the module '{name}' was imported from {loaded}, so {own} is not what would run; give it a name of its "
            "own, or open this recipe in another process"
        )


def own_code(recipe: Recipe, folder: Path = Path()) -> dict[str, str]:
    """Hash each file that a `module:` source has loaded from beside itself, so that an edit makes a new model."""
    return {name: cache.file_hash(file) for name, file in _own_files(recipe, folder).items()}


def own_imports(recipe: Recipe, folder: Path = Path()) -> dict[str, str]:
    """Give the installed packages that those files import from, with their versions: another one, another model."""
    return imports.versions(_own_files(recipe, folder).values())


def _own_files(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Find those files, each by its path from where the source is looked for."""
    kind, _, name = recipe.model.source.partition(":")
    if kind != "module":
        return {}
    top = name.partition(":")[0].partition(".")[0]
    if top not in sys.modules:
        architecture(recipe, folder)
    others = {name: m for name, m in list(sys.modules.items()) if name.partition(".")[0] not in OURS}
    files = {Path(file) for m in others.values() if (file := getattr(m, "__file__", None))}
    home = Path(sys.modules[top].__file__ or folder).resolve().parent
    home = home.parent if hasattr(sys.modules[top], "__path__") else home
    beside = {f for f in files if f.resolve().is_relative_to(home) and "site-packages" not in f.parts}
    # torch.classes names a file "_classes.py" that does not exist
    return {str(f.resolve().relative_to(home)): f for f in sorted(beside) if f.is_file()}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _exported(path: Path, trust: bool, recipe: Recipe) -> nn.Module:
    if recipe.model.weights or recipe.model.options:
        raise InputError(f"the exported program {path} is whole; take `weights` and `options` out of the recipe")
    if not trust:
        raise InputError(f"{path}: an exported program can run code when it is loaded; pass --trust if you trust it")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it logs the traceback of an error that it raises as well
    try:
        module: nn.Module = torch.export.load(path).module()
    except FileNotFoundError:
        raise InputError(f"the model {path} does not exist") from None
    except Exception as error:  # torch raises a dozen kinds on a file that is no .pt2
        raise InputError(f"{path} is not an exported program (.pt2): {first_line(error)}") from error
    finally:
        logging.disable(before)
    return module
