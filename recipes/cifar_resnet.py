"""ResNet-18 for images of 32×32: a stem that keeps their few pixels (He et al. 2016, section 4.2)."""

from torch import nn
from torchvision.models import resnet


def resnet18(classes: int = 10) -> nn.Module:
    """Build torchvision's ResNet-18 with one 3×3 convolution of stride 1 in place of its stem, which divides by 4."""
    model = resnet.resnet18(weights=None, num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
