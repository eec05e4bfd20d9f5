"""What a checkpoint keeps beside its weights: which of the dictionaries in it is the state dict that is meant."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bitferry.device.errors import InputError

AVERAGED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "model_ema_state_dict", "ema_model",
    "ema_model_state_dict", "ema_params", "state_dict_swa", "averaged_model",
)  # fmt: skip
"""Names of averaged weights; they go before what they are the average of, as in evaluation."""
WRAPPERS = (
    *AVERAGED, "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params",
    "weights", "net_state_dict", "checkpoint", "ckpt",
)  # fmt: skip
"""What a state dict is kept under, the surer first."""
OTHERS = ("optim", "scheduler", "scaler", "sched", "amp", "rng", "loss_fn", "criterion", "loss", "history", "metrics")
"""How the names begin of what a training keeps besides its model."""
DEEPEST, SHOWN = 3, 8
Names = tuple[str, ...]


def state_dict(stored: object, what: str) -> tuple[dict[str, Tensor], str]:
    """Find the state dict in what was stored, and say where it was if there was a choice.

    Where several are there of which none is known by its name, all are given, each under its own name and a dot: the
    model says which fits. Raises InputError, with what is there, where there is none.
    """
    found = dict(_within(stored, ()))
    if not found:
        raise InputError(f"{what} holds {_described(stored)}, expected a state dict of names and dense tensors")
    if len(found) > 1:
        chosen = next((names for wrapper in WRAPPERS for names in found if names[-1:] == (wrapper,)), None)
        if chosen is None:
            return {".".join((*names, key)): t for names, one in found.items() for key, t in one.items()}, ""
    else:
        chosen = next(iter(found))
    state = found[chosen]
    if chosen and chosen[-1] in AVERAGED:
        state = _completed(state, [one for names, one in found.items() if names != chosen])
    beside = [".".join(names) for names in found if names != chosen]
    return state, f"took '{'.'.join(chosen)}', and not {', '.join(beside)}" if beside else ""


def _within(stored: object, names: Names) -> Iterator[tuple[Names, dict[str, Tensor]]]:
    """Give every dictionary of nothing but dense tensors, by the names that lead to it."""
    if not isinstance(stored, Mapping) or len(names) > DEEPEST:
        return
    if _all_dense(stored):
        yield names, {str(key): tensor for key, tensor in stored.items()}
        return
    inner = [(key, value) for key, value in stored.items() if isinstance(key, str) and isinstance(value, Mapping)]
    kept = [(key, value) for key, value in inner if not key.lower().startswith(OTHERS)]
    found = [one for key, value in kept for one in _within(value, (*names, key))]
    yield from found
    tensors = {key: value for key, value in stored.items() if isinstance(key, str) and _is_dense(value)}
    if not found and any("." in key or key in ("weight", "bias") for key in tensors):  # beside an epoch and the like
        yield names, tensors


def _completed(averaged: dict[str, Tensor], others: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Add what an average leaves out, such as batch norms' statistics, from the weights beside it."""
    whole = next((one for one in others if averaged.keys() < one.keys()), {})
    return {**whole, **averaged}


def _all_dense(stored: Mapping[object, object]) -> bool:
    return bool(stored) and all(isinstance(key, str) and _is_dense(value) for key, value in stored.items())


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_complex() or value.is_quantized)
    )


def _described(stored: object) -> str:
    """Describe what was stored, a dictionary by its keys, as `a dict (epoch: int, scores: list of 3)`."""
    if not isinstance(stored, Mapping):
        return f"a {_kind(stored)}"
    shown = [f"{key}: {_kind(value)}" for key, value in list(stored.items())[:SHOWN]]
    more = f" and {len(stored) - SHOWN} more" if len(stored) > SHOWN else ""
    return f"a {type(stored).__name__} ({', '.join(shown)}{more})" if stored else "an empty dict"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        form = "quantized " if value.is_quantized else "complex " if value.is_complex() else ""
        return f"{form}tensor {'×'.join(map(str, value.shape))}" if value.layout == torch.strided else "sparse tensor"
    return (
        f"{type(value).__name__} of {len(value)}" if isinstance(value, Mapping | list | tuple) else type(value).__name__
    )
