"""What a model's answer depends on besides its image, chance or the others in its batch, and which layer does it."""

import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitferry.device.errors import InputError

Answer = Callable[[Tensor], Tensor]
SHARE, LEAST = 1e-3, 1e-5
"""Differences that count, of two runs with batches of one size: this share of how far two images' scores are apart, and
this share of the largest score, which rounding can make."""
SHARE_ALONE, LEAST_ALONE = 0.1, 1e-2
"""The same of an image alone and in a batch, where kernels of another size round otherwise."""
UNFILLED = ("aten.empty", "aten.new_empty")
"""Operators that give memory as it happens to be."""
NEAR = 1e-6
"""Relative difference of two sums that are the same."""
SKIPPED = ("torch", "bitferry")
"""Packages whose lines say nothing of a model."""
Signature = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Step:
    """One operator of a run: what ran, where, and sums of what it gave."""

    operator: str
    module: str
    line: str
    whole: Signature
    parts: tuple[Signature, ...]
    """Of the part that may be image 0's or image 1's, by each way in which two images may lie in a tensor."""


@dataclass
class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note each operator while a model runs."""

    modules: list[str]
    image: int
    steps: list[_Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, and note sums of its first result."""
        found = func(*args, **(kwargs or {}))
        first = found[0] if isinstance(found, tuple | list) and found else found
        if isinstance(first, Tensor) and first.dtype != torch.bool and not str(func).startswith(UNFILLED):
            module = self.modules[-1] if self.modules else ""
            values = first.detach().to(torch.float64)
            parts = tuple(_sums(part) for part in _parts(values, self.image))
            self.steps.append(_Step(str(func), module, _line(), _sums(values), parts))
        return found


def refuse(answer: Answer, images: Tensor, other: Tensor, source: str) -> None:
    """Raise InputError where the scores of two images depend on chance or on each other, naming the layer.

    `images` are two, and `other` is a third one, which takes the place of each.
    """
    first, second = torch.stack([images[0], other]), torch.stack([other, images[1]])
    scores = _scores(answer, images)
    if _differs(scores[0], _scores(answer, first)[0], scores) or _differs(
        scores[1], _scores(answer, second)[1], scores
    ):
        refuse_random(answer, images, source, before=scores)
        joint = _joint_place(answer, images, first, 0) or _joint_place(answer, images, second, 1)
        raise InputError(_joint(source, joint))
    try:
        alone = _scores(answer, images[1:])
    except Exception:  # noqa: BLE001 - a model of one fixed batch, which cannot take another
        return
    if alone.shape == scores[1:].shape and _differs(alone[0], scores[1], scores, SHARE_ALONE, LEAST_ALONE):
        refuse_random(answer, images, source, before=scores)
        raise InputError(
            f"the model '{source}' gives an image other scores alone than beside another: something in it depends on "
            "how many images there are; make it compute the same for each"
        )


def refuse_random(answer: Answer, images: Tensor, source: str, before: Tensor | None = None) -> None:
    """Raise InputError where the same images get other scores the next time, naming the layer and the line."""
    scores = _scores(answer, images) if before is None else before
    again = _scores(answer, images)
    if not _differs(scores, again, scores):
        return
    step = _first(_recorded(answer, images, 0), _recorded(answer, images, 0), lambda a, b: not _same(a.whole, b.whole))
    raise InputError(
        f"the model '{source}' gives the same image other scores each time: {_place(step)} is random; a baseline must "
        "give one answer: leave dropout out when it is evaluated, as F.dropout(x, p, training=self.training) or "
        "nn.Dropout does, and draw no random numbers in forward"
    )


def _joint(source: str, step: _Step | None) -> str:
    return (
        f"with the model '{source}', an image's answer depends on the others in its batch: layer {_place(step)}; a "
        "device gives it one image at a time, so let the layer use what it kept from training (batch norm: "
        "track_running_stats=True, and evaluation mode), or what it computes from this image alone"
    )


