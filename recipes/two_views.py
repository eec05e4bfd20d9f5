"""DenseNet-121 that looks at two images of one patient, with the same weights, before it answers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import densenet


class TwoViews(nn.Module):
    """One backbone for both views; what it finds in each is joined for one classifier.

    `features` has torchvision's name, so that a DenseNet-121 of its own is a start; `classifier` takes twice as much.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        whole = densenet.densenet121(weights=None)
        self.features = whole.features
        self.classifier = nn.Linear(2 * whole.classifier.in_features, classes)

    def forward(self, frontal: Tensor, lateral: Tensor) -> Tensor:
        scores: Tensor = self.classifier(torch.cat([self._describe(frontal), self._describe(lateral)], 1))
        return scores

    def _describe(self, view: Tensor) -> Tensor:
        found = F.relu(self.features(view))
        return F.adaptive_avg_pool2d(found, 1).flatten(1)


def densenet121(classes: int) -> nn.Module:
    """Build it without weights."""
    return TwoViews(classes)
