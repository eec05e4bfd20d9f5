"""State dicts: read without running anything in them, and put into a model that they must fit."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from device.errors import InputError, first_line

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DataParallel put before every key."""
SHOWN = 5


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict, telling `.pt` from `.safetensors` by content.

    Only tensors are read: a file that holds anything else is refused with InputError, never unpickled.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(9)[8:] == b"{":
                return load_file(path)
            _refuse_torchscript(stream, path)
            stream.seek(0)  # and not the path: torch.load would go by its ending
            stored: object = torch.load(stream, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"the weights {path} do not exist; put the file there or change `weights` in the recipe"
        ) from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, so it was not opened: {first_line(error)} "
            "Save it again with torch.save(model.state_dict(), …) or as .safetensors"
        ) from error
    except (SafetensorError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OSError, LookupError) as error:
        raise InputError(
            f"{path} is not a readable state dict ({first_line(error)}); "
            "expected torch.save(model.state_dict(), …) or .safetensors"
        ) from error
    return _tensors(stored, path)


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`; raise InputError listing missing, unexpected and misshapen keys, or NaN weights."""
    own = model.state_dict()
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
    model.load_state_dict(state, strict=False)


def _refuse_torchscript(stream: BinaryIO, path: Path) -> None:
    """Keep torch.load from handing a TorchScript archive, which is code, to torch.jit.load."""
    if zipfile.is_zipfile(stream) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(stream).namelist()):
        raise InputError(f"{path} is a TorchScript program, not a state dict; save model.state_dict() instead")


def _tensors(stored: object, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what was stored: itself, or under a usual name; drop known prefixes."""
    for name in WRAPPERS:
        if isinstance(stored, dict) and isinstance(stored.get(name), dict):
            stored = stored[name]
    if not isinstance(stored, dict) or not stored or not all(_is_dense(t) for t in stored.values()):
        raise InputError(f"{path} holds a {type(stored).__name__}, expected a state dict of names and dense tensors")
    state = {str(key): tensor for key, tensor in stored.items()}
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
