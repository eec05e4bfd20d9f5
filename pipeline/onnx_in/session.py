"""An ONNX file that answers: by ONNX Runtime as a user would run it, or operator by operator."""

from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import onnxruntime as ort
import torch
from torch import Tensor, nn

from bitferry.device.arrays import Images, Outputs, Predict, in_batches


class Session(nn.Module):
    """Answer as a module does, with as many threads as PyTorch has at the time of the call.

    `rewritten` lets ONNX Runtime rearrange the graph for speed, which is its default.
    """

    def __init__(self, path: Path, *, rewritten: bool = True) -> None:
        super().__init__()
        self.loaded = lru_cache(maxsize=2)(partial(predict, path, rewritten=rewritten))
        self.loaded(threads=torch.get_num_threads())  # or it would be part of the first call's time

    def forward(self, images: Tensor) -> Tensor:
        scores = self.loaded(threads=torch.get_num_threads())(images.numpy())
        return torch.from_numpy(scores)


def predict(model: Path | bytes, *, threads: int | None = None, rewritten: bool = False) -> Predict:
    """Open a file, or the bytes of one, that takes uint8 N×H×W×3; a batch that it fixes is filled up."""
    session = opened(model, threads=threads, rewritten=rewritten)
    (given,) = session.get_inputs()

    def answer(images: Images) -> Outputs:
        return cast(Outputs, session.run(None, {given.name: images})[0])

    return in_batches(answer, given.shape[0]) if isinstance(given.shape[0], int) else answer


def opened(model: Path | bytes, *, threads: int | None = None, rewritten: bool = False) -> ort.InferenceSession:
    """Open a session on the CPU that waits for no other and says nothing."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not rewritten:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
