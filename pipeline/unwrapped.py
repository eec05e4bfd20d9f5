"""A state dict as training scripts wrap it: prefixes before every name, averaged copies, losses beside the model."""

from collections.abc import Iterator, Mapping

from torch import Tensor

AVERAGED = ("ema.", "model_ema.", "ema_model.", "averaged_model.")
"""What exponential moving averages are kept under; they are what such a training evaluates."""
PREFIXES = (*AVERAGED, "_orig_mod.", "module.", "model.", "net.", "network.", "backbone.")
COUNTERS = ("n_averaged", "num_updates", "decay")
"""What torch's AveragedModel and its like keep beside the weights."""
MOST = 32


def forms(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the state dict as it is, then without each wrapper around it, averaged copies before others."""
    waiting, seen = [dict(state)], set[frozenset[str]]()
    while waiting and len(seen) < MOST:
        form = waiting.pop(0)
        names = frozenset(form)
        if names in seen:
            continue
        seen.add(names)
        yield form
        if any(name in form for name in COUNTERS):
            waiting.insert(0, {name: tensor for name, tensor in form.items() if name not in COUNTERS})
        parts = [_under(form, prefix) for prefix in PREFIXES]
        waiting = [part for part in parts if part] + waiting


def fitting(state: Mapping[str, Tensor], names: set[str]) -> Mapping[str, Tensor]:
    """Give the form whose names are these, counters of batches aside; the state dict itself where none is."""
    wanted = _counted(names)
    return next((form for form in forms(state) if _counted(set(form)) == wanted), state)


def copies(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Give what fits a model, in names and shapes, of each group of names, as those under `student.` and `teacher.`."""
    found = {}
    for first in dict.fromkeys(name.partition(".")[0] for name in state):
        form = fitting(_under(state, f"{first}."), set(own))
        if _counted(set(form)) == _counted(set(own)) and all(form[n].shape == own[n].shape for n in form if n in own):
            found[first] = dict(form)
    return found


def _under(form: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in form.items() if name.startswith(prefix)}


def _counted(names: set[str]) -> set[str]:
    return {name for name in names if not name.endswith("num_batches_tracked")}
