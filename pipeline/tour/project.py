"""The project of the tour: a recipe, a model of one file and embedded images, written where the user says."""

from pathlib import Path

import numpy as np
from PIL import Image

from bitferry.device.errors import InputError
from bitferry.pipeline import cache

NAME = "quickstart"
PHOTO, TRUTH = "photo.png", "Ankle boot"
TRAINED = 2600
"""Of the embedded evaluation images; the model is judged on the others."""
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PLACES = (Path(__file__).parent, Path(__file__).parents[2] / "calibration_data/fashion_mnist")
"""Where the embedded images are: in an installed package, in the repository."""

MODEL = '''"""A network of your own would stand here: a factory that gives a torch.nn.Module."""

from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a residual addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.second(self.first(x)))


def make(classes: int = 10) -> nn.Module:
    """Build the untrained network: 28x28 pixels in, a score for each class out."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), Block(16),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), Block(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
    )
'''

RECIPE = """\
# What `bitferry quickstart` builds: a small network on embedded Fashion-MNIST images.
name = "{name}"
version = "1.0.0"
precision = "int8"
classes = [{classes}]

[model]
source = "module:quickstart_model:make"    # quickstart_model.py, beside this file; no weights: it is trained

[preprocessing]
height = 28
width = 28
mean = [0.286, 0.286, 0.286]
std = [0.353, 0.353, 0.353]

[data]                             # relative to this file
train = "train.npz"
calibration = "calibration.npz"
evaluation = "evaluation.npz"

[training]
epochs = 5
batch_size = 128
learning_rate = 1e-2
weight_decay = 0.05

[budget]
accuracy_drop_pp = 2.0
confidence = 0.95

[targets.{target}]
"""


def write(folder: Path, target: str) -> Path:
    """Write the project, or find it there, and give its recipe; raise InputError for a folder that is not ours."""
    place = next((one for one in PLACES if (one / "evaluation.npz").is_file()), None)
    if place is None:
        raise InputError(
            "the embedded images are not in this installation; install bitferry again, or run this in its repository"
        )
    cache.own(folder)
    classes = ", ".join(f'"{name}"' for name in CLASSES)
    _keep(folder / "quickstart_model.py", MODEL)
    path = folder / "quickstart.toml"
    _keep(path, RECIPE.format(name=NAME, classes=classes, target=target))
    with np.load(place / "evaluation.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    with np.load(place / "calibration.npz") as arrays:
        np.savez(folder / "calibration.npz", images=arrays["images"], labels=arrays["labels"])
    np.savez(folder / "train.npz", images=images[:TRAINED], labels=labels[:TRAINED])
    np.savez(folder / "evaluation.npz", images=images[TRAINED:], labels=labels[TRAINED:])
    photo = TRAINED + int(np.flatnonzero(labels[TRAINED:] == CLASSES.index(TRUTH))[0])
    Image.fromarray(images[photo]).save(folder / PHOTO)
    return path


def _keep(path: Path, text: str) -> None:
    """Write a file, replacing only what has other text."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
