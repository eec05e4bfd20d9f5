"""The arrays that pass between a decoder and a model, and the one shape every model takes."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""N×H×W×3, already resized and cropped by the preprocessing contract; N×V×H×W×3 for models that take V images."""

Outputs = NDArray[np.float32]
"""N×K, one score per class, not yet softmax probabilities; N×K×H×W for segmentation."""

Predict = Callable[[Images], Outputs]
"""Everything that can answer: eager PyTorch, TorchScript, ONNX and each compiled target."""


def in_batches(predict: Predict, batch: int) -> Predict:
    """Serve any number of images with a model whose batch is fixed; the last batch is filled up with zeros."""

    def predict_all(images: Images) -> Outputs:
        rows = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            missing = batch - len(part)
            full = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.uint8)]) if missing else part
            rows.append(predict(full)[: len(part)])
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    return predict_all
