"""Models that come with their graph, `.onnx` and `.pt2`: what they take and give, and how they are tried."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitferry.device.errors import InputError, first_line
from bitferry.pipeline.init.trial import Model
from bitferry.pipeline.onnx_in import given


@dataclass(frozen=True)
class Whole:
    """A model with its graph."""

    answer: Model
    """Takes N×3×H×W whatever the file's own layout."""
    height: int | None
    width: int | None
    classes: int | None
    segments: bool
    layout: str
    """NCHW or NHWC."""
    pixels: bool
    """Whether it takes uint8 pixels, its normalization inside."""


def onnx(path: Path) -> Whole:
    """Open an ONNX file, looked over before a runtime opens it; raise InputError when it is no image model."""
    import onnxruntime  # noqa: PLC0415 - for these files only

    model = given.read(path)
    try:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime may raise anything
        raise InputError(f"{path} cannot be opened by ONNX Runtime: {first_line(error)}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        raise InputError(
            f"{path} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); expected one, of images"
        )
    _refuse_outputs(path, [(one.name, one.shape) for one in outputs])
    layout, height, width = _layout(inputs[0].shape, path)
    kind = {"tensor(uint8)": np.uint8, "tensor(float16)": np.float16}.get(inputs[0].type, np.float32)

    def answer(images: Tensor) -> Tensor:
        pixels = images.numpy() if layout == "NCHW" else images.permute(0, 2, 3, 1).numpy()
        fixed = inputs[0].shape[0]
        each = fixed if isinstance(fixed, int) and fixed > 0 else len(pixels)
        found = []
        for start in range(0, len(pixels), each):
            part = pixels[start : start + each]
            full = np.concatenate([part, np.repeat(part[:1], each - len(part), 0)]).astype(kind)
            found.append(session.run([outputs[0].name], {inputs[0].name: full})[0][: len(part)])
        return torch.from_numpy(np.concatenate(found).astype(np.float32))

    shape = outputs[0].shape
    classes = shape[1] if len(shape) in (2, 4) and isinstance(shape[1], int) else None
    return Whole(answer, height, width, classes, len(shape) == 4, layout, kind is np.uint8)


def _refuse_outputs(path: Path, outputs: Sequence[tuple[str, Sequence[int | str | None]]]) -> None:
    """Raise InputError where a model gives several tensors, or one that is no scores, as of a text or of boxes."""
    told = ", ".join(f"'{name}' {'×'.join(map(str, shape))}" for name, shape in outputs)
    if len(outputs) != 1 or (outputs[0][1] and len(outputs[0][1]) not in (2, 4)):
        raise InputError(
            f"{path} gives {told}; expected one tensor of scores, N×K of a classifier or N×K×H×W of a segmentation "
            "model: no text (N×T×K), no boxes (N×C×A); where one of several is the scores, keep that alone"
        )


def _layout(shape: list[int | str | None], path: Path) -> tuple[str, int | None, int | None]:
    """Tell channels first from last by where the 3 is."""
    if len(shape) == 4:
        for layout, channels, sides in (("NCHW", 1, shape[2:]), ("NHWC", 3, shape[1:3])):
            if shape[channels] == 3:
                height, width = (side if isinstance(side, int) and side > 0 else None for side in sides)
                return layout, height, width
    others = [size for size in (shape[1], shape[3]) if isinstance(size, int)] if len(shape) == 4 else []
    hint = f"; bitferry gives every model 3 channels, not {min(others)}" if others and 3 not in others else ""
    raise InputError(f"{path} takes {'×'.join(map(str, shape))}; expected images, N×3×H×W or N×H×W×3{hint}")


def program(path: Path, trust: bool) -> Whole:
    """Open an exported program; raise InputError without `trust`, since that can run code."""
    if not path.is_file():
        raise InputError(f"the model {path} does not exist")
    if not trust:
        raise InputError(f"{path}: an exported program can run code when it is loaded; pass --trust if you trust it")
    try:
        exported = torch.export.load(path)
        taken = [node.meta["val"] for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs]
        answered = exported.graph_signature.user_outputs
        gives = [node.meta["val"] for node in exported.graph.nodes if node.name in answered]
    except Exception as error:  # torch raises a dozen kinds on a file that is no .pt2
        raise InputError(f"{path} is not an exported program (.pt2): {first_line(error)}") from error
    if len(taken) != 1 or taken[0].ndim != 4 or taken[0].shape[1] != 3:
        shapes = [list(one.shape) for one in taken]
        raise InputError(f"{path} takes {shapes}; expected one input of images, N×3×H×W")
    _refuse_outputs(path, [(str(name), list(one.shape)) for name, one in zip(answered, gives, strict=False)])
    made = gives[0]
    height, width = (side if isinstance(side, int) else None for side in taken[0].shape[2:])
    classes = made.shape[1] if made.ndim in (2, 4) and isinstance(made.shape[1], int) else None
    return Whole(exported.module(), height, width, classes, made.ndim == 4, "NCHW", False)
