"""The arrays that pass between a decoder and a model, and the one shape every model takes."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""N×H×W×3, already resized and cropped by the preprocessing contract."""

Outputs = NDArray[np.float32]
"""N×K, one score per class; not yet softmax probabilities."""

Predict = Callable[[Images], Outputs]
"""Everything that can answer: eager PyTorch, TorchScript, ONNX and each compiled target."""
