"""How far a model's answers move by themselves, when its constants are off by a few units in the last place of float32.

Two right runtimes sum in different orders, so their values differ by such units; a model may amplify that, layer by
layer. Each weight times 1 + ε with ε from N(0, 2⁻²¹) is as large a disturbance as sums of many terms, and Winograd's
transforms in convolutions, make (Higham, Accuracy and Stability of Numerical Algorithms, 2002, sections 4.2 and 1.6).
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from bitferry.device.arrays import Predict
from bitferry.pipeline.onnx_in import session

EPSILON = 2.0**-21
DRAWS = 3
MARGIN = 2.0
"""How much further than a disturbed model's answers those of a right runtime may be: amplitude, so 6 dB."""
SIZES = {"Resize", "Upsample"}
"""ONNX operators whose constants decide how large their output is."""


def modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield copies of a module, each with its floating-point parameters and buffers disturbed."""
    for seed in range(DRAWS):
        copied, chance = copy.deepcopy(module), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (*copied.parameters(), *copied.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(_disturbed(tensor, chance))
        yield copied


def _disturbed(tensor: Tensor, chance: torch.Generator) -> Tensor:
    return tensor * (1 + EPSILON * torch.randn(tensor.shape, generator=chance).to(tensor.dtype))


def onnx_files(path: Path) -> Iterator[Predict]:
    """Yield what answers as an ONNX file does with its float32 constants disturbed."""
    for seed in range(DRAWS):
        model, chance = onnx.load(path), np.random.default_rng(seed)
        kept = {name for node in model.graph.node if node.op_type in SIZES for name in node.input[1:]}
        for constant in model.graph.initializer:
            if constant.data_type == onnx.TensorProto.FLOAT and constant.name not in kept:
                values = numpy_helper.to_array(constant)
                changed = values * (1 + EPSILON * chance.standard_normal(values.shape))
                constant.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), constant.name))
        yield session.predict(model.SerializeToString())
