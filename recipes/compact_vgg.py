"""VGG-16 with a small classifier: its convolutions as published, a tenth of its parameters."""

from torch import Tensor, nn
from torchvision.models import vgg

CHANNELS, WIDTH = 512, 512


class CompactVgg(nn.Module):
    """The mean of each channel goes into 512 units, where VGG-16 has every pixel go into 4096.

    The parts keep torchvision's names, so that its file of weights fits: `features` starts from it, `classifier`, whose
    tensors have other shapes, anew.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = vgg.make_layers(vgg.cfgs["D"])
        self.classifier = nn.Sequential(
            nn.Linear(CHANNELS, WIDTH), nn.ReLU(), nn.Dropout(),
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(),
            nn.Linear(WIDTH, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return scores


def vgg16(classes: int) -> nn.Module:
    """Build it without weights."""
    return CompactVgg(classes)
