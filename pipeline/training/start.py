"""The weights that a training starts from: found or, where that is allowed, fetched, and put into the new model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitferry.device.errors import InputError, StageFailed, TargetUnavailable, first_line
from bitferry.pipeline import checkpoint, progress, unwrapped
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.training.settings import LIBRARY

ALLOW = "pass --download for it to be fetched"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
FAR = 0.02
"""How far a mean or std of the preprocessing may be from what a library's weights were trained with."""


def find(recipe: Recipe, *, download: bool) -> Path | None:
    """Give the file that `training.start` names, None for none; fetch a library's weights only if allowed to.

    Raises InputError where there is no such file or weights, and says how to get them.
    """
    start = recipe.training.start
    if start is None:
        return None
    if not LIBRARY.fullmatch(start):
        path = Path(start)
        if not path.exists():
            raise InputError(f"training.start: the file {path} does not exist; put it there, or name another")
        return path
    library, _, name = start.partition(":")
    source, _, model = recipe.model.source.partition(":")
    if source != library:
        raise InputError(
            f"training.start = '{start}' is for a model of {library}, and model.source is '{recipe.model.source}'; "
            "name a file of weights, or a model of that library"
        )
    found = _torchvision if library == "torchvision" else _timm
    return found(recipe, model, name, download)


def _torchvision(recipe: Recipe, model: str, name: str, download: bool) -> Path:
    from torchvision import models  # noqa: PLC0415 - a second to import, for these weights only

    try:
        known = models.get_model_weights(model)
    except ValueError:
        raise InputError(f"torchvision has no model called '{model}'") from None
    names = [one.name for one in known]
    if name != "DEFAULT" and name not in names:
        have = f"it has {', '.join(names)}, and DEFAULT" if names else "it has none"
        raise InputError(f"training.start: torchvision has no weights '{name}' of {model}; {have}")
    if not names:
        raise InputError(f"training.start: torchvision has no weights of {model}; name a file")
    weights = known[name]
    made = weights.transforms()
    _doubt(recipe, weights.name, tuple(getattr(made, "mean", ())), tuple(getattr(made, "std", ())))
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if not path.exists():
        if not download:
            raise InputError(
                f"the weights torchvision:{weights.name} of {model} are not at {path}; {ALLOW}, or put it there"
            )
        _fetch(weights.url, path)
    return path


def _fetch(url: str, path: Path) -> None:
    progress.stage("download", url)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = path.stem.rpartition("-")[2]
    quiet = progress.console.quiet or not progress.console.is_terminal
    try:
        torch.hub.download_url_to_file(url, str(path), digest, progress=not quiet)
    except Exception as error:  # of the network, of the disk, or another content than its name says
        raise StageFailed(
            f"{url} could not be fetched ({first_line(error)}); put the file at {path} yourself"
        ) from error


def _timm(recipe: Recipe, model: str, tag: str, download: bool) -> Path:
    try:
        import huggingface_hub as hub  # noqa: PLC0415 - an optional package
        import timm  # noqa: PLC0415 - an optional package
    except ModuleNotFoundError as error:
        raise TargetUnavailable("weights of timm need the package timm: pip install 'bitferry[timm]'") from error
    full = model if tag in ("pretrained", "DEFAULT") else f"{model.partition('.')[0]}.{tag}"
    known = timm.list_pretrained(f"{model.partition('.')[0]}*")
    config: Any = timm.models.get_pretrained_cfg(full) if full in known or "." not in full else None
    if config is None or not config.hf_hub_id:
        near = [one for one in known if one.partition(".")[0] == model.partition(".")[0]]
        have = f"it has {', '.join(one.partition('.')[2] for one in near)}" if near else "it has none"
        raise InputError(f"training.start: timm has no weights '{tag}' of {model}; {have}")
    _doubt(recipe, f"timm:{tag}", tuple(config.mean), tuple(config.std))
    for file in HUB_FILES:
        path = hub.try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(path, str):
            return Path(path)
    if not download:
        raise InputError(f"the weights timm:{tag} of {model} are not in {hub.constants.HF_HUB_CACHE}; {ALLOW}")
    progress.stage("download", config.hf_hub_id)
    try:
        return Path(hub.hf_hub_download(config.hf_hub_id, HUB_FILES[0]))
    except Exception as error:  # of the network, the disk or the hub
        raise StageFailed(f"{config.hf_hub_id} could not be fetched: {first_line(error)}") from error


def _doubt(recipe: Recipe, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Say so where the preprocessing is not that which a library's weights were trained with."""
    contract = recipe.preprocessing
    given = [value / (255 * contract.scale) for value in (*contract.mean, *contract.std)]
    if mean and any(abs(one - other) > FAR for one, other in zip(given, (*mean, *std), strict=True)):
        told = f"mean = {[round(v, 3) for v in mean]} and std = {[round(v, 3) for v in std]}"
        progress.stage("train", f"{name} was trained with {told} and scale = 1/255, and the recipe has others")


def fit(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """Load weights, but for tensors of another shape, which are left as they are; give those tensors' names.

    Those must be the model's last ones: its new head. Raises InputError where anything else does not match.
    """
    own = model.state_dict()
    state = unwrapped.fitting(state, set(own))
    new = tuple(name for name in own if name in state and state[name].shape != own[name].shape)
    checkpoint.fill(model, {name: own[name] if name in new else tensor for name, tensor in state.items()}, path)
    if new and len(new) > len(own) // 2:
        raise InputError(f"{path} fits in {len(own) - len(new)} of {len(own)} tensors only; it is of another model")
    for name in new:
        told = f"{list(state[name].shape)} in the file, {list(own[name].shape)} here"
        progress.stage("train", f"{name} starts anew ({told})")
    return new


def head(model: nn.Module, new: tuple[str, ...]) -> tuple[str, ...]:
    """Name what makes up the head: the modules of the tensors that start anew, else the last one with parameters.

    Of a module that holds others, as an encoder its position embedding, it is the tensor alone.
    """
    if new:
        return tuple(dict.fromkeys(_smallest(model, name) for name in new))
    return tuple(_with_parameters(model))[-1:]


def _smallest(model: nn.Module, name: str) -> str:
    module = name.rpartition(".")[0]
    return name if any(model.get_submodule(module).children()) else module


def _with_parameters(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))
