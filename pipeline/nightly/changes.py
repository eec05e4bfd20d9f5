"""What differs between what two results were made from, in words, the most likely cause first."""

from collections.abc import Callable, Iterator, Mapping

from bitferry.pipeline.nightly.night import Inputs

STACK = (
    "torch", "torchvision", "torchao", "onnx", "onnxscript", "onnxsim", "onnxruntime", "openvino", "executorch",
    "coremltools", "tensorrt-rtx", "numpy", "pillow", "timm",
)  # fmt: skip
"""The packages that a deployment goes through, in its order: they are told first."""
MOST_PACKAGES = 8
"""Of those that differ, how many are named."""
MOST_VALUE = 40
"""Characters of a setting's value."""


def changed(before: Inputs, after: Inputs) -> tuple[str, ...]:
    """Name what differs, each as in `package pillow 12.0.0 → 12.1.0`; empty where nothing that is recorded does."""
    return (
        *_told("recipe", before.recipe, after.recipe, short=_value),
        *_weights(before.weights, after.weights),
        *_told("data", before.data, after.data, short=_hash),
        *_code(before, after),
        *_packages(before.packages, after.packages),
        *_told("machine", before.machine, after.machine, short=str),
    )


def _told(what: str, before: Mapping[str, str], after: Mapping[str, str], short: Callable[[str], str]) -> Iterator[str]:
    for name in _differing(before, after):
        old, new = (short(one[name]) if name in one else None for one in (before, after))
        yield f"{what} {_moved(name, old, new)}"


def _differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def _moved(name: str, old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return f"{name} {old} gone" if new is None else f"{name} {new} new"
    return f"{name} {old} → {new}"


def _value(text: str) -> str:
    return text if len(text) <= MOST_VALUE else f"{text[: MOST_VALUE - 1]}…"


def _hash(text: str) -> str:
    return text[:8]


def _weights(before: str | None, after: str | None) -> Iterator[str]:
    if before != after:
        old, new = (_hash(one) if one else "trained here" for one in (before, after))
        yield f"weights {old} → {new}"


def _code(before: Inputs, after: Inputs) -> Iterator[str]:
    """Tell of the source itself; a commit that changed none of it is no cause."""
    if before.code != after.code:
        same = before.commit == after.commit or not (before.commit and after.commit)
        old, new = (before.code, after.code) if same else (before.commit or "", after.commit or "")
        edited = ", edited since its commit" if same and after.commit else ""
        yield f"bitferry's code {_hash(old)} → {_hash(new)}{edited}"


def _packages(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    order = {name: place for place, name in enumerate(STACK)}
    names = sorted(_differing(before, after), key=lambda name: (order.get(name.lower(), len(STACK)), name))
    for name in names[:MOST_PACKAGES]:
        yield f"package {_moved(name, before.get(name), after.get(name))}"
    more = len(names) - MOST_PACKAGES
    if more > 0:
        yield f"and {more} more package{'s' if more > 1 else ''}"
