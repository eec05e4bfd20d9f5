"""State dicts: read without running anything in them, and put into a model that they must fit."""

import contextlib
import pickle
import pickletools
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitferry.device import mistaken
from bitferry.device.errors import COLOURS, InputError, first_line
from bitferry.pipeline import confined, progress, stored, unwrapped, zipped

PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DataParallel put before every key."""
OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")
"""torchvision's DenseNet files have names with a dot, as norm.1, which its own code renames as well."""
IN_THE_WAY = re.compile(r"(?:GLOBAL|Unsupported class|got) ([\w]+\.[\w.]*\w)")
PLAIN = ("collections.OrderedDict", "torch._utils.")
"""What a pickle of tensors may import."""
SAFE_HEAD = 16
SHOWN = 5
MEMORY, COPIES = 1 << 30, 4
"""Bytes that reading may take, and as many again as the file has, times this."""
SECONDS, SLOWEST = 30, 10_000_000
"""How long reading may take, and at how many bytes a second."""


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict, telling `.pt` from `.safetensors` by content; say which was taken of several.

    Only tensors are read: a file that holds anything else is refused with InputError, never unpickled. What is no
    `.safetensors` is read in a process of its own, with limits.
    """
    try:
        if not path.is_file() and path.exists():
            raise InputError(f"the weights {path} are no file; expected a state dict, as .pt or .safetensors")
        with path.open("rb") as stream:
            start = stream.read(SAFE_HEAD)
            if start[8:9] == b"{":
                _refuse_cut(start, path)
                return load_file(path)
            return _read_confined(stream, path)
    except FileNotFoundError:
        why = mistaken.missing(path) or "put the file there or change `weights` in the recipe"
        raise InputError(f"the weights {path} do not exist; {why}") from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _refuse_cut(start: bytes, path: Path) -> None:
    """Raise InputError where a .safetensors file is shorter than its header alone."""
    size, header = path.stat().st_size, int.from_bytes(start[:8], "little")
    if size < 8 + header:
        told = f"cut off: {size} bytes, and its header alone has {header}"
        raise InputError(f"{path} is not a readable state dict ({told}); get the file again from where it was made")


def _read_confined(stream: BinaryIO, path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    limits = confined.Limits(
        memory=MEMORY + COPIES * size, output=MEMORY + COPIES * size, seconds=SECONDS + size // SLOWEST
    )
    with confined.room() as folder:
        kept = folder / "tensors.safetensors"
        told, *names = confined.run(lambda: _keep(stream, kept, path, limits), f"reading {path}", limits)
        if told:
            progress.stage("load", f"{path}: {told}")
        found = load_file(kept)
        return {name: found[name] for name in names}


def _unpickled(stream: BinaryIO, path: Path) -> object:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
    if what := mistaken.of(path):
        raise InputError(f"{path} is no checkpoint, but {what}")
    try:
        zipped.refuse(stream, path)
        stream.seek(0)  # and not the path: torch.load would go by its ending
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, and of a pickle that is none
            found: object = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unpickling(stream, path, error) from error
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} wants far more memory than it has bytes; it is broken, or made to do harm") from error
    except Exception as error:  # a broken stream makes the unpickler raise anything
        raise _unreadable(path, error) from error
    return found


def _unpickling(stream: BinaryIO, path: Path, error: Exception) -> InputError:
    """Say which types stand in the way of reading a pickle; torch's own text says how to run what is in it."""
    kinds: list[str] = []
    with contextlib.suppress(Exception):  # of an older format, or broken
        stream.seek(0)
        kinds = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(stream))
    kinds = kinds or IN_THE_WAY.findall(COLOURS.sub("", str(error))) or _globals(stream)
    if not kinds:
        return InputError(
            f"{path} is not a readable state dict: its pickle is broken or of another program; "
            "expected torch.save(model.state_dict(), …) or .safetensors"
        )
    whole = " (the whole model was saved, which is code)" if any(one.startswith("torch.nn.") for one in kinds) else ""
    return InputError(
        f"{path} holds more than tensors, so it was not opened: {_some(kinds)} {'are' if len(kinds) > 1 else 'is'} in "
        f"it{whole}. Save it again with torch.save(model.state_dict(), …) or as .safetensors, where it was made"
    )


def _globals(stream: BinaryIO) -> list[str]:
    """List what a plain pickle would import, running nothing."""
    found: list[str] = []
    texts: list[str] = []
    stream.seek(0)
    with contextlib.suppress(Exception):  # to where it breaks
        for operation, value, _ in pickletools.genops(stream):
            texts += [value] if isinstance(value, str) else []
            if operation.name in ("GLOBAL", "STACK_GLOBAL"):
                found.append(".".join(texts[-2:] if operation.name == "STACK_GLOBAL" else str(value).split()))
    return list(dict.fromkeys(one for one in found if not one.startswith(PLAIN)))


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a readable state dict ({type(error).__name__}: {first_line(error)}): broken or cut off; "
        "expected torch.save(model.state_dict(), …) or .safetensors"
    )


def _keep(stream: BinaryIO, place: Path, path: Path, limits: confined.Limits) -> list[str]:
    """Write tensors for the parent; two that share their memory are written as two.

    Give what is to be said, or nothing, and the names in order.
    """
    found, told = stored.state_dict(_unpickled(stream, path), str(path))
    state = _plain(found)
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
    return [told, *own]


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`, what a training wrapped around it taken off.

    Raises InputError listing missing, unexpected and misshapen keys, or NaN weights.
    """
    own = model.state_dict()
    whole, state = state, _chosen(state, own, path)
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
        raise InputError(f"{path} is not a state dict of this model: {told}{_groups(whole)}")
    broken = [key for key, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if broken:
        raise InputError(f"{path} has NaN or infinity in {_some(broken)}; the checkpoint is broken")
    weights = [t for t in state.values() if t.is_floating_point() and t.ndim > 1]
    if weights and not any(bool(t.any()) for t in weights):
        raise InputError(f"{path} has nothing but zeros in its weights; the checkpoint is broken, or was never trained")
    model.load_state_dict(state, strict=False)


def _chosen(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """Take off what a training wrapped around the weights; raise InputError where two copies fit alike."""
    copies = unwrapped.copies(state, own)
    if len(copies) > 1 and not any(f"{name}." in unwrapped.AVERAGED for name in copies):
        first = next(iter(copies))
        raise InputError(
            f"{path} holds {len(copies)} copies of this model, under {_some(list(copies))}; keep one: "
            f"{{key.removeprefix('{first}.'): value for key, value in state.items() if key.startswith('{first}.')}}"
        )
    found = unwrapped.fitting(state, set(own))
    if found is state and len(copies) == 1:
        found = next(iter(copies.values()))
    if len(found) < len(state):
        under = f"what is under '{next(iter(copies))}.', " if len(copies) == 1 else ""
        progress.stage("load", f"{path}: took {under}{len(found)} of {len(state)} tensors")
    return found


def _groups(state: Mapping[str, Tensor]) -> str:
    """Say how the names begin where that tells several models in one file."""
    counts = Counter(name.partition(".")[0] for name in state)
    if not 1 < len(counts) <= SHOWN:
        return ""
    return f"; its names begin with {', '.join(f'{name}. ({count})' for name, count in counts.items())}"


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take known prefixes off every name, and torchvision's old dots."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return {OLD_DENSENET.sub(r"\1\2.", key): tensor for key, tensor in state.items()}


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
