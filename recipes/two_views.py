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
        self.channels = whole.classifier.in_features
        self.classifier = nn.Linear(2 * self.channels, classes)

    def forward(self, frontal: Tensor, lateral: Tensor) -> Tensor:
        found = F.relu(self.features(torch.cat([frontal, lateral])))  # one pass for both: half the graph
        described = found.mean((2, 3)).reshape(2, -1, self.channels)
        scores: Tensor = self.classifier(described.transpose(0, 1).flatten(1))
        return scores


def densenet121(classes: int) -> nn.Module:
    """Build it without weights."""
    return TwoViews(classes)