def _scores(answer: Answer, images: Tensor) -> Tensor:
    with torch.no_grad():
        return answer(images).detach().to(torch.float64)


def _differs(one: Tensor, other: Tensor, scores: Tensor, share: float = SHARE, least: float = LEAST) -> bool:
    """Say whether scores differ by more than rounding; `scores` are of two images, to measure by."""
    if one.shape != other.shape:
        return True
    apart = float((scores[0] - scores[-1]).abs().max()) if len(scores) > 1 else 0.0
    allowed = share * apart + least * float(scores.abs().max())
    return float((one - other).abs().max()) > allowed


def _joint_place(answer: Answer, images: Tensor, changed: Tensor, image: int) -> _Step | None:
    """Find the first operator whose result for an image changes where only the other image does."""
    return _first(_recorded(answer, images, image), _recorded(answer, changed, image), _mixes)


def _mixes(one: _Step, other: _Step) -> bool:
    if _same(one.whole, other.whole):
        return False
    return bool(one.parts) and not any(_same(a, b) for a, b in zip(one.parts, other.parts, strict=True))


def _first(one: list[_Step], other: list[_Step], differs: Callable[[_Step, _Step], bool]) -> _Step | None:
    for a, b in zip(one, other, strict=False):
        if a.operator != b.operator or len(a.parts) != len(b.parts):
            return a
        if differs(a, b):
            return a
    return None


def _recorded(answer: Answer, images: Tensor, image: int) -> list[_Step]:
    """Run a model and list its operators in order."""
    modules: list[str] = []
    with torch.no_grad(), _inside(answer, modules), _Recorder(modules, image) as recorder:
        answer(images)
    found: list[_Step] = recorder.steps
    return found


@contextmanager
def _inside(answer: Answer, modules: list[str]) -> Iterator[None]:
    """Keep the path of the module that runs at the end of `modules`."""
    handles = []
    for name, module in answer.named_modules() if isinstance(answer, nn.Module) else ():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        told = f"'{name.removeprefix('model.')}' ({type(module).__name__})" if name not in ("", "model") else ""
        handles.append(module.register_forward_pre_hook(lambda *_, told=told: modules.append(told)))
        handles.append(module.register_forward_hook(lambda *_: modules.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(values: Tensor, image: int) -> Iterator[Tensor]:
    """Give what may be an image's part of a tensor of two: halves, or every second row, along each axis."""
    for axis, size in enumerate(values.shape):
        if size >= 2 and size % 2 == 0:
            yield values.narrow(axis, image * (size // 2), size // 2)
            if size > 2:
                yield values.index_select(axis, torch.arange(image, size, 2))


def _sums(values: Tensor) -> Signature:
    """Give sums that tell tensors apart without keeping them."""
    if not values.numel():
        return ()
    flat = values.flatten()
    weights = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    return tuple((float(part.sum()), float(part.abs().sum())) for part in (flat, flat * weights))


def _same(one: Signature, other: Signature) -> bool:
    return all(
        abs(a - b) <= NEAR * max(size, other_size) for (a, size), (b, other_size) in zip(one, other, strict=True)
    )


def _place(step: _Step | None) -> str:
    """Describe where an operator runs, as `'head.drop' (Dropout), model.py line 12: x = F.dropout(x)`."""
    if step is None:
        return "unknown, inside a program that shows no layers"
    return ", ".join(part for part in (step.module, step.operator.removeprefix("aten."), step.line) if part)


def _line() -> str:
    """Give the innermost line of Python that runs, of somebody's model: none of PyTorch, and none of this project."""
    frame: FrameType | None = sys._getframe(1)  # the one way to walk a stack without formatting it
    while frame is not None and frame.f_code is not _recorded.__code__:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in SKIPPED and not frame.f_code.co_filename.startswith("<"):
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            return f"{Path(frame.f_code.co_filename).name} line {frame.f_lineno}: {text}"
        frame = frame.f_back
    return ""
