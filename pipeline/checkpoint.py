"""State dicts: read without running anything in them, and put into a model that they must fit."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from device.errors import InputError, first_line
from pipeline import confined, unwrapped, zipped

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model", "net", "weights")
"""What a state dict is kept under; an averaged one goes before what it is the average of, as in evaluation."""
PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DataParallel put before every key."""
OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")
"""torchvision's DenseNet files have names with a dot, as norm.1, which its own code renames as well."""
SHOWN = 5
MEMORY, COPIES = 1 << 30, 4
"""Bytes that reading may take, and as many again as the file has, times this."""
SECONDS, SLOWEST = 30, 10_000_000
"""How long reading may take, and at how many bytes a second."""


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict, telling `.pt` from `.safetensors` by content.

    Only tensors are read: a file that holds anything else is refused with InputError, never unpickled. What is no
    `.safetensors` is read in a process of its own, with limits.
    """
    try:
        if not path.is_file() and path.exists():
            raise InputError(f"the weights {path} are no file; expected a state dict, as .pt or .safetensors")
        with path.open("rb") as stream:
            if stream.read(9)[8:] == b"{":
                return load_file(path)
            return _read_confined(stream, path)
    except FileNotFoundError:
        raise InputError(
            f"the weights {path} do not exist; put the file there or change `weights` in the recipe"
        ) from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_confined(stream: BinaryIO, path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    limits = confined.Limits(
        memory=MEMORY + COPIES * size, output=MEMORY + COPIES * size, seconds=SECONDS + size // SLOWEST
    )
    with confined.room() as folder:
        kept = folder / "tensors.safetensors"
        names = confined.run(lambda: _keep(_unpickled(stream, path), kept, path, limits), f"reading {path}", limits)
        found = load_file(kept)
        return {name: found[name] for name in names}


def _unpickled(stream: BinaryIO, path: Path) -> dict[str, Tensor]:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
    try:
        zipped.refuse(stream, path)
        stream.seek(0)  # and not the path: torch.load would go by its ending
        stored: object = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, so it was not opened: {first_line(error)} "
            "Save it again with torch.save(model.state_dict(), …) or as .safetensors"
        ) from error
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} wants far more memory than it has bytes; it is broken, or made to do harm") from error
    except Exception as error:  # a broken stream makes the unpickler raise anything
        raise _unreadable(path, error) from error
    return _tensors(stored, path)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a readable state dict ({type(error).__name__}: {first_line(error)}); "
        "expected torch.save(model.state_dict(), …) or .safetensors"
    )


def _keep(state: Mapping[str, Tensor], place: Path, path: Path, limits: confined.Limits) -> list[str]:
    """Write tensors for the parent; two that share their memory are written as two. Give the names in order."""
    whole = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if whole > limits.output:  # one number can be seen as any number of them
        raise InputError(f"{path} is {whole} bytes unpacked, far more than the file; it is made to do harm")
    seen: set[int] = set()
    own = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        plain = tensor.detach().contiguous()
        own[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    save_file(own, place)
    return list(own)


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`, what a training wrapped around it taken off.

    Raises InputError listing missing, unexpected and misshapen keys, or NaN weights.
    """
    own = model.state_dict()
    state = unwrapped.fitting(state, set(own))
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {list(state[key].shape)} where the model has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(faults.values()):
        told = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults.items() if keys)
        raise InputError(f"{path} is not a state dict of this model: {told}")
    broken = [key for key, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if broken:
        raise InputError(f"{path} has NaN or infinity in {_some(broken)}; the checkpoint is broken")
    weights = [t for t in state.values() if t.is_floating_point() and t.ndim > 1]
    if weights and not any(bool(t.any()) for t in weights):
        raise InputError(f"{path} has nothing but zeros in its weights; the checkpoint is broken, or was never trained")
    model.load_state_dict(state, strict=False)


def _tensors(stored: object, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what was stored: itself, or under a usual name; drop known prefixes."""
    for name in WRAPPERS:
        inner = stored.get(name) if isinstance(stored, dict) else None
        if isinstance(inner, dict) and isinstance(stored, dict) and (name not in AVERAGED or _all_dense(inner)):
            stored = _completed(inner, stored) if name in AVERAGED else inner
    if not isinstance(stored, dict) or not _all_dense(stored):
        raise InputError(f"{path} holds a {type(stored).__name__}, expected a state dict of names and dense tensors")
    state = {str(key): tensor for key, tensor in stored.items()}
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return {OLD_DENSENET.sub(r"\1\2.", key): tensor for key, tensor in state.items()}


def _completed(averaged: dict[object, object], stored: dict[object, object]) -> dict[object, object]:
    """Add what an average leaves out, such as batch norms' statistics, from the weights beside it."""
    others = (stored.get(name) for name in WRAPPERS if name not in AVERAGED)
    whole = next((one for one in others if isinstance(one, dict) and averaged.keys() < one.keys()), {})
    return {**whole, **averaged}


def _all_dense(stored: dict[object, object]) -> bool:
    return bool(stored) and all(_is_dense(value) for value in stored.values())


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_complex() or value.is_quantized)
    )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
